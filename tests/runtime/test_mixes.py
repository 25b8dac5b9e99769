"""Random mixes of requests on the checking executor: each answer equals its run alone, and every page comes
back."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import pytest
from fake_executor import FakeExecutor

from gptoss_compile.config import Bucket
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.outputs import RequestOutput
from gptoss_compile.runtime.sampling_params import SamplingParams

Prompt = list[int]
BUCKETS = {
    "several": (*(Bucket.decode(n) for n in (1, 4, 16)), Bucket.extend(32, 8), Bucket.extend(256, 16)),
    "one sequence a prompt step": (Bucket.decode(8), Bucket.extend(64, 1)),
    "wider decode than extend": (Bucket.decode(16), Bucket("extend", 128, 3, 5)),
}
AHEAD = pytest.mark.parametrize("ahead", [False, True], ids=["", "ahead"])


def random_params(rng: random.Random) -> SamplingParams:
    params = SamplingParams(temperature=0, max_tokens=rng.choice((1, 2, 17, 60, 150)))
    chance = rng.random()
    if chance < 0.3:
        params = replace(params, temperature=rng.uniform(0.3, 2), seed=rng.randrange(2**64))
    elif chance < 0.5:
        params = replace(
            params,
            temperature=rng.uniform(0.3, 2),
            top_p=rng.choice((1.0, 0.9)),
            seed=rng.randrange(2**32),
            top_k=rng.choice((0, 10)),
            min_p=rng.choice((0.0, 0.05)),
            logprobs=rng.choice((None, 0, 3)),
            presence_penalty=rng.choice((0.0, 0.7)),
            frequency_penalty=rng.choice((0.0, 0.3)),
        )
    if rng.random() < 0.2:
        params = replace(params, prompt_logprobs=rng.choice((0, 2)), max_tokens=rng.choice((0, 5)))
    if rng.random() < 0.2:
        params = replace(params, ignore_eos=True, min_tokens=rng.randrange(params.max_tokens + 1))  # type: ignore
    return params


def random_prompts(rng: random.Random, count: int, longest: int) -> list[Prompt]:
    """Fresh prompts, continuations of earlier ones, and repetitions; often around the window's edge."""
    prompts: list[Prompt] = []
    for _ in range(count):
        length = rng.choice(
            (rng.randint(1, longest), rng.randint(1, 40), rng.randint(120, 140), 16 * rng.randint(1, 9))
        )
        prompt = [rng.randrange(95) for _ in range(min(length, longest))]
        if prompts and rng.random() < 0.4:
            shared = rng.choice(prompts)
            shared = shared[: rng.choice((len(shared), rng.randint(1, len(shared))))]
            prompt = (shared + prompt)[: rng.choice((longest, len(shared)))]
        prompts.append(prompt)
    return prompts


def alone(prompts: list[Prompt], params: list[SamplingParams]) -> list[RequestOutput]:
    engine = Engine(FakeExecutor(buckets=(Bucket.decode(1), Bucket.extend(512, 1))), max_num_seqs=1,
                    max_num_batched_tokens=512, enable_prefix_caching=False)
    engine.start()
    answers = [engine.submit(prompt, p).result() for prompt, p in zip(prompts, params, strict=True)]
    engine.shutdown()
    return answers


def answer(output: RequestOutput) -> object:
    return output._replace(request_id="", cached_tokens=0)


