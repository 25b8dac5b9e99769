"""The sampler against a plain reference, its distribution and its determinism."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gptoss_compile.runtime.request import Request
from gptoss_compile.runtime.sampler import LogitsError, Sampler, draw, uniform
from gptoss_compile.runtime.sampling_params import RequestError, SamplingParams


def request(
    params: SamplingParams, generated: tuple[int, ...] = (), seed: int = 0, stop: tuple[int, ...] = ()
) -> Request:
    return Request("r", [1, 2, *generated], 2, params, 100, seed, frozenset(stop), (0, 0))


def fresh_rng() -> np.random.Generator:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def reference(logits: list[float], params: SamplingParams, generated: tuple[int, ...]) -> dict[int, float]:
    """Token -> probability, in plain Python: penalties, temperature, top_k, min_p, top_p."""
    scores = {i: x + params.logit_bias.get(i, 0.0) for i, x in enumerate(logits)}
    for token, count in Counter(generated).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    scores = {i: x / params.temperature for i, x in scores.items()}
    order = sorted(scores, key=lambda i: -scores[i])
    kept = order[: params.top_k] if params.top_k > 0 else order
    weight = {i: np.exp(scores[i] - scores[order[0]]) for i in kept}
    weight = {i: w for i, w in weight.items() if w >= params.min_p}
    total, nucleus, running = sum(weight.values()), {}, 0.0
    for i in weight:  # still likeliest first
        nucleus[i] = weight[i]
        running += weight[i]
        if params.top_p < 1 and running >= params.top_p * total:
            break
    total = sum(nucleus.values())
    return {i: w / total for i, w in nucleus.items()}


def random_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0.2, 0.7, 1.0, 2.0])), top_p=float(rng.choice([1.0, 0.95, 0.5, 0.05])),
        top_k=int(rng.choice([-1, 0, 1, 5, 40, 10_000])), min_p=float(rng.choice([0.0, 0.01, 0.3])),
        presence_penalty=float(rng.choice([0.0, 1.5, -1.0])), frequency_penalty=float(rng.choice([0.0, 0.5])),
        logit_bias={3: 2.0, 7: -100.0} if rng.random() < 0.3 else {})


def test_quantiles_are_those_of_the_reference() -> None:
    """At every u the id is the one where the reference's running sum, in order of ids, passes u."""
    rng = fresh_rng()
    for _ in range(150):
        size = int(rng.choice([8, 97, 600, 1500]))
        logits = (rng.normal(size=size) * rng.choice([0.5, 3, 10])).astype(np.float32)
        params, generated = random_params(rng), tuple(int(i) for i in rng.integers(0, size, 6))
        wanted = reference([float(x) for x in logits], params, generated)
        ids = np.array(sorted(wanted))
        edges = np.concatenate([[0.0], np.cumsum([wanted[i] for i in ids])])
        sampler = Sampler(size)
        scores = sampler._edited(logits, request(params, generated))
        for u in (0.0, 1 - 2**-53, *rng.random(5)):
            got = draw(scores, float(scores.max()), params, float(u))
            at = int(np.flatnonzero(ids == got)[0]) if got in wanted else -1
            assert at >= 0, f"{got} is outside the reference's set; {params}"
            assert edges[at] - 1e-5 <= u <= edges[at + 1] + 1e-5, params


def test_drawn_tokens_follow_the_distribution() -> None:
    """Chi-square over 20,000 seeds, and over 20,000 positions of one seed; 6 sigma."""
    rng = fresh_rng()
    logits = rng.normal(size=12).astype(np.float32)
    params = SamplingParams(temperature=0.8)
    wanted = reference([float(x) for x in logits], params, ())
    base = int(rng.integers(2**40))
    for numbers in ([(base + i, 0) for i in range(20_000)], [(base, i) for i in range(20_000)]):
        counts = Counter(draw(logits, float(logits.max()), params, uniform(*n)) for n in numbers)
        chi = sum((counts[i] - 20_000 * p) ** 2 / (20_000 * p) for i, p in wanted.items())
        assert chi < 11 + 6 * np.sqrt(2 * 11), f"chi-square {chi:.1f} with 11 degrees of freedom"


def test_seed_and_position_alone_decide_and_negative_seeds_work() -> None:
    logits = fresh_rng().normal(size=1000).astype(np.float32)
    sampler, params = Sampler(1000), SamplingParams()
    drawn = [
        sampler.sample(logits, request(params, (5,) * n, seed=s))
        for s in (-3, 0, 2**64 - 1)
        for n in range(20)
    ]
    assert drawn == [sampler.sample(logits.copy(), request(params, (5,) * n, seed=s))
                     for s in (-3, 0, 2**64 - 1) for n in range(20)]
    assert len(set(drawn)) > 40
    assert uniform(-3, 1) == uniform(2**64 - 3, 1) != uniform(3, 1)


