"""Device sampling's definition: its distribution, what a choice depends on, and its ends."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gptoss_compile import gumbel


def fresh_rng() -> np.random.Generator:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_choices_follow_the_distribution(temperature: float) -> None:
    """Chi-square over 20,000 seeds, over 20,000 counters of one seed, and over ids shifted in the row; 6 sigma."""
    rng = fresh_rng()
    logits = rng.normal(size=12).astype(np.float32)
    wanted = np.exp(logits / temperature)
    wanted /= wanted.sum()
    base, high = int(rng.integers(2**40)), int(rng.integers(2**31))
    for numbers in ([(base + i, 7) for i in range(20_000)], [(base, i) for i in range(20_000)],
                    [(base + (i << 32), high) for i in range(20_000)]):
        rows = np.stack([gumbel.words(temperature, 12, seed, counter) for seed, counter in numbers])
        tokens = gumbel.choose(np.broadcast_to(logits, (len(rows), 12)), rows)
        counts = np.bincount(tokens, minlength=12)
        chi = float(((counts - 20_000 * wanted) ** 2 / (20_000 * wanted)).sum())
        assert chi < 11 + 6 * np.sqrt(2 * 11), f"chi-square {chi:.1f} with 11 degrees of freedom"


def test_choices_among_a_full_vocabulary_follow_the_distribution() -> None:
    """Equal logits of 200,000 ids but one with half of the mass: its share, and the others' spread and independence."""
    rng, size = fresh_rng(), 200_000
    logits = np.zeros((1, size), np.float32)
    logits[0, 777] = np.log(size - 1)
    base = int(rng.integers(2**60))
    tokens = np.array([gumbel.choose(logits, gumbel.words(1, size, base + i, i)[None])[0] for i in range(600)])
    assert abs((tokens == 777).mean() - 0.5) < 6 * 0.5 / np.sqrt(600)
    others = tokens[tokens != 777] / size
    assert abs(others.mean() - 0.5) < 6 * np.sqrt(1 / 12 / len(others)) and len(set(others)) > 0.98 * len(others)


def test_noise_is_gumbel_to_its_ends() -> None:
    """Kolmogorov-Smirnov against exp(-exp(-x)), and the largest of two million lies where it must."""
    rng, size = fresh_rng(), 1 << 21
    x = np.sort(gumbel.noise(size, int(rng.integers(2**32)), int(rng.integers(2**32)), int(rng.integers(2**17))))
    distance = np.abs(np.exp(-np.exp(-x.astype(np.float64))) - (np.arange(size) + 0.5) / size).max()
    assert distance < 2.5 / np.sqrt(size) and np.isfinite(x).all()
    assert abs(x[-1] - np.log(size)) < 16 and len(np.unique(x[-1000:])) > 990


def test_a_choice_depends_on_its_own_row_alone() -> None:
    rng = fresh_rng()
    logits = rng.normal(size=(9, 500)).astype(np.float32)
    rows = np.stack([gumbel.words(t, 500, s, 3) for t, s in zip([0, 1, 1, 2, -1, 0.3, 1, 1, 1], range(-4, 5), strict=True)])
    tokens, order = gumbel.choose(logits, rows), rng.permutation(9)
    assert gumbel.choose(logits[order], rows[order]).tolist() == tokens[order].tolist()
    assert [int(gumbel.choose(logits[i : i + 1], rows[i : i + 1])[0]) for i in range(9)] == tokens.tolist()
    assert gumbel.words(1, 5, -3).tolist() == gumbel.words(1, 5, 2**64 - 3).tolist() != gumbel.words(1, 5, 3).tolist()


def test_greedy_tiny_and_huge_temperatures() -> None:
    logits = np.array([[0, 2, -2, 2, 4]], np.float32)
    assert gumbel.choose(logits, gumbel.words(0, 4, 1)[None]) == [1], "ties go low, ids from the limit on do not count"
    assert set(gumbel.choose(np.repeat(logits, 50, 0), np.stack([gumbel.words(1e-5, 4, i) for i in range(50)]))) == {1, 3}
    assert len(set(gumbel.choose(np.repeat(logits, 99, 0), np.stack([gumbel.words(1e300, 5, i) for i in range(99)])))) == 5
    assert gumbel.choose(logits, gumbel.NOTHING[None]) == [gumbel.NO_TOKEN]