@pytest.mark.parametrize(("buckets", "ahead"), [("several", False), *((buckets, True) for buckets in BUCKETS)])
@pytest.mark.parametrize("pages", ["plenty", "tenth", "barely one"])
def test_every_answer_equals_its_run_alone(buckets: str, pages: str, ahead: bool) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    longest = 2000 if pages != "barely one" else 500
    prompts = random_prompts(rng, 40, longest)
    params = [random_params(rng) for _ in prompts]
    expected = alone(prompts, params)
    demand = sum(len(p) + len(e.token_ids) for p, e in zip(prompts, expected, strict=True)) // 16
    window_pages = {"plenty": 2000, "tenth": 40, "barely one": 10}[pages]
    num_pages = {
        "plenty": 4000,
        "tenth": max(demand // 10, 140),
        "barely one": 1 + -(-(longest + 150) // 16),
    }[pages]
    executor = FakeExecutor(buckets=BUCKETS[buckets], num_pages=num_pages, num_window_pages=window_pages, ahead=ahead)
    engine = Engine(executor, max_num_seqs=16, max_num_batched_tokens=rng.choice((40, 256)),
                    enable_prefix_caching=rng.random() < 0.8)
    engine.start()
    handles = []
    for prompt, p in zip(prompts, params, strict=True):
        handles.append(engine.submit(prompt, p, priority=rng.choice((0, 0, 1, -1))))
        time.sleep(rng.choice((0, 0, 0.002)))
    aborted = {i for i in range(len(handles)) if rng.random() < 0.2}
    for i in aborted:
        handles[i].abort()
        time.sleep(rng.choice((0, 0.003)))
    for i, (handle, want) in enumerate(zip(handles, expected, strict=True)):
        got = handle.result()
        if i in aborted and got.finish_reason == "abort":
            assert got.token_ids == want.token_ids[: len(got.token_ids)]
        else:
            assert answer(got) == answer(want), f"request {i}: {len(prompts[i])} tokens, {params[i]}"
    stats = engine.stats()
    assert stats.requests_running == stats.requests_waiting == stats.kv_pages_held == 0
    assert stats.kv_pages_cached + stats.kv_pages_free == executor.num_pages + executor.num_window_pages - 2
    print(stats)
    engine.shutdown()
    assert executor.closed


@AHEAD
@pytest.mark.parametrize("extras", [{}, {"presence_penalty": 0.5, "logprobs": 1}], ids=["device", "host"])
def test_preemption_happens_and_is_invisible(extras: dict[str, Any], ahead: bool) -> None:
    """Six answers that together outgrow the pages, of which prompts alone would all fit."""
    rng = random.Random(7)
    prompts = [[rng.randrange(95) for _ in range(60)] for _ in range(6)]
    params = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=200, ignore_eos=True, **extras)
        for i in range(6)
    ]
    expected = alone(prompts, params)
    for caching in (True, False):
        engine = Engine(
            FakeExecutor(num_pages=51, num_window_pages=200, ahead=ahead),
            max_num_seqs=8,
            max_num_batched_tokens=256,
            enable_prefix_caching=caching,
        )
        engine.start()
        handles = [engine.submit(p, q) for p, q in zip(prompts, params, strict=True)]
        assert [answer(h.result()) for h in handles] == [answer(e) for e in expected]
        assert engine.stats().preemptions > 0
        assert engine.stats().prompt_tokens == 360 and engine.stats().generation_tokens == 1200
        engine.shutdown()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 128, 129, 143, 144, 145, 255, 256, 257])
@pytest.mark.parametrize("chunk", [16, 127, 128, 129])
def test_chunk_edges(length: int, chunk: int) -> None:
    """Prompts, some scored, cut into chunks of a fixed size, around the window's and the pages' edges, read as in one
    piece."""
    prompt = [(i * 31 + length) % 95 for i in range(length)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, prompt_logprobs=(None, 1)[length // 2 % 2])
    executor = FakeExecutor(ahead=True, buckets=(Bucket.decode(1), Bucket("extend", 256, 2, 256)))
    engine = Engine(executor, max_num_seqs=1, max_num_batched_tokens=chunk)
    engine.start()
    got, again = engine.submit(prompt, params).result(), engine.submit(prompt, params).result()
    assert answer(got) == answer(alone([prompt], [params])[0]) == answer(again)
    assert all(tokens <= chunk for _, tokens in executor.ran)
    engine.shutdown()