def test_greedy_ties_limits_and_masks() -> None:
    logits = np.zeros(50, np.float32)
    logits[[7, 9, 49]] = 3, 3, 8
    greedy = SamplingParams(temperature=0)
    assert Sampler(50).sample(logits, request(greedy)) == 49
    assert Sampler(49).sample(logits, request(greedy)) == 7, (
        "ids from the limit on are never chosen, ties go low"
    )
    drawn = {Sampler(49).sample(logits, request(SamplingParams(temperature=5.0), seed=s)) for s in range(300)}
    assert 49 not in drawn and len(drawn) > 20
    stop = request(replace(greedy, min_tokens=1), stop=(7, 200002))
    assert Sampler(49).sample(logits, stop) == 9
    assert logits[7] == 3, "the executor's logits stay as they are"
    assert Sampler(49).sample(logits, request(replace(greedy, min_tokens=1), (1,), stop=(7,))) == 7


def test_tiny_temperatures_and_far_logits_stay_finite() -> None:
    logits = np.array([0, 1e4, -1e4, 9999], np.float32)
    for params in (
        SamplingParams(temperature=1e-4),
        SamplingParams(temperature=1e-9),
        SamplingParams(top_p=1e-6),
    ):
        with np.errstate(all="raise", under="ignore"):
            assert Sampler(4).sample(logits, request(params)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_allow_no_choice(bad: float) -> None:
    logits = np.full(10, bad if bad < 0 else 0.0, np.float32)
    logits[4] = bad
    for params in (SamplingParams(), SamplingParams(temperature=0)):
        with pytest.raises(LogitsError, match="largest logit"):
            Sampler(10).sample(logits, request(params))
    with pytest.raises(LogitsError, match="largest logit"):
        Sampler(10).logprobs(logits, 0, 1)


def test_logprobs_are_the_log_softmax() -> None:
    rng = fresh_rng()
    logits = (rng.normal(size=3000) * 5).astype(np.float32)
    logits[100] = logits[50] = logits.max() + 1  # a tie at the top
    exact = logits.astype(np.float64)
    exact = exact - exact.max()
    exact -= np.log(np.exp(exact).sum())
    got = Sampler(3000).logprobs(logits, 17, 5)
    assert got.token_id == 17 and got.logprob == pytest.approx(exact[17], abs=1e-5)
    order = sorted(range(3000), key=lambda i: (-exact[i], i))[:5]
    assert [i for i, _ in got.top] == order and order[:2] == [50, 100]
    assert [x for _, x in got.top] == pytest.approx([exact[i] for i in order], abs=1e-5)
    assert Sampler(3000).logprobs(logits, 17, 0).top == ()
    limited = Sampler(60).logprobs(logits, 17, 3)
    assert all(i < 60 for i, _ in limited.top) and limited.logprob == got.logprob
    assert len(Sampler(4).logprobs(logits, 17, 20).top) == 4


@pytest.mark.parametrize(("options", "field", "message"), [
    ({"temperature": -1}, "temperature", "finite number of at least 0, found -1"),
    ({"temperature": float("nan")}, "temperature", "found nan"),
    ({"temperature": "hot"}, "temperature", "found 'hot'"),
    ({"top_p": 0}, "top_p", "use temperature 0"),
    ({"top_p": 1.1}, "top_p", r"in \[0, 1\], found 1.1"),
    ({"top_k": -2}, "top_k", "integer of at least -1"),
    ({"top_k": 1.5}, "top_k", "found 1.5"),
    ({"min_p": 2}, "min_p", r"in \[0, 1\]"),
    ({"presence_penalty": 3}, "presence_penalty", r"in \[-2, 2\]"),
    ({"frequency_penalty": -3}, "frequency_penalty", r"in \[-2, 2\]"),
    ({"seed": 2**64}, "seed", "integer in"),
    ({"seed": True}, "seed", "found True"),
    ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ({"min_tokens": 17}, "min_tokens", r"17 exceeds max_tokens \(16\)"),
    ({"logprobs": -1}, "logprobs", "at least 0"),
    ({"prompt_logprobs": "2"}, "prompt_logprobs", "found '2'"),
    ({"stop_token_ids": [-4]}, "stop_token_ids", "found -4"),
    ({"stop_token_ids": 4}, "stop_token_ids", "wrong type"),
    ({"logit_bias": {3: 101}}, "logit_bias", r"token 3.s must be in \[-100, 100\]"),
    ({"logit_bias": {"3": 1}}, "logit_bias", "found '3'"),
    ({"ignore_eos": 1}, "ignore_eos", "true or false"),
])
def test_parameters_are_checked_by_name(options: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(**options)
    assert caught.value.field == field and str(caught.value).startswith(field)


def test_parameters_are_values() -> None:
    params = SamplingParams(stop_token_ids=[1, 2], logit_bias={1: 1})  # type: ignore[arg-type]
    assert params.stop_token_ids == (1, 2) and params == SamplingParams(
        stop_token_ids=(1, 2), logit_bias={1: 1.0}
    )
    assert SamplingParams(temperature=0).greedy and not SamplingParams().greedy
