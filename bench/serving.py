"""Load on a running server: latency and throughput of streamed completions of random tokens.

    python bench/serving.py --base-url http://127.0.0.1:8000 --profile 1k1k --max-concurrency 64 --num-prompts 320
    python bench/serving.py --base-url http://127.0.0.1:8000 --smoke

Prompts are random token ids; input and output lengths are uniform between range ratio times the length and the length,
and answers go on to theirs (ignore_eos). The profiles 1k1k, 8k1k and 1k8k are those of the public InferenceX runs. Requests
arrive at --request-rate a second (gamma distributed with --burstiness; 1: Poisson), or all at once, but never more than
--max-concurrency at a time. It only sends requests: the server needs no preparation. Prints a table, then one JSON line
with the field names that `vllm bench serve` writes. Ends with 1 if a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

PROFILES = {"1k1k": (1024, 1024), "8k1k": (8192, 1024), "1k8k": (1024, 8192)}
SMOKE = {"num_prompts": 8, "max_concurrency": 4, "random_input_len": 64, "random_output_len": 16}
TEXT_TOKENS = 199_998  # ids of o200k_harmony that stand for text
PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Job:
    prompt: list[int]
    output_len: int


@dataclass
class Answer:
    """One request as the client saw it; times in seconds, `started` on the clock of the run."""

    job: Job
    started: float
    first: float = 0.0
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)
    tokens: int = 0
    error: str | None = None


def main() -> int:
    options = _options()
    return asyncio.run(_bench(options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="of the server, without /v1")
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--model", help="name to ask for (default: the first that the server has)")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument("--request-rate", type=float, default=math.inf, help="requests a second (default: all at once)")
    parser.add_argument("--burstiness", type=float, default=1.0)
    parser.add_argument("--max-concurrency", type=int, help="most requests at a time (default: no limit)")
    parser.add_argument("--profile", choices=PROFILES, help="sets the two lengths")
    parser.add_argument("--random-input-len", type=int, default=1024)
    parser.add_argument("--random-output-len", type=int, default=128)
    parser.add_argument("--random-range-ratio", type=float, default=0.8)
    parser.add_argument("--vocab-size", type=int, default=TEXT_TOKENS, help="prompts hold ids below this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--label", help="repeated in the JSON line")
    parser.add_argument("--smoke", action="store_true", help="a size for the demo on a CPU")
    options = parser.parse_args()
    if options.profile:
        options.random_input_len, options.random_output_len = PROFILES[options.profile]
    if options.smoke:
        vars(options).update(SMOKE)
    return options


def make_jobs(options: argparse.Namespace) -> list[Job]:
    rng = np.random.default_rng(options.seed)

    def lengths(longest: int) -> list[int]:
        shortest = max(int(longest * options.random_range_ratio), 1)
        return [int(n) for n in rng.integers(shortest, longest + 1, options.num_prompts)]

    inputs, outputs = lengths(options.random_input_len), lengths(options.random_output_len)
    return [Job(rng.integers(0, options.vocab_size, n).tolist(), m) for n, m in zip(inputs, outputs, strict=True)]


async def _bench(options: argparse.Namespace) -> int:
    base, headers = options.base_url.rstrip("/") + "/v1/", {"Authorization": f"Bearer {options.api_key}"}
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(base, connector=connector, timeout=timeout, headers=headers) as client:
        try:
            model = options.model or await _first_model(client)
            warm = await _ask(client, model, Job([1, 2, 3], 2), time.perf_counter())
        except (aiohttp.ClientError, ValueError, LookupError) as error:
            warm = Answer(Job([], 0), 0, error=str(error))
        if warm.error:
            print(f"serving: error: {options.base_url}: {warm.error}", file=sys.stderr)
            return 2
        jobs = make_jobs(options)
        start = time.perf_counter()
        answers = await _run(client, model, jobs, options, start)
        duration = time.perf_counter() - start
    report = summarise(answers, duration, options, model)
    _print(report)
    print(json.dumps(report))
    for answer in [answer for answer in answers if answer.error][:3]:
        print(f"serving: failed: {answer.error}", file=sys.stderr)
    return 1 if report["failed"] else 0


async def _first_model(client: aiohttp.ClientSession) -> str:
    async with client.get("models", raise_for_status=True) as response:
        return str((await response.json())["data"][0]["id"])


async def _run(client: aiohttp.ClientSession, model: str, jobs: Sequence[Job], options: argparse.Namespace,
               start: float) -> list[Answer]:
    room = asyncio.Semaphore(options.max_concurrency or len(jobs))

    async def one(job: Job) -> Answer:
        async with room:
            return await _ask(client, model, job, start)

    tasks = [asyncio.create_task(one(job)) async for job in _arrivals(jobs, options)]
    return await asyncio.gather(*tasks)


async def _arrivals(jobs: Sequence[Job], options: argparse.Namespace) -> AsyncIterator[Job]:
    """The jobs, each at its time."""
    rng = np.random.default_rng(options.seed + 1)
    due = time.perf_counter()
    for job in jobs:
        yield job
        if math.isfinite(options.request_rate):
            due += rng.gamma(options.burstiness, 1 / (options.request_rate * options.burstiness))
            await asyncio.sleep(max(due - time.perf_counter(), 0))


async def _ask(client: aiohttp.ClientSession, model: str, job: Job, start: float) -> Answer:
    """Failures are told in the answer."""
    answer = Answer(job, time.perf_counter() - start)
    body = {"model": model, "prompt": job.prompt, "max_tokens": job.output_len, "temperature": 1.0, "ignore_eos": True,
            "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.post("completions", json=body) as response:
            if response.status != 200:
                answer.error = f"{response.status} {await response.text()}"
                return answer
            async for line in response.content:
                if line.startswith(b"data: {"):
                    _take(answer, json.loads(line[6:]), time.perf_counter() - start)
    except (aiohttp.ClientError, ValueError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    if not answer.tokens and not answer.error:
        answer.error = "the stream ended before it told its usage"
    return answer


def _take(answer: Answer, event: dict[str, Any], now: float) -> None:
    if "error" in event:
        answer.error = json.dumps(event["error"])
    if event.get("usage"):
        answer.tokens = event["usage"]["completion_tokens"]
    if event.get("choices"):
        _count(answer, now)


def _count(answer: Answer, now: float) -> None:
    if answer.chunks:
        answer.gaps.append(now - answer.chunks[-1])
    else:
        answer.first = now
    answer.chunks.append(now)
    answer.ended = now


def summarise(answers: Sequence[Answer], duration: float, options: argparse.Namespace, model: str) -> dict[str, Any]:
    good = [answer for answer in answers if not answer.error]
    inputs, outputs = sum(len(a.job.prompt) for a in good), sum(a.tokens for a in good)
    tpot = [(a.ended - a.first) / (a.tokens - 1) for a in good if a.tokens > 1]
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "backend": "openai",
        "label": options.label,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(answers),
        "request_rate": options.request_rate if math.isfinite(options.request_rate) else "inf",
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
        "duration": duration,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "request_goodput": None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "latencies": [a.ended - a.started for a in good],
        "queue_times": [],
        "max_output_tokens_per_s": _peak_tokens(good),
        "max_concurrent_requests": _peak_requests(good),
        "rtfx": 0.0,
        **_statistics("ttft", [a.first - a.started for a in good]),
        **_statistics("tpot", tpot),
        **_statistics("itl", [gap for a in good for gap in a.gaps]),
        **_statistics("e2el", [a.ended - a.started for a in good]),
    }


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float]:
    values = np.asarray(seconds or [0.0]) * 1e3
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        **{f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES},
    }


def _peak_tokens(answers: Sequence[Answer]) -> float:
    """Tokens of the busiest second; a chunk that holds several counts for its share of the answer."""
    seconds: dict[int, float] = {}
    for answer in answers:
        for moment in answer.chunks:
            seconds[int(moment)] = seconds.get(int(moment), 0.0) + answer.tokens / len(answer.chunks)
    return max(seconds.values(), default=0.0)


def _peak_requests(answers: Sequence[Answer]) -> int:
    steps = sorted([(a.started, 1) for a in answers] + [(a.ended, -1) for a in answers])
    return int(max(np.cumsum([step for _, step in steps]), default=0)) if steps else 0


def _print(report: dict[str, Any]) -> None:
    print(f"{report['model_id']}: {report['completed']} requests in {report['duration']:.2f} s, {report['failed']} failed")
    for name in ("request_throughput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s"):
        print(f"{name.replace('_', ' '):28}{report[name]:12.2f} /s".replace("per s", "    "))
    columns = ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES[1:]))
    print(f"{'ms':8}" + "".join(f"{column:>11}" for column in columns))
    for name in ("ttft", "tpot", "itl", "e2el"):
        print(f"{name:8}" + "".join(f"{report[f'{column}_{name}_ms']:11.2f}" for column in columns))


if __name__ == "__main__":
    sys.exit(main())
