"""A served artifact, end to end over HTTP: log-probabilities against transformers, and a soak of mixed requests.

The soak is short by default. GPTOSS_SOAK_REQUESTS=200 makes it long, GPTOSS_SOAK_ARTIFACT=PATH runs it on an artifact of
yours, for example the demo's.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from gptoss_compile.artifact import Artifact
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.compiler import Request, compile_checkpoint
from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.demo.serving import served
from gptoss_compile.target import Target

from .test_parity import reference_logits

CONFIG = ModelConfig(
    num_layers=2, hidden=64, intermediate=64, num_heads=8, num_kv_heads=1, head_dim=32, num_experts=8, experts_per_token=4,
    vocab_size=512, sliding_window=128, windowed=(True, False), rope_original_context=64, max_position=2304)
BUCKETS = (Bucket.decode(4), Bucket.extend(96, 5, 96))
SEED = 21


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("GPTOSS_SOAK_ARTIFACT"):
        return Path(given)
    path = tmp_path_factory.mktemp("served") / "small"
    request = Request(Target.parse("cpu"), buckets=BUCKETS, max_context=2304)
    compile_checkpoint(Checkpoint.random(CONFIG, SEED), None, request, path)
    return path


def metric(url: str, name: str) -> float:
    found = re.search(rf"^{name} (\S+)$", httpx.get(f"{url.removesuffix('/v1')}/metrics").text, re.MULTILINE)
    assert found, f"/metrics has no {name}"
    return float(found[1])


@pytest.mark.skipif("GPTOSS_SOAK_ARTIFACT" in os.environ, reason="the soak's own artifact has other weights")
@pytest.mark.parametrize("length", [2, 127, 128, 129, 300])
def test_log_probabilities_over_http_are_those_of_transformers(artifact: Path, length: int, server: str) -> None:
    rng = random.Random(length)
    prompt = [rng.randrange(CONFIG.vocab_size) for _ in range(length)]
    logits = reference_logits(Checkpoint.random(CONFIG, SEED), prompt).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    answer = httpx.post(f"{server}/completions", timeout=60, json={
        "model": "small", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "return_token_ids": True})
    assert answer.status_code == 200, answer.text
    got = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert got[0] is None and len(got) == length
    wanted = [expected[i, token] for i, token in enumerate(prompt[1:])]
    assert np.abs(np.array(got[1:]) - wanted).max() <= 1e-4


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[str]:
    with served(artifact, "--served-model-name", "small") as url:
        yield url


@pytest.mark.parametrize("pages", ["plenty", "a tenth", "the largest alone"])
def test_soak(artifact: Path, pages: str) -> None:
    """Whatever runs beside a request, and whatever is preempted or aborted, its answer is the one it gets alone."""
    count = int(os.environ.get("GPTOSS_SOAK_REQUESTS", "24"))
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    vocabulary = min(Artifact.open(artifact).config.vocab_size, 199998)
    jobs = []
    for _ in range(count):
        length = rng.choice((1, 15, 16, 17, 127, 128, 129, rng.randint(1, 400), rng.randint(1, 2000)))
        shared = rng.random() < 0.3  # some prompts begin alike, for the prefix cache
        base = [7 * i % vocabulary for i in range(length)] if shared else [rng.randrange(vocabulary) for _ in range(length)]
        tokens = rng.randint(1, 24) if rng.random() < 0.7 else rng.randint(60, 160)  # more than was set aside for it
        jobs.append((base, tokens, rng.random() < 0.5, rng.random() < 0.15))
    demand = sum(-(-(len(p) + n) // 16) for p, n, _, _ in jobs)
    largest = max(-(-(len(p) + n) // 16) for p, n, _, _ in jobs)
    budget = {"plenty": demand + 64, "a tenth": max(demand // 10, largest), "the largest alone": largest}[pages]
    with served(artifact, "--kv-pages", str(budget), "--served-model-name", "small") as url:
        mixed = asyncio.run(_all(url, jobs, random.Random(seed)))
        alone = {i: asyncio.run(_all(url, [(p, n, False, False)], rng))[0] for i, (p, n, _, _) in enumerate(jobs)
                 if mixed[i] is not None}
        for i, answer in alone.items():
            assert mixed[i] == answer, f"request {i} of seed {seed}: prompt {len(jobs[i][0])}, max_tokens {jobs[i][1]}"
        deadline = time.monotonic() + 5
        while metric(url, "gptoss_kv_pages_held") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert metric(url, "gptoss_kv_pages_held") == 0
        assert metric(url, "gptoss_requests_running") == metric(url, "gptoss_requests_waiting") == 0
        if pages == "the largest alone" and count >= 100:
            assert metric(url, "gptoss_preemptions_total") > 0
    assert len(alone) > count / 2


Job = tuple[list[int], int, bool, bool]  # prompt, max_tokens, streamed, given up half way


async def _all(url: str, jobs: list[Job], rng: random.Random) -> list[list[int] | None]:
    """The token ids of each job's answer; None where it was given up."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        return await asyncio.gather(*(_one(client, url, job, rng.random()) for job in jobs))


async def _one(client: httpx.AsyncClient, url: str, job: Job, delay: float) -> list[int] | None:
    prompt, tokens, stream, given_up = job
    body = {"model": "small", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True, "stream": stream}
    if given_up:
        with suppress(TimeoutError):
            await asyncio.wait_for(client.post(f"{url}/completions", json=body), delay)
        return None
    if not stream:
        answer = await client.post(f"{url}/completions", json=body)
        assert answer.status_code == 200, answer.text
        return list(answer.json()["choices"][0]["token_ids"])
    ids: list[int] = []
    async with client.stream("POST", f"{url}/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                for choice in json.loads(line[6:])["choices"]:
                    ids += choice.get("token_ids") or []
    return ids
