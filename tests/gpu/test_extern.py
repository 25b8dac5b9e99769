"""FlashInfer's attention, as a step of ours, against the twin in fp32.

The library comes from the file that $GPTOSS_GPU_LIBRARY names (its .json beside it), or is compiled here. Unlike in
test_sm90_attention.py, what no query may see is NaN only in pages of which none may see anything: see `sm90/flashinfer.py`.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from .test_sm90_attention import EDGES, WINDOW, check_extend

pytestmark = pytest.mark.gpu
check = partial(check_extend, want="flashinfer_attention", whole=True)


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 95, 96, 97, 191, 192, 193, 385, 1000])
def test_a_prompt(tokens: int, window: int, seed: int) -> None:
    torch.manual_seed(seed)
    check([(0, tokens)], window)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_mixed_chunks(window: int, seed: int) -> None:
    torch.manual_seed(seed)
    check([(0, 1), (5, 40), (1000, 1), (126, 5), (1023, 230), (4990, 24), (127, 1), (0, 49)], window, padding=30)
    for _ in range(3):
        starts, counts = torch.randint(len(EDGES), (40,)), torch.randint(1, 90, (40,))
        check([(EDGES[int(i)], int(n)) for i, n in zip(starts, counts, strict=True)], window,
              padding=int(torch.randint(70, ())))


@pytest.mark.parametrize("window", [0, WINDOW])
def test_late_chunks(window: int, seed: int) -> None:
    torch.manual_seed(seed)
    check([(6001, 700)], window, padding=3)
    check([(100, 3), (5000, 1)], window, padding=1)
    check([(3000, 2048)], window)


@pytest.mark.parametrize("page", [16, 32, 128])
def test_other_shapes(page: int, seed: int) -> None:
    torch.manual_seed(seed)
    for window in (0, 40, WINDOW):
        check([(77, 150), (3, 1), (300, 26)], window, heads=16, kv_heads=2, page=page)
        check([(250, 200), (31, 7)], window, heads=6, kv_heads=3, page=page, padding=2)
