from __future__ import annotations

import pytest

from gptoss_compile.config import ModelConfig
from gptoss_compile.runtime.pools import pool_sizes

CONFIG = ModelConfig(
    num_layers=4, hidden=64, intermediate=64, num_heads=8, num_kv_heads=2, head_dim=64, num_experts=8, experts_per_token=4,
    vocab_size=512, sliding_window=128, windowed=(True, False, True, False))
PAGE = 2 * 2 * 16 * 64 * 2  # bytes of one page of one layer: keys and values, 2 heads, 16 tokens, 64 values of bf16


def sizes(num_pages: int | None, *, memory: int = 1 << 30, sequences: int = 4, context: int = 1024) -> tuple[int, int]:
    return pool_sizes(CONFIG, page_size=16, window_ring=24, max_context=context, item_bytes=2, num_pages=num_pages,
                      max_num_seqs=sequences, memory=memory)


def test_as_many_pages_as_all_sequences_can_use() -> None:
    assert sizes(None) == (4 * 64 + 1, 2 * 4 * 9 + 24 + 1)


def test_memory_bounds_the_pages() -> None:
    memory = 96 * PAGE * 2 + 100 * PAGE * 2  # window layers' share, and 100 pages for the two full layers
    assert sizes(None, memory=memory)[0] == 100 + 1
    with pytest.raises(ValueError, match=r"too little for one page.*lower --max-num-seqs"):
        sizes(None, memory=96 * PAGE * 2)


@pytest.mark.parametrize(("asked", "window"), [(1, 9), (9, 9), (40, 40), (1000, 96)])
def test_pages_asked_for(asked: int, window: int) -> None:
    """Window layers never get more pages than full ones could fill, and never less than one window."""
    assert sizes(asked) == (asked + 1, window + 1)


def test_no_pages() -> None:
    with pytest.raises(ValueError, match="--kv-pages must be at least 1"):
        sizes(0)
