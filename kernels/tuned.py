"""What measurements on a target's GPU chose where a kernel leaves something to choose; compiling needs no GPU to use it.

`tables/<target>.json`, written by `gptoss-compile tune`: {"gpu", "tools", "choices": {kernel: {key: {field: value}}}}. It
holds what beat the kernels' own rules, which are used wherever it says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gptoss_compile.kernels.spec import Launch
from gptoss_compile.target import Target

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    C = TypeVar("C", bound=DataclassInstance)
else:
    C = TypeVar("C")

Entry = dict[str, Any]
Name = tuple[str, str]  # (kernel, key)


@dataclass(frozen=True)
class Choice:
    """One thing that was chosen. candidates: all that there are, what the kernel's rule says first; taken: one of them."""

    kernel: str
    key: Mapping[str, int]
    taken: Any
    candidates: tuple[Any, ...]

    @property
    def rule(self) -> Any:
        return self.candidates[0]

    @property
    def name(self) -> Name:
        return self.kernel, _text(self.key)

    def entry(self, candidate: Any) -> Entry:
        """How the table writes a candidate."""
        return _entry(candidate, self.key)


@dataclass
class Trial:
    """taken: what to choose instead; seen: what was chosen, in the order in which it first was."""

    taken: Mapping[Name, Any]
    seen: dict[Name, Choice] = field(default_factory=dict)


_TRIAL: ContextVar[Trial | None] = ContextVar("trial", default=None)


def choose(target: Target, kernel: str, key: Mapping[str, int], rule: C, candidates: Iterable[C]) -> C:
    """What the table says for a kernel at these shapes, if it is still one of the candidates; else what its rule says.

    key: all that the candidates and their times depend on. Candidates are dataclasses; where their fields are in the key
    already, the table leaves them out.
    """
    trial, entry = _TRIAL.get(), table(target.name).get(kernel, {}).get(_text(key))
    if trial is None and entry is None:
        return rule
    every = tuple(dict.fromkeys((rule, *candidates)))
    taken = next((c for c in every if _entry(c, key) == entry), rule)
    if trial is not None:
        choice = Choice(kernel, key, taken, every)
        taken = trial.taken.get(choice.name, taken)
        trial.seen.setdefault(choice.name, replace(choice, taken=taken))
    return taken


@contextmanager
def trying(taken: Mapping[Name, Any]) -> Iterator[dict[Name, Choice]]:
    """Within, `choose` gives what is `taken` here, and notes what it chose in the dictionary that this yields."""
    trial = Trial(taken)
    token = _TRIAL.set(trial)
    try:
        yield trial.seen
    finally:
        _TRIAL.reset(token)


def path(target: str) -> Path:
    return Path(__file__).parent / "tables" / f"{target}.json"


@cache
def table(target: str) -> dict[str, dict[str, Entry]]:
    """The target's choices by kernel and key; none if nothing was measured."""
    file = path(target)
    choices: dict[str, dict[str, Entry]] = json.loads(file.read_bytes())["choices"] if file.exists() else {}
    return choices


def _text(key: Mapping[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in key.items())


def _entry(candidate: Any, key: Mapping[str, int]) -> Entry:
    return {name: value for name, value in asdict(candidate).items() if name not in key}


@dataclass(frozen=True)
class Carveout:
    """percent: of an SM's first-level memory, what all kernels of a step prefer as shared memory, since a processor that
    goes from one division to another must first be empty. -1: each kernel as it likes."""

    percent: int = -1


def of_step(target: Target, step: Mapping[str, int], launches: tuple[Launch, ...]) -> tuple[Launch, ...]:
    """The launches of a bucket's step with the carve-out chosen for it."""
    if target.backend != "cuda":
        return launches
    chosen = choose(target, "step", step, Carveout(), map(Carveout, (25, 50, 75, 100)))
    return launches if chosen.percent < 0 else tuple(replace(x, carveout=chosen.percent) for x in launches)
