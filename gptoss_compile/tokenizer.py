"""The tokenizer of a checkpoint, as the file that openai-harmony loads: o200k_base.tiktoken, known by its
hash.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.util
import json
import os
from pathlib import Path

from gptoss_compile.config_parse import O200K_HARMONY

FILE = "o200k_base.tiktoken"
_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
_ORDINARY = 199998  # ids from here on are harmony's special tokens, which the file does not list


def o200k_base(folder: Path | None, vocab_size: int) -> tuple[bytes | None, str]:
    """(the file's content, where it came from), or (None, why there is none).

    A checkpoint's own tokenizer.json decides, in its folder or, for `original/`, the one above. A checkpoint
    without one but with a vocabulary of harmony's size gets the file from $TIKTOKEN_ENCODINGS_BASE or the
    bpe-openai package.
    """
    if vocab_size != O200K_HARMONY:
        return None, f"the checkpoint's vocabulary has {vocab_size} ids, o200k_harmony has {O200K_HARMONY}"
    for path in _tokenizer_files(folder):
        data = _from_tokenizer_json(path)
        if data is None:
            return None, f"the checkpoint's {path.name} holds another vocabulary than o200k_harmony"
        return data, f"rebuilt from the checkpoint's {path.name}"
    if (data := _from_environment()) is not None:
        return data, "TIKTOKEN_ENCODINGS_BASE"
    if (data := _from_package()) is not None:
        return data, "the package bpe-openai"
    return None, (f"the checkpoint has no tokenizer.json; put {FILE} into a folder named by "
                  "TIKTOKEN_ENCODINGS_BASE, or pip install bpe-openai")


def _tokenizer_files(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    folders = [folder, folder.parent] if folder.name == "original" else [folder]
    return [path for path in (candidate / "tokenizer.json" for candidate in folders) if path.is_file()]


def _checked(data: bytes) -> bytes | None:
    return data if hashlib.sha256(data).hexdigest() == _SHA256 else None


def _from_tokenizer_json(path: Path) -> bytes | None:
    """The vocabulary's byte strings in order of their ids, or None if they are not exactly those of
    o200k_base.
    """
    try:
        ids = json.loads(path.read_bytes())["model"]["vocab"]
        byte_of = _byte_of_character()
        ordinary = sorted((token_id, token) for token, token_id in ids.items() if token_id < _ORDINARY)
        lines = [base64.b64encode(bytes(byte_of[c] for c in token)) + b" %d\n" % token_id
                 for token_id, token in ordinary]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return _checked(b"".join(lines))


def _byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's printable alphabet: visible Latin-1 characters stand for themselves, the other
    bytes, in
    order, for the characters from U+0100."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _from_environment() -> bytes | None:
    base = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    path = Path(base or "") / FILE
    return _checked(path.read_bytes()) if base and path.is_file() else None


def _from_package() -> bytes | None:
    found = importlib.util.find_spec("bpe_openai")  # found, not imported: only its data is wanted
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / "data" / f"{FILE}.gz"
        if path.is_file():
            return _checked(gzip.decompress(path.read_bytes()))
    return None
