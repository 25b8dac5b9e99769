"""sm90's attention kernels against their twins in fp32, over scrambled page tables."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptoss_compile.kernels.attention import attention, rope_kv_attention
from gptoss_compile.kernels.tuned import trying

from .harness import device, error, run_kernel

DIM, PAGE, WINDOW = 64, 16, 128
pytestmark = pytest.mark.gpu


class Paged:
    """Random sequences in a paged cache.

    lengths: tokens of each sequence, the newest included; entries: of a page table's row. What no query at `oldest` or
    later may see is NaN, in the cache that the kernel gets, and zero in the twin's; so are, for a decode step, the slots of
    the newest tokens. whole: pages of which something may be seen are numbers throughout.
    """

    def __init__(self, lengths: list[int], oldest: list[int], entries: int, window: int, kv_heads: int = 8, page: int = PAGE,
                 fresh: int = 0, whole: bool = False) -> None:
        slots = entries * page
        pages = 1 + len(lengths) * entries
        shuffled = torch.randperm(pages - 1, device="cuda")[: len(lengths) * entries] + 1
        self.table = shuffled.reshape(-1, entries).int()
        newest = torch.tensor(lengths, device="cuda")[:, None] - 1
        position = newest - (newest - torch.arange(slots, device="cuda")) % slots  # of each slot, [S, slots]
        first = torch.tensor(oldest, device="cuda")[:, None] - (window - 1) if window else torch.zeros_like(newest)
        live = (position >= 0) & (position >= first) & (position <= newest - fresh)
        if whole:
            live = live.unflatten(1, (-1, page)).any(2, keepdim=True).expand(-1, -1, page).flatten(1)
        at = torch.zeros(pages, page, dtype=torch.bool, device="cuda")
        at[self.table.long()] = live.reshape(len(lengths), entries, page)
        values = torch.randn(pages, 2, kv_heads, page, DIM, device="cuda").bfloat16()
        self.live = at[:, None, None, :, None]
        self.cache = torch.where(self.live, values, float("nan"))
        self.clean = torch.where(self.live, values, 0.0).float()

    def check_stored(self, got: Tensor, expected: Tensor, count: int) -> None:
        """`count` slots were written, as in the twin's cache; nothing else was, page 0 (padding's) included."""
        written = ~torch.isnan(got).any((1, 2, 4)) & ~self.live[:, 0, 0, :, 0]
        assert int(written.sum()) == count
        assert torch.equal(torch.where(self.live, got, 0.0), torch.where(self.live, self.cache, 0.0))
        where = written[:, None, None, :, None]
        assert count == 0 or error(torch.where(where, got, 0.0), torch.where(where, expected, 0.0)) < 5e-3


def turns(tokens: int) -> Tensor:
    """cos_sin [T, 2, D/2] of random angles, scaled as YaRN does."""
    angle = torch.rand(tokens, DIM // 2, device="cuda") * 6.3
    return 1.3 * torch.stack((angle.cos(), angle.sin()), 1)


def check_decode(positions: list[int], window: int, *, entries: int = 0, padding: int = 0, heads: int = 64,
                 kv_heads: int = 8, page: int = PAGE, want: str = "sm90_attention_decode") -> None:
    device()
    lengths = [p + 1 for p in positions]
    entries = entries or (-(-(WINDOW + 32) // page) if window else max(lengths) // page + 3)
    paged = Paged(lengths, positions, entries, window, kv_heads, page, fresh=1)
    tokens, sequences = len(positions) + padding, [*range(len(positions)), *[len(positions) - 1] * padding]
    arguments = {
        "qkv": torch.randn(tokens, (heads + 2 * kv_heads) * DIM, device="cuda").bfloat16(), "cos_sin": turns(tokens),
        "cache": paged.cache.clone(),
        "table": torch.cat((paged.table, torch.zeros(padding, entries, dtype=torch.int32, device="cuda"))),
        "sequences": torch.tensor(sequences, dtype=torch.int32, device="cuda"),
        "positions": torch.tensor([*positions, *[-1] * padding], dtype=torch.int32, device="cuda"),
        "sinks": torch.randn(heads, device="cuda").bfloat16(), "window": window, "scale": DIM**-0.5}
    got, stored = run_kernel("rope_kv_attention", arguments, want)
    floats = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in arguments.items()}
    expected, expected_stored = rope_kv_attention(**{**floats, "cache": paged.clean})
    assert error(got[: len(positions)], expected[: len(positions)]) < 5e-3
    assert torch.isfinite(got).all()
    paged.check_stored(stored, expected_stored, len(positions))


EDGES = [0, 1, 15, 16, 17, 126, 127, 128, 129, 130, 1023, 1024, 1025, 5000]


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("position", EDGES)
def test_decode_one_token(position: int, window: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_decode([position], window)


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("tokens", [2, 3, 7, 16, 32])
def test_decode_many_tokens(tokens: int, window: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_decode([EDGES[int(i)] for i in torch.randint(len(EDGES), (tokens,))], window, padding=tokens % 4)


def test_decode_long(seed: int) -> None:
    """Several lots of 32 blocks of keys for every warp, of several blocks and of one."""
    torch.manual_seed(seed)
    check_decode([50_003], 0, entries=8192)
    check_decode([9_000, 33, 17_000, 12_345] * 5, 0)


def test_decode_padding_alone(seed: int) -> None:
    torch.manual_seed(seed)
    check_decode([3], 0, padding=5)
    check_decode([200], WINDOW, padding=1)


@pytest.mark.parametrize(("heads", "kv_heads", "page"), [(8, 2, 16), (3, 3, 32), (14, 2, 64), (64, 8, 128)])
def test_decode_other_shapes(heads: int, kv_heads: int, page: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_decode([777, 40, 129], 0, heads=heads, kv_heads=kv_heads, page=page)
    check_decode([777, 40, 129], WINDOW, heads=heads, kv_heads=kv_heads, page=page, padding=1)
    check_decode([333, 5], 40, heads=heads, kv_heads=kv_heads, page=page, entries=max(2, 64 // page))


def test_decode_full_ring(seed: int) -> None:
    """The table's capacity is what a query sees: the oldest block of keys shares its page with the newest."""
    torch.manual_seed(seed)
    check_decode([1000, 1007, 1008, 639, 640], 0, entries=40)
    check_decode([1000, 127, 128], WINDOW, entries=8)


