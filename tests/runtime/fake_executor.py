"""An executor that checks every page table it is given, and answers with a hash of all the keys it sees.

Its "keys and values" are (token, position, history) in real page pools, where history chains all tokens up to
that one, as a deep model's keys depend on everything before them. A key that is missing, misplaced,
overwritten or of another sequence raises FaultyTables; the logits are a deterministic function of all visible
(position, token) pairs, so that what slips through would change tokens.

Like a GPU it keeps inputs of its own, of which it copies what it is told to, and with `ahead` it computes a step no earlier
than its result is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from gptoss_compile.config import Bucket, ModelConfig
from gptoss_compile.gumbel import choose
from gptoss_compile.runtime.executor import Floats, HostSteps, Ints

CONFIG = ModelConfig(
    num_layers=2,
    hidden=32,
    intermediate=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    num_experts=2,
    experts_per_token=1,
    vocab_size=97,
    sliding_window=128,
    windowed=(True, False),
    eos_ids=(96, 95),
)
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


class FaultyTables(AssertionError):
    """The step's inputs break the contract, or a visible key is not what was written for it."""


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 arrays (which wrap silently)."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x = x ^ (x >> np.uint64(27))
    x = x * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pairs(positions: np.ndarray, tokens: np.ndarray, salt: int) -> np.ndarray:
    return mix(positions.astype(np.uint64) * np.uint64(GOLDEN) + tokens.astype(np.uint64) * np.uint64(salt))


