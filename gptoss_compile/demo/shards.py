"""The corpus on disk, and rows of it for training. numpy only.

A folder holds meta.json (vocabulary, names of the skills), train-*.npz.xz and held-out.npz.xz. Token ids are compact: 0
is OTHER, any id outside the vocabulary; i + 1 stands for vocabulary[i].
"""

from __future__ import annotations

import io
import itertools
import json
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OTHER = 0
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shard:
    """Conversations one after the other: tokens [N], learnt [N] (is it the model's to write?), lengths and skills [C]."""

    tokens: Array
    learnt: Array
    lengths: Array
    skills: Array


@dataclass(frozen=True)
class Rows:
    """A batch of rows into which whole conversations are packed, all [B, T].

    positions: within the conversation. segments: the conversation's number in its row, -1 for padding. targets: the next
    token where the model is to write it, else -1. conversations: the conversation's number in the shard.
    """

    tokens: Array
    positions: Array
    segments: Array
    targets: Array
    conversations: Array


def write_shards(folder: Path, train: Sequence[Shard], held_out: Shard, vocabulary: Array, skills: Sequence[str]) -> int:
    """Write the corpus; returns its size in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.npz.xz"):
        old.unlink()
    (folder / "meta.json").write_text(json.dumps({"vocabulary": vocabulary.tolist(), "skills": list(skills)}))
    for number, shard in enumerate(train):
        (folder / f"train-{number:03}.npz.xz").write_bytes(_encode(shard))
    (folder / "held-out.npz.xz").write_bytes(_encode(held_out))
    return sum(path.stat().st_size for path in folder.iterdir())


def read_meta(folder: Path) -> tuple[Array, list[str]]:
    """(vocabulary, names of the skills)."""
    meta = json.loads((folder / "meta.json").read_bytes())
    return np.array(meta["vocabulary"], np.int32), list(meta["skills"])


def read_train(folder: Path) -> Shard:
    shards = [_decode(path.read_bytes()) for path in sorted(folder.glob("train-*.npz.xz"))]
    if not shards:
        raise ValueError(f"{folder} holds no train-*.npz.xz; make them with python -m gptoss_compile.demo.corpus")
    return Shard(*(np.concatenate([getattr(shard, name) for shard in shards])
                   for name in ("tokens", "learnt", "lengths", "skills")))


def read_held_out(folder: Path) -> Shard:
    return _decode((folder / "held-out.npz.xz").read_bytes())


def _encode(shard: Shard) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, tokens=shard.tokens.astype(np.uint16), learnt=np.packbits(shard.learnt),
             lengths=shard.lengths.astype(np.uint16), skills=shard.skills)
    return lzma.compress(buffer.getvalue(), preset=6)


def _decode(data: bytes) -> Shard:
    with np.load(io.BytesIO(lzma.decompress(data))) as arrays:
        tokens = arrays["tokens"]
        learnt = np.unpackbits(arrays["learnt"], count=len(tokens)).astype(bool)
        return Shard(tokens, learnt, arrays["lengths"].astype(np.int64), arrays["skills"])


def pack_rows(shard: Shard, order: Array, width: int, rows: int) -> Iterator[Rows]:
    """Batches of `rows` rows of `width` tokens that hold the conversations in the given order, whole, next fit.

    A last batch that is not full is padded.
    """
    lengths = shard.lengths[order]
    row_of, offset_of = _next_fit(lengths, width)
    starts = np.cumsum(shard.lengths) - shard.lengths
    edges = np.searchsorted(row_of, np.arange(0, row_of[-1] + rows + 1, rows))  # conversations by batch
    for first, last in itertools.pairwise(edges):
        if first < last:
            batch = slice(first, last)
            base = row_of[first] // rows * rows
            places = (row_of[batch] - base) * width + offset_of[batch]
            yield _rows(shard, order[batch], starts[order[batch]], lengths[batch], places, rows, width)


def _next_fit(lengths: Array, width: int) -> tuple[Array, Array]:
    rows, offsets = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    row = used = 0
    for i, length in enumerate(lengths.tolist()):
        assert length <= width, "a conversation is longer than a row"
        if used + length > width:
            row, used = row + 1, 0
        rows[i], offsets[i] = row, used
        used += length
    return rows, offsets


def _rows(shard: Shard, numbers: Array, starts: Array, lengths: Array, places: Array, rows: int, width: int) -> Rows:
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source, target = np.repeat(starts, lengths) + within, np.repeat(places, lengths) + within
    tokens, positions = np.zeros(rows * width, np.int64), np.zeros(rows * width, np.int64)
    segments, targets = np.full(rows * width, -1, np.int64), np.full(rows * width, -1, np.int64)
    conversations = np.full(rows * width, -1, np.int64)
    tokens[target], positions[target] = shard.tokens[source], within
    segments[target] = np.repeat(np.arange(len(numbers)), lengths)
    conversations[target] = np.repeat(numbers, lengths)
    inner = within < np.repeat(lengths, lengths) - 1  # the last token has no next one
    following = source[inner] + 1
    targets[target[inner]] = np.where(shard.learnt[following], shard.tokens[following].astype(np.int64), -1)
    shape = (rows, width)
    return Rows(tokens.reshape(shape), positions.reshape(shape), segments.reshape(shape), targets.reshape(shape),
                conversations.reshape(shape))
