"""Where the tokenizer comes from, and the demo checkpoint."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path

import bpe_openai
import pytest

from gptoss_compile import demo, tokenizer
from gptoss_compile.checkpoint import Checkpoint
from gptoss_compile.tokenizer import o200k_base

VOCAB = 201088


@pytest.fixture(scope="module")
def published() -> bytes:
    path = Path(bpe_openai.__file__).parent / "data" / "o200k_base.tiktoken.gz"
    return gzip.decompress(path.read_bytes())


def alphabet() -> list[str]:
    """GPT-2's character for each byte, from the tokenizers library."""
    from tokenizers import pre_tokenizers

    known = set(pre_tokenizers.ByteLevel.alphabet())
    characters = [chr(byte) if chr(byte) in known and byte < 256 else "" for byte in range(256)]
    others = iter(sorted(known - set(characters)))
    return [character or next(others) for character in characters]


def write_tokenizer(folder: Path, data: bytes) -> None:
    of = alphabet()
    vocab = {}
    for line in data.splitlines():
        token, number = line.split()
        vocab["".join(of[byte] for byte in base64.b64decode(token))] = int(number)
    vocab["<|endoftext|>"] = 199999
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))


def test_from_tokenizer_json(tmp_path: Path, published: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_from_package", lambda: None)
    write_tokenizer(tmp_path / "hf", published)
    data, note = o200k_base(tmp_path / "hf", VOCAB)
    assert data == published and "tokenizer.json" in note
    (tmp_path / "hf" / "original").mkdir()
    assert o200k_base(tmp_path / "hf" / "original", VOCAB)[0] == published
    swapped = published.replace(b"IQ== 0\n", b"Ig== 0\n").replace(b"Ig== 1\n", b"IQ== 1\n")
    write_tokenizer(tmp_path / "hf", swapped)
    data, note = o200k_base(tmp_path / "hf", VOCAB)
    assert data is None and "another vocabulary" in note


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": 1}}',
                                     '{"model": {"vocab": {"a": "b"}}}'])
def test_broken_tokenizer_json(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    data, note = o200k_base(tmp_path, VOCAB)
    assert data is None and "tokenizer.json" in note


def test_without_tokenizer_json(tmp_path: Path, published: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIKTOKEN_ENCODINGS_BASE", raising=False)
    assert o200k_base(tmp_path, VOCAB) == (published, "the package bpe-openai")
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    (tmp_path / "o200k_base.tiktoken").write_bytes(published)
    assert o200k_base(None, VOCAB) == (published, "TIKTOKEN_ENCODINGS_BASE")
    (tmp_path / "o200k_base.tiktoken").write_bytes(published[:-1])  # not the file: not taken
    assert o200k_base(tmp_path, VOCAB)[1] == "the package bpe-openai"
    monkeypatch.setattr(tokenizer, "_from_package", lambda: None)
    data, note = o200k_base(tmp_path, VOCAB)
    assert data is None and "TIKTOKEN_ENCODINGS_BASE" in note
    data, note = o200k_base(tmp_path, 32000)
    assert data is None and "32000" in note


def test_demo(tmp_path: Path) -> None:
    folder = demo.build_demo(tmp_path / "demo")
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200e6
    opened = Checkpoint.open(folder)
    assert opened.config == demo.source().config and opened.config.vocab_size == VOCAB
    assert opened.config.heads_per_kv == 8 and opened.config.eos_ids == (200002, 199999, 200012)
    inode = (folder / "config.json").stat().st_ino
    assert demo.build_demo(tmp_path / "demo") == folder and (folder / "config.json").stat().st_ino == inode

    def content(folder: Path) -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())]

    assert content(folder) == content(demo.build_demo())  # by default in the user's cache
    assert (tmp_path / "cache").is_dir()


def test_transformers_loads_the_demo(tmp_path: Path, seed: int) -> None:
    """Its config.json and names are the published ones: transformers finds every weight and computes."""
    import torch
    from transformers import AutoConfig, GptOssForCausalLM, Mxfp4Config

    folder = demo.build_demo(tmp_path / "demo")
    assert AutoConfig.from_pretrained(folder).num_local_experts == 8
    model, info = GptOssForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        logits = model(torch.tensor([[seed % VOCAB, 1, 2]])).logits
    assert logits.isfinite().all() and 0.3 < logits.std() < 9
