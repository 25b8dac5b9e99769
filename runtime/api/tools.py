"""Function tools: whom a message's recipient means, and making the model call one."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from gptoss_compile.runtime.api.harmony import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Message
from gptoss_compile.runtime.api.render import call_header
from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.executor import Floats

NAMESPACE = "functions."


def tool_name(recipient: str | None, declared: Iterable[str]) -> str | None:
    """The declared tool that a recipient means, with or without its namespace; None if it means none."""
    if recipient is None:
        return None
    names = frozenset(declared)
    return next((name for name in (recipient.removeprefix(NAMESPACE), recipient) if name in names), None)


def call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


@dataclass
class Call:
    """A tool call as it grows. `complete`: its message was closed, so the arguments are all there."""

    message: Message
    name: str
    index: int
    id: str = field(default_factory=call_id)

    @property
    def arguments(self) -> str:
        return self.message.text

    @property
    def complete(self) -> bool:
        return self.message.closed


def is_arguments(text: str) -> bool:
    """Whether a finished call's text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class ForcedCall:
    """A logits processor after which a turn can only end with a call of one of `names`.

    The turn may think first: analysis messages, each closed by <|end|>, then the call's header, then free arguments
    up to <|call|>. `reasoning` False goes to the call at once. A pure function of the tokens generated so far.
    """

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str], *, reasoning: bool = True) -> None:
        start = [START, *tokenizer.encode("assistant")]
        calls = [[CHANNEL, *call_header(tokenizer, NAMESPACE + name)] for name in names]
        thought = [[CHANNEL, *tokenizer.encode("analysis"), MESSAGE]] if reasoning else []
        self._first = thought + calls  # the prompt ends on <|start|>assistant
        self._later = [start + header for header in thought + calls]

    def __call__(self, generated: Sequence[int], scores_V: Floats) -> None:
        opened = _last_index(generated, MESSAGE)
        closed = _last_index(generated, END)
        if opened > closed:
            self._inside(generated, opened, scores_V)
            return
        header = tuple(generated[closed + 1 :])
        headers = self._later if closed >= 0 else self._first
        allowed = [h[len(header)] for h in headers if len(h) > len(header) and tuple(h[: len(header)]) == header]
        _only(scores_V, allowed)

    def _inside(self, generated: Sequence[int], opened: int, scores_V: Floats) -> None:
        """Within a message nothing special is allowed but its own end."""
        call = CONSTRAIN in generated[_last_index(generated[:opened], CHANNEL) : opened]
        for token in (START, CHANNEL, CONSTRAIN, MESSAGE, RETURN, END if call else CALL):
            scores_V[token] = -np.inf


def _last_index(generated: Sequence[int], token: int) -> int:
    try:
        return len(generated) - 1 - generated[::-1].index(token)
    except ValueError:
        return -1


def _only(scores_V: Floats, allowed: Sequence[int]) -> None:
    kept = scores_V[list(allowed)].copy()
    scores_V[:] = -np.inf
    scores_V[list(allowed)] = np.where(np.isfinite(kept), kept, 0)
