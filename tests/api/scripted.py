"""The real engine over an executor without a model, and a sampler that is told what to write.

A script is a list of harmony token ids, or a string in which special tokens are spelled out. Scripts are consumed by
the requests in the order of submission; without one a request samples from the executor's logits, which are a function
of the token at each position.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.runtime.api.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.engine import Engine
from gptoss_compile.runtime.executor import Floats, HostSteps, Ints
from gptoss_compile.runtime.request import LogitsProcessor

VOCAB = 201088
SPECIAL = {
    "<|return|>": RETURN,
    "<|constrain|>": CONSTRAIN,
    "<|channel|>": CHANNEL,
    "<|start|>": START,
    "<|end|>": END,
    "<|message|>": MESSAGE,
    "<|call|>": CALL,
}
CONFIG = ModelConfig(
    num_layers=2,
    hidden=32,
    intermediate=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=2,
    experts_per_token=1,
    vocab_size=VOCAB,
    sliding_window=128,
    windowed=(True, False),
)


class HashExecutor(HostSteps):
    """Logits of a row: mostly 0, with a few peaks that depend on the row's token and position alone."""

    def __init__(self, *, max_context: int = 4096, num_pages: int = 1024) -> None:
        super().__init__()
        self.config = CONFIG
        self.buckets = (Bucket.decode(1), Bucket.decode(8), Bucket.extend(512, 8))
        self.page_size, self.max_context = 16, max_context
        self.num_pages = self.num_window_pages = num_pages
        self.window_ring = (128 + 512) // 16
        self.fail = False

    def run(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> Floats:
        if self.fail:
            raise RuntimeError("the device fell off the bus")
        rows = np.arange(bucket.rows) if bucket.kind == "decode" else inputs["rows"]
        logits = np.zeros((bucket.rows, VOCAB), np.float32)
        for i, row in enumerate(rows):
            generator = np.random.default_rng([int(inputs["tokens"][row]), int(inputs["positions"][row]) + 1])
            logits[i, generator.integers(0, 199_000, 8)] = generator.uniform(5, 20, 8)
        return logits

    def close(self) -> None: ...


class Script:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._queue: deque[list[int]] = deque()

    def add(self, *scripts: str | Sequence[int]) -> None:
        self._queue += [self.ids(s) if isinstance(s, str) else list(s) for s in scripts]

    def next(self) -> list[int] | None:
        return self._queue.popleft() if self._queue else None

    def ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
            ids += [SPECIAL[part]] if part in SPECIAL else self._tokenizer.encode(part)
        return ids


class ScriptedEngine(Engine):
    def __init__(self, script: Script, **executor: Any) -> None:
        self.executor = HashExecutor(**executor)
        super().__init__(self.executor, max_num_seqs=8, max_num_batched_tokens=512, vocab_limit=VOCAB)
        self._script = script
        self.prompts: list[list[int]] = []

    def submit(self, prompt: Sequence[int], params: Any, *, logits_processor: Any = None, **options: Any) -> Any:
        self.prompts.append(list(prompt))
        if script := self._script.next():
            logits_processor = Forced(script, logits_processor)
        return super().submit(prompt, params, logits_processor=logits_processor, **options)


class Forced:
    """A logits processor: the script, as far as the request's own processor lets it through."""

    def __init__(self, script: Sequence[int], inner: LogitsProcessor | None) -> None:
        self._script, self._inner = script, inner

    def __call__(self, generated: Sequence[int], scores_V: Floats) -> None:
        if self._inner:
            self._inner(generated, scores_V)
        if len(generated) < len(self._script):
            scores_V[self._script[len(generated)]] += 1000  # what a mask forbids stays forbidden

    def prepare(self, generated: Sequence[int]) -> None:
        if self._inner:
            self._inner.prepare(generated)