def check_extend(chunks: list[tuple[int, int]], window: int, *, padding: int = 0, heads: int = 64, kv_heads: int = 8,
                 page: int = PAGE, want: str = "sm90_attention_extend", whole: bool = False) -> None:
    """chunks: (tokens that are in the cache already, tokens of this step) of each sequence."""
    device()
    positions = [p for before, count in chunks for p in range(before, before + count)]
    sequences = [s for s, (_, count) in enumerate(chunks) for _ in range(count)]
    tokens, lengths = len(positions) + padding, [before + count for before, count in chunks]
    entries = -(-(WINDOW + tokens) // page) + 1 if window else max(lengths) // page + 2
    paged = Paged(lengths, [before for before, _ in chunks], entries, window, kv_heads, page, whole=whole)
    arguments = {
        "q": torch.randn(tokens, heads, DIM, device="cuda").bfloat16() * 2, "cache": paged.cache, "table": paged.table,
        "sequences": torch.tensor([*sequences, *[sequences[-1]] * padding], dtype=torch.int32, device="cuda"),
        "positions": torch.tensor([*positions, *[-1] * padding], dtype=torch.int32, device="cuda"),
        "sinks": torch.randn(heads, device="cuda").bfloat16(), "window": window, "scale": DIM**-0.5}
    (got,) = run_kernel("attention", arguments, want)
    assert torch.isfinite(got).all()
    at = 0
    for s, (before, count) in enumerate(chunks):
        expected = attention(arguments["q"][at:at + count].float(), paged.clean, paged.table[s:s + 1],
                             torch.zeros(count, dtype=torch.int32, device="cuda"),
                             torch.arange(before, before + count, dtype=torch.int32, device="cuda"),
                             arguments["sinks"].float(), window, DIM**-0.5)
        for token in {0, count // 2, count - 1}:
            assert error(got[at + token], expected[token]) < 1e-2, f"token {token} of chunk {s}"
        assert error(got[at:at + count], expected) < 5e-3, f"chunk {s}"
        at += count


@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 23, 24, 25, 63, 64, 129, 1000])
def test_extend_a_prompt(tokens: int, window: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_extend([(0, tokens)], window)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_extend_mixed_chunks(window: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_extend([(0, 1), (5, 40), (1000, 1), (126, 5), (1023, 130), (4990, 24), (127, 1), (0, 49)], window, padding=30)
    check_extend([(EDGES[int(i)], int(n)) for i, n in zip(torch.randint(len(EDGES), (40,)), torch.randint(1, 90, (40,)),
                                                          strict=True)], window, padding=int(torch.randint(70, ())))


@pytest.mark.parametrize("window", [0, WINDOW])
def test_extend_late_chunk(window: int, seed: int) -> None:
    torch.manual_seed(seed)
    check_extend([(6001, 700)], window, padding=3)
    check_extend([(100, 3), (5000, 1)], window, padding=1)


@pytest.mark.parametrize("window", [0, WINDOW])
def test_extend_other_tilings(window: int, seed: int) -> None:
    """All that the tuner may choose."""
    torch.manual_seed(seed)
    chunks = [(0, 1), (5, 40), (1000, 30), (126, 5), (3000, 129), (0, 49)]
    with trying({}) as seen:
        check_extend(chunks, window, padding=3)
    ((name, choice),) = ((name, choice) for name, choice in seen.items() if name[0] == "attention_extend")
    for candidate in choice.candidates[1:]:
        with trying({name: candidate}):
            check_extend(chunks, window, padding=3)


@pytest.mark.parametrize("page", [32, 128])
def test_extend_other_shapes(page: int, seed: int) -> None:
    torch.manual_seed(seed)
    for window in (0, 40, WINDOW):
        check_extend([(77, 150), (3, 1), (300, 26)], window, heads=16, kv_heads=2, page=page)
