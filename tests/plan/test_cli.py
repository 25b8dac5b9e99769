"""The commands as a person meets them: what they refuse, in one line and with code 2."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from gptoss_compile.cli import compile_main, parse_buckets
from gptoss_compile.config import Bucket
from gptoss_compile.inspect import main as inspect_main

CONFIGS = Path(__file__).parent.parent / "checkpoint" / "data"


def test_buckets_are_read() -> None:
    assert parse_buckets("decode:1,8;extend:64x8") == (Bucket.decode(1), Bucket.decode(8), Bucket.extend(64, 8))
    assert parse_buckets("decode:2,2") == (Bucket.decode(2),)


@pytest.mark.parametrize("text", ["decode:x", "decode:0", "decode:2x2", "extend:64", "extend:4x8", "verify:1", "8"])
def test_bad_buckets_are_named(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is no bucket; write decode:BATCH or extend:TOKENSxSEQUENCES"):
        parse_buckets(text)


@pytest.mark.parametrize(("arguments", "message"), [
    (["/no/such/folder"], "there is no folder /no/such/folder"),
    (["{model}", "--weights", "random:1", "--tp", "2", "--target", "sm100"],
     "--tp 2: kernels that exchange are there for sm90 alone, not for sm100 yet; compile with --tp 1"),
    (["{model}", "--weights", "random:1", "--tp", "9"], "--tp 9: the model has 8 key/value heads, fewer than ranks"),
    (["{model}", "--weights", "random:1", "--tp", "0"], "--tp 0: the number of GPUs must be at least 1"),
    (["{model}", "--weights", "rnd"], "holds no *.safetensors"),
    (["{model}", "--weights", "random:1", "--max-context", "999999999"], "--max-context 999999999 is not within 1 and"),
    (["{model}", "--weights", "random:1", "--buckets", "decode:1"], "at least one decode and one extend bucket"),
    (["{model}", "--weights", "random:1", "--skip", "nothing"], "no pass is called nothing; the passes are: canonicalize"),
    (["{model}", "--weights", "random:1", "--limit", "merge_qkv"], "--limit takes PASS=N, found 'merge_qkv'"),
])
def test_requests_that_cannot_be_compiled(arguments: list[str], message: str, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_bytes((CONFIGS / "config-20b.json").read_bytes())
    output = tmp_path / "out"
    arguments = [a.replace("{model}", str(tmp_path / "m")) for a in arguments]
    assert compile_main(["--target", "sm90", *arguments, "-o", str(output)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m"], "nothing half-written"


def test_inspecting_what_is_no_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no artifact")
