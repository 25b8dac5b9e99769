"""What a decode step costs the host: scheduling, building its inputs, taking its result and delivering it.

    python bench/host.py [--batches 1,32,128] [--context 1000] [--steps 400]

The executor is a stand-in that answers at once, with page tables of GPT-OSS's full context; nothing is copied or launched.
`event loop`: with a consumer for each request in an event loop of another thread, as under the API. Prints a table, then one
JSON line: microseconds of a step that the engine's thread computes, and that it takes, medians; and the 99th percentile.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.gumbel import NO_TOKEN
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor import Floats, HostSteps, Ints
from gptoss_compile.runtime.outputs import RequestHandle
from gptoss_compile.runtime.sampling_params import SamplingParams

CONFIG = ModelConfig(
    num_layers=24, hidden=2880, intermediate=2880, num_heads=64, num_kv_heads=8, head_dim=64, num_experts=32,
    experts_per_token=4, vocab_size=201_088, sliding_window=128, windowed=(True, False) * 12)


class Stub(HostSteps):
    """Every row that asks for a token gets the same one."""

    runs_ahead = True

    def __init__(self) -> None:
        super().__init__()
        self.config, self.page_size, self.max_context = CONFIG, 16, CONFIG.max_position
        self.buckets = (*(Bucket.decode(2**n) for n in range(8)), Bucket.extend(256, 128), Bucket.extend(2048, 128))
        self.num_pages = self.num_window_pages = 128 * self.max_context // self.page_size // 4
        self.window_ring = (CONFIG.sliding_window + 2048) // self.page_size
        self._answer = np.full(128, 77, np.int32)

    def submit(self, bucket: Bucket, rows: int, columns: int) -> None:
        pass

    def result(self) -> Ints:
        return self._answer

    def logits(self, rows: Sequence[int]) -> Floats:
        raise AssertionError(f"no request here has its tokens chosen on the host, {NO_TOKEN}")

    def close(self) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 32, 128])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    rows = []
    print(f"{'batch':>6} {'event loop':>10} {'CPU us':>8} {'us':>8} {'p99 us':>8}")
    for batch in options.batches:
        for consumers in (False, True):
            cpu, median, late = measure(batch, options.context, options.steps, consumers)
            rows.append({"batch": batch, "event_loop": consumers, "cpu_us": cpu, "median_us": median, "p99_us": late})
            print(f"{batch:6} {'yes' if consumers else '-':>10} {cpu:8.1f} {median:8.1f} {late:8.1f}", flush=True)
    print(json.dumps({"bench": "host", "context": options.context, "rows": rows}))
    return 0


def measure(batch: int, context: int, steps: int, consumers: bool) -> tuple[float, ...]:
    """The engine's loop, turned by hand: microseconds of a step while all requests generate."""
    engine = Engine(Stub(), max_num_seqs=batch, max_num_batched_tokens=2048)
    prompt = np.arange(context) % 1000
    params = SamplingParams(max_tokens=10**6, ignore_eos=True)
    handles = [engine.submit([*prompt[:-1].tolist(), i], params) for i in range(batch)]
    if consumers:
        threading.Thread(target=lambda: asyncio.run(consume(handles)), daemon=True).start()
    while engine.stats().generation_tokens < 3 * batch:
        turn(engine)
    times, cpu = [], []
    for _ in range(steps):
        start, cpu_start = time.perf_counter(), time.thread_time()
        turn(engine)
        times.append((time.perf_counter() - start) * 1e6)
        cpu.append((time.thread_time() - cpu_start) * 1e6)
        if consumers:
            time.sleep(0.002)  # a step, in which the event loop does its work
    for handle in handles:
        handle.abort()
    engine._receive()
    engine.shutdown(drain=False)
    return tuple(round(us, 1) for us in (statistics.median(cpu), statistics.median(times), sorted(times)[int(0.99 * steps)]))


def turn(engine: Engine) -> None:
    engine._receive()
    engine._turn()


async def consume(handles: Sequence[RequestHandle]) -> None:
    async def one(handle: RequestHandle) -> None:
        async for _ in handle:
            pass

    await asyncio.gather(*map(one, handles))


if __name__ == "__main__":
    sys.exit(main())
