"""A request and the states it goes through.

A state is an immutable value with only the fields that exist in it, and a transition is a method from one to the
next, so a transition that does not exist cannot be written:

    Waiting ──admit──▶ Running ──advance──▶ Running
       ▲  │              │  │
       │  └──finish──────┼──┴──finish──▶ Finished
       └─────preempt─────┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from gptoss_compile.runtime.executor import Floats
from gptoss_compile.runtime.kv_cache import SequencePages
from gptoss_compile.runtime.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class LogitsProcessor(Protocol):
    """Changes the logits of one request. What it does must depend on its arguments alone; it must not raise."""

    def __call__(self, generated: Sequence[int], scores_V: Floats) -> None:
        """Before every choice, with the ids generated so far and a copy of the logits to change (-inf forbids an id)."""

    def prepare(self, generated: Sequence[int]) -> None:
        """After every choice, as early as the ids of the next call are known: work may begin elsewhere. Returns at once."""


@dataclass(eq=False)
class Request:
    """What stays with a request in all states.

    tokens:        the prompt and then what was generated; it only grows.
    max_tokens:    the effective one, clamped to the context. seed: drawn where the user gave none.
    rank:          (priority, order of arrival); the lower one goes first.
    scored:        prompt positions whose logits have become the next prompt token's log-probability.
    keys:          hashes of the token blocks, for the prefix cache.
    cached_tokens: what the first admission found in the prefix cache.
    ahead:         tokens behind `tokens` that steps in flight will give, not yet known. ended: whether it is Finished.
    to_score:      prompt positions whose logits are wanted: [0, to_score). The last one predicts no prompt token.
    on_host:       whether its tokens are chosen on the host, because it asks for more than a temperature; `needs_logits`:
                   whether the host needs the logits they are chosen from, for that or for log-probabilities.
    """

    request_id: str
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    max_tokens: int
    seed: int
    stop_ids: frozenset[int]
    rank: tuple[int, int]
    salt: str = ""
    logits_processor: LogitsProcessor | None = None
    scored: int = 0
    keys: list[bytes] = field(default_factory=list)
    cached_tokens: int | None = None
    ahead: int = 0
    ended: bool = False
    to_score: int = field(init=False)
    on_host: bool = field(init=False)
    needs_logits: bool = field(init=False)

    def __post_init__(self) -> None:
        self.on_host = self.logits_processor is not None or self.params.edits_logits
        self.needs_logits = self.on_host or self.params.logprobs is not None
        self.to_score = 0 if self.params.prompt_logprobs is None else self.prompt_length - 1
        self._most = self.prompt_length + max(self.max_tokens - 1, 0)

    @property
    def length(self) -> int:
        """Tokens known and to come."""
        return len(self.tokens) + self.ahead

    @property
    def to_compute(self) -> int:
        """Tokens so far whose keys and values are needed: the last of an answer's is chosen, but never read."""
        return min(len(self.tokens) + self.ahead, self._most)

    @property
    def generated(self) -> Sequence[int]:
        return self.tokens[self.prompt_length :]

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def reusable(self) -> int:
        """Tokens that may come from the prefix cache: not the last nor those to score, whose logits count."""
        last = len(self.tokens) - 1
        return last if self.scored >= self.to_score else min(last, self.scored)

    def ending(self) -> tuple[FinishReason, int | None] | None:
        """Whether the answer so far is complete: the reason, and the id that stopped it."""
        generated, last = len(self.tokens) - self.prompt_length, self.tokens[-1]
        if generated and last in self.stop_ids:
            return "stop", last
        return ("length", None) if generated >= self.max_tokens else None


@dataclass(frozen=True)
class Waiting:
    request: Request

    def admit(self, pages: SequencePages, computed: int) -> Running:
        return Running(self.request, pages, computed)

    def finish(self, reason: FinishReason, stop_id: int | None = None) -> Finished:
        return Finished(self.request, reason, stop_id)


class Running(NamedTuple):
    """Tokens [0, computed) have their keys and values in `pages`, or will once the steps in flight have run.

    row: where the last step it was in chooses its next token: a row of that step's logits.
    """

    request: Request
    pages: SequencePages
    computed: int
    row: int = -1

    @property
    def pending(self) -> int:
        """Tokens not yet computed: one if it is generating (or one short of it), none if it waits for its last token."""
        return self.request.to_compute - self.computed

    def advance(self, computed: int, row: int) -> Running:
        return Running(self.request, self.pages, computed, row)

    def preempt(self) -> Waiting:
        return Waiting(self.request)

    def finish(self, reason: FinishReason, stop_id: int | None = None) -> Finished:
        return Finished(self.request, reason, stop_id)


@dataclass(frozen=True)
class Finished:
    request: Request
    reason: FinishReason
    stop_id: int | None
