"""bench/serving.py against a server: it tells what the server did, and of requests that failed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import ScriptedEngine
from served import Running

BENCH = Path(__file__).parents[2] / "bench" / "serving.py"

pytest.importorskip("aiohttp", reason="aiohttp is not installed")


def load(running: Running, *options: str, key: str = "key") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), "--base-url", running.url, "--api-key", key, "--vocab-size", "1000", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_the_server_did(running: Running, engine: ScriptedEngine) -> None:
    lengths = ("--random-input-len", "40", "--random-output-len", "20", "--random-range-ratio", "0.5")
    done = load(running, "--num-prompts", "9", "--max-concurrency", "3", *lengths)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["completed"], report["failed"], report["model_id"]) == (9, 0, "gpt-oss")
    warm = 2  # tokens of the first request, which is not counted
    assert report["total_output_tokens"] == engine.stats().generation_tokens - warm
    assert 9 * 20 <= report["total_input_tokens"] <= 9 * 40 and 9 * 10 <= report["total_output_tokens"] <= 9 * 20
    assert report["max_concurrent_requests"] <= 3
    assert 0 < report["median_ttft_ms"] <= report["median_e2el_ms"] and report["median_tpot_ms"] > 0


def test_requests_that_fail(running: Running) -> None:
    done = load(running, "--num-prompts", "2", "--random-input-len", "5000", "--random-range-ratio", "1")
    assert done.returncode == 1 and json.loads(done.stdout.splitlines()[-1])["failed"] == 2
    assert "serving: failed: 400" in done.stderr and "context" in done.stderr


def test_a_server_that_refuses_or_is_not_there(running: Running) -> None:
    refused = load(running, key="wrong")
    assert refused.returncode == 2 and "401" in refused.stderr and "Traceback" not in refused.stderr
    absent = subprocess.run([sys.executable, str(BENCH), "--base-url", "http://127.0.0.1:1"], capture_output=True, text=True,
                            timeout=60, check=False)
    assert absent.returncode == 2 and "127.0.0.1:1" in absent.stderr and "Traceback" not in absent.stderr
