"""How one request wants its tokens chosen: names and meanings are vLLM's. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GREEDY_BELOW = 1e-5  # a temperature below this would overflow the scaled logits; greedy is its limit


class RequestError(ValueError):
    """A request that cannot be served as asked. `field` is the parameter at fault, for the API's `param`."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one answer. Raises RequestError, which names the field and what it must be.

    temperature:        divides the logits; 0 is greedy.
    top_p, top_k, min_p: keep the smallest set of tokens with that much probability; that many tokens; the
                        tokens at least that likely relative to the likeliest one. Off: 1, 0 (or -1), 0.
    presence_penalty, frequency_penalty: subtracted from the logit of a generated token, once, or once an
    occurrence.
    seed:               the same seed gives the same tokens for the same logits, whatever else is in the
                        batch.
    max_tokens:         None means as many as the context holds; 0 only reads (and, with prompt_logprobs,
                        scores) the prompt. min_tokens: ids that would stop the answer cannot be chosen
                        before.
    stop_token_ids:     end the answer, beside the model's own end ids, which ignore_eos turns off.
    logprobs, prompt_logprobs: how many of the likeliest alternatives come with the log-probability of every
                        generated token, or of every prompt token; 0 gives the token's own alone. They are of
                        the model's distribution, before temperature, penalties and masks.
    logit_bias:         token id -> what is added to its logit.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._number("temperature", 0.0, math.inf)
        self._number("top_p", 0.0, 1.0)
        if self.top_p == 0:
            raise RequestError("top_p", "must be above 0; use temperature 0 for greedy decoding")
        self._integer("top_k", -1)
        self._number("min_p", 0.0, 1.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        if self.seed is not None:
            self._integer("seed", -(2**63), 2**64 - 1)
        for name in ("max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, 0)
        self._integer("min_tokens", 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", f"{self.min_tokens} exceeds max_tokens ({self.max_tokens})")
        if not isinstance(self.ignore_eos, bool):
            raise RequestError("ignore_eos", f"must be true or false, found {self.ignore_eos!r}")
        self._token_ids()

    def _token_ids(self) -> None:
        for name, kind in (("stop_token_ids", tuple), ("logit_bias", dict)):
            try:
                object.__setattr__(self, name, kind(getattr(self, name)))
            except (TypeError, ValueError) as error:
                raise RequestError(name, f"has the wrong type ({error})") from None
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", tuple(self.logit_bias))):
            for token in ids:
                if not _is_integer(token) or token < 0:
                    raise RequestError(name, f"token ids are integers of at least 0, found {token!r}")
        for token, bias in self.logit_bias.items():
            if not _is_number(bias) or not -100 <= bias <= 100:
                raise RequestError("logit_bias", f"token {token}'s must be in [-100, 100], found {bias!r}")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not math.isfinite(value) or not low <= value <= high:
            wanted = f"a finite number of at least {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
            raise RequestError(name, f"must be {wanted}, found {value!r}")

    def _integer(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or value < low or (high is not None and value > high):
            wanted = f"of at least {low}" if high is None else f"in [{low}, {high}]"
            raise RequestError(name, f"must be an integer {wanted}, found {value!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def edits_logits(self) -> bool:
        """Whether tokens are chosen from anything but all logits divided by the temperature."""
        truncates = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return bool(self.logit_bias) or self.min_tokens > 0 or self.penalised or (truncates and not self.greedy)

    @property
    def penalised(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
