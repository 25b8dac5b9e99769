"""Time to choose one token from a full vocabulary, by what the request asks for.

    python bench/sampler.py [--repeats 50]

Prints a table, then one JSON line: microseconds, median and best.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from gptoss_compile.runtime.request import Request
from gptoss_compile.runtime.sampler import Sampler
from gptoss_compile.runtime.sampling_params import SamplingParams

ROWS, TOKENS = 201_088, 200_000  # logits of a row, and how many of them are tokens
CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature 1": {},
    "top_p 0.9": {"top_p": 0.9},
    "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
    "min_p 0.1": {"min_p": 0.1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50)
    repeats = parser.parse_args().repeats
    logits_V = (np.random.default_rng(0).normal(size=ROWS) * 4).astype(np.float32)
    sampler = Sampler(TOKENS)
    works: dict[str, Callable[[], object]] = {
        name: partial(sampler.sample, logits_V, _request(options)) for name, options in CASES.items()
    }
    works["20 log-probabilities"] = partial(sampler.logprobs, logits_V, 5, 20)
    results = {}
    print(f"{'':24}{'median µs':>12}{'best µs':>12}")
    for name, work in works.items():
        times = [_timed(work) for _ in range(repeats)]
        results[name] = {"median_us": round(statistics.median(times), 1), "best_us": round(min(times), 1)}
        print(f"{name:24}{results[name]['median_us']:12.1f}{results[name]['best_us']:12.1f}")
    print(json.dumps(results))


def _request(options: dict[str, Any]) -> Request:
    return Request("bench", [1, 2], 2, SamplingParams(**options), 100, 0, frozenset(), (0, 0))


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e6


if __name__ == "__main__":
    main()
