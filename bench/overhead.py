"""What the API costs: throughput of one engine, asked directly and through HTTP, in turns in one process.

    python bench/overhead.py ARTIFACT [--streams 32] [--rounds 3]

Both ways run the same random prompts, `--streams` at a time; through HTTP they are streamed completions, asked for by
bench/serving.py in a process of its own. Prints a table, then one JSON line. `overhead` is what HTTP costs in throughput,
1 - HTTP / direct, and `cpu_overhead` what it costs this process in CPU time for each token, HTTP / direct - 1, which other
work on the machine disturbs less; both of the medians.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from serving import Job, make_jobs

from gptoss_compile.artifact import Artifact
from gptoss_compile.runtime import server
from gptoss_compile.runtime.api.options import ServerOptions
from gptoss_compile.runtime.api.tokenizer import FILE, VOCABULARY, Tokenizer
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor import load_executor
from gptoss_compile.runtime.sampling_params import SamplingParams

INPUT, RATIO = 64, 0.8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output-len", type=int, default=64)
    options = parser.parse_args()
    artifact = Artifact.open(options.artifact)
    sequences = max(bucket.sequences for bucket in artifact.buckets)
    tokenizer = Tokenizer.load(artifact.file(f"tokenizer/{FILE}").parent)
    engine = Engine(
        load_executor(artifact, num_pages=None, max_num_seqs=sequences),
        max_num_seqs=sequences,
        max_num_batched_tokens=max(bucket.tokens for bucket in artifact.buckets),
        vocab_limit=VOCABULARY,
    )
    engine.start()
    listener = server._listen("127.0.0.1", 0)
    threading.Thread(
        target=server.run, args=(engine, tokenizer, ServerOptions(), listener), daemon=True
    ).start()
    url = server._url(listener)
    rates: dict[str, list[float]] = {"direct": [], "http": []}
    costs: dict[str, list[float]] = {"direct": [], "http": []}  # CPU ms a token
    for number in range(2 * options.rounds + 2):  # the first two only warm up; the order changes from round to round
        way = ("direct", "http", "http", "direct")[number % 4]
        tokens, cpu = engine.stats().generation_tokens, time.process_time()
        rate = direct(engine, options, number) if way == "direct" else http(url, options, number)
        cost = (time.process_time() - cpu) * 1e3 / (engine.stats().generation_tokens - tokens)
        if number >= 2:
            rates[way].append(rate)
            costs[way].append(cost)
            print(f"{way:8}{rate:10.1f} tokens/s{cost:10.2f} CPU ms a token", flush=True)
    medians = {way: statistics.median(values) for way, values in rates.items()}
    cpu_ms = {way: statistics.median(values) for way, values in costs.items()}
    overhead, cpu_overhead = 1 - medians["http"] / medians["direct"], cpu_ms["http"] / cpu_ms["direct"] - 1
    print(f"overhead {100 * overhead:.1f} % of throughput, {100 * cpu_overhead:.1f} % of CPU time")
    report = {"streams": options.streams, "overhead": overhead, "cpu_overhead": cpu_overhead}
    print(json.dumps({**report, "tokens_per_s": medians, "cpu_ms_per_token": cpu_ms, "rounds": rates}))
    engine.shutdown(drain=False)
    return 0


def direct(engine: Engine, options: argparse.Namespace, seed: int) -> float:
    load = argparse.Namespace(
        seed=seed,
        random_range_ratio=RATIO,
        num_prompts=options.streams,
        random_input_len=INPUT,
        random_output_len=options.output_len,
        vocab_size=VOCABULARY,
    )

    async def ask(job: Job) -> int:
        params = SamplingParams(max_tokens=job.output_len, ignore_eos=True)
        return sum([len(output.token_ids) async for output in engine.submit(job.prompt, params)])

    async def all_jobs(jobs: list[Job]) -> int:
        return sum(await asyncio.gather(*map(ask, jobs)))

    jobs = make_jobs(load)
    start = time.perf_counter()
    tokens = asyncio.run(all_jobs(jobs))
    return tokens / (time.perf_counter() - start)


def http(url: str, options: argparse.Namespace, seed: int) -> float:
    command = [sys.executable, str(Path(__file__).with_name("serving.py")), "--base-url", url, "--seed", str(seed)]
    command += ["--num-prompts", str(options.streams), "--random-range-ratio", str(RATIO), "--vocab-size", str(VOCABULARY)]
    command += ["--random-input-len", str(INPUT), "--random-output-len", str(options.output_len)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rate: float = json.loads(done.stdout.splitlines()[-1])["output_throughput"]
    return rate


if __name__ == "__main__":
    sys.exit(main())