def chain(history: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return mix(history * np.uint64(3) + tokens.astype(np.uint64) + np.uint64(1))


class FakePool:
    def __init__(self, pages: int, page_size: int) -> None:
        self.position = np.full(pages * page_size, -1, np.int64)
        self.token = np.full(pages * page_size, -1, np.int64)
        self.history = np.zeros(pages * page_size, np.uint64)


def check(condition: bool | np.bool_, message: str) -> None:
    if not condition:
        raise FaultyTables(message)


class FakeExecutor(HostSteps):
    def __init__(
        self,
        *,
        buckets: tuple[Bucket, ...] | None = None,
        num_pages: int = 4096,
        num_window_pages: int = 4096,
        page_size: int = 16,
        window: int = 128,
        max_context: int = 4096,
        vocab_size: int = 97,
        ahead: bool = False,
    ) -> None:
        super().__init__()
        self.runs_ahead = ahead
        self.device: dict[Bucket, dict[str, Ints]] = {}
        self.flights: deque[tuple[Bucket, dict[str, Ints]]] = deque()
        self.config = replace(CONFIG, sliding_window=window, vocab_size=vocab_size)
        self.buckets = buckets or (
            *(Bucket.decode(n) for n in (1, 4, 16)),
            Bucket.extend(32, 8),
            Bucket.extend(256, 16),
        )
        self.page_size, self.max_context = page_size, max_context
        self.num_pages, self.num_window_pages = num_pages, num_window_pages
        self.window_ring = -(-(window + max(b.tokens for b in self.buckets)) // page_size)
        self.full, self.window = FakePool(num_pages, page_size), FakePool(num_window_pages, page_size)
        self.ran: list[tuple[Bucket, int]] = []  # bucket and real tokens of each step
        self.closed = False
        self.fail_at: int | None = None

    def close(self) -> None:
        self.closed = True

    def submit(self, bucket: Bucket, rows: int, columns: int) -> None:
        inputs = self.inputs(bucket)
        device = self.device.setdefault(bucket, {name: np.zeros_like(array) for name, array in inputs.items()})
        for name, array in inputs.items():
            part = {"window_table": np.s_[:rows], "full_table": np.s_[:rows, :columns]}.get(name, np.s_[:])
            device[name][part] = array[part]
        self.flights.append((bucket, {name: array.copy() for name, array in device.items()}))
        assert len(self.flights) <= 1 + self.runs_ahead
        if not self.runs_ahead:
            self.execute()

    def execute(self) -> None:
        bucket, inputs = self.flights.popleft()
        source, words = inputs.pop("source"), inputs.pop("words")
        fed = source >= 0
        inputs["tokens"][fed] = self._chosen[source[fed]]
        self._logits = self.run(bucket, inputs)
        self._chosen = choose(self._logits, words)

    def result(self) -> Ints:
        if self.runs_ahead:
            self.execute()
        return self._chosen

    def logits(self, rows: Sequence[int]) -> Floats:
        assert not self.flights, "a later step may have overwritten them"
        return super().logits(rows)

    def run(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> Floats:
        assert not self.closed
        if self.fail_at == len(self.ran):
            raise RuntimeError("the device fell off the bus")
        self._check_shapes(bucket, inputs)
        positions = inputs["positions"]
        count = int((positions >= 0).sum())
        self.ran.append((bucket, count))
        check(count > 0 and (positions[:count] >= 0).all(), "padding comes last")
        sequences = inputs["sequences"][:count]
        check((np.diff(sequences) >= 0).all() and sequences[0] == 0, "sequences ascend from 0")
        spans = [np.flatnonzero(sequences == s) for s in np.unique(sequences)]
        if bucket.kind == "decode":
            check(
                all(len(span) == 1 and span[0] == i for i, span in enumerate(spans)), "one token a sequence"
            )
        self._check_written_once(spans, inputs)
        for span in spans:
            self._write(span, inputs)
        states = np.zeros(bucket.tokens, np.uint64)
        for span in spans:
            states[span] = self._attend(span, inputs)
        rows = np.arange(bucket.rows) if bucket.kind == "decode" else inputs["rows"]
        ids = np.arange(self.config.vocab_size, dtype=np.uint64) * np.uint64(GOLDEN)
        bits = mix(states[rows][:, None] + ids[None])
        return ((bits >> np.uint64(40)).astype(np.float64) / 2**24 * 8 - 4).astype(np.float32)

    def _check_shapes(self, bucket: Bucket, inputs: Mapping[str, Ints]) -> None:
        table = -(-self.max_context // self.page_size)
        shapes = {
            "tokens": (bucket.tokens,),
            "positions": (bucket.tokens,),
            "sequences": (bucket.tokens,),
            "full_table": (bucket.sequences, table),
            "window_table": (bucket.sequences, self.window_ring),
        }
        if bucket.kind == "extend":
            shapes["rows"] = (bucket.rows,)
        check(bucket in self.buckets and set(inputs) == set(shapes), "names of the inputs")
        for name, shape in shapes.items():
            check(inputs[name].shape == shape and inputs[name].dtype == np.int32, f"shape or dtype of {name}")
        for name, limit in (("full_table", self.num_pages), ("window_table", self.num_window_pages),
                            ("tokens", self.config.vocab_size), ("sequences", bucket.sequences)):
            check((inputs[name] >= 0).all() and (inputs[name] < limit).all(), f"range of {name}")

    def _slots(
        self, name: str, span: np.ndarray, inputs: Mapping[str, Ints], positions: np.ndarray
    ) -> np.ndarray:
        table = inputs[name][inputs["sequences"][span[0]]]
        pages = table[(positions // self.page_size) % len(table)].astype(np.int64)
        check((pages > 0).all(), f"a live position is in the null page of {name}")
        return pages * self.page_size + positions % self.page_size

    def _check_written_once(self, spans: list[np.ndarray], inputs: Mapping[str, Ints]) -> None:
        for name in ("full_table", "window_table"):
            slots = [
                self._slots(name, span, inputs, inputs["positions"][span].astype(np.int64)) for span in spans
            ]
            check(
                len(np.unique(np.concatenate(slots))) == sum(map(len, slots)),
                f"{name}: a slot is written twice",
            )

    def _write(self, span: np.ndarray, inputs: Mapping[str, Ints]) -> None:
        positions, tokens = (
            inputs["positions"][span].astype(np.int64),
            inputs["tokens"][span].astype(np.int64),
        )
        check((np.diff(positions) == 1).all(), "positions of a sequence are consecutive")
        history = np.zeros(len(span) + 1, np.uint64)
        if positions[0] > 0:
            before = self._slots("full_table", span, inputs, positions[:1] - 1)
            check(self.full.position[before[0]] == positions[0] - 1, "the key before the chunk is missing")
            history[0] = self.full.history[before[0]]
        for i in range(len(span)):
            history[i + 1 : i + 2] = chain(history[i : i + 1], tokens[i : i + 1])
        for name, pool in (("full_table", self.full), ("window_table", self.window)):
            slots = self._slots(name, span, inputs, positions)
            pool.position[slots], pool.token[slots], pool.history[slots] = positions, tokens, history[1:]

    def _attend(self, span: np.ndarray, inputs: Mapping[str, Ints]) -> np.ndarray:
        """The hash state of each token of one sequence, of all keys that it sees, every one of them
        checked."""
        positions = inputs["positions"][span].astype(np.int64)
        every = np.arange(positions[-1] + 1)
        slots = self._slots("full_table", span, inputs, every)
        tokens, history = self.full.token[slots], self.full.history[slots]
        check((self.full.position[slots] == every).all(), "full attention: a key is missing or misplaced")
        check((history == chain(np.concatenate([np.zeros(1, np.uint64), history[:-1]]), tokens)).all(),
              "full attention: a key of another sequence")
        check((tokens[positions] == inputs["tokens"][span]).all(), "full attention: own key")
        seen = np.cumsum(pairs(every, tokens, 0x51ED270B))[positions]

        window = self.config.sliding_window
        keys = positions[:, None] - np.arange(min(window, positions[-1] + 1))[None]
        visible = keys >= 0
        wanted = np.unique(keys[visible])
        slot_of = np.zeros(positions[-1] + 1, np.int64)
        slot_of[wanted] = self._slots("window_table", span, inputs, wanted)
        at = slot_of[np.maximum(keys, 0)]
        check(
            (self.window.position[at] == keys)[visible].all(),
            "window attention: a key is missing or misplaced",
        )
        check((self.window.history[at] == history[np.maximum(keys, 0)])[visible].all(), "window: foreign key")
        near = np.where(visible, pairs(np.maximum(keys, 0), self.window.token[at], 0x2545F491), np.uint64(0))
        return mix(seen + mix(near.sum(axis=1, dtype=np.uint64)))
