"""Grammars that clients give for the input of their custom tools: bounded in what they cost, as parts of a turn's grammar.

Both syntaxes become Lark as llguidance reads it. Its extensions are left out: a grammar must not name the special tokens
that end a message, other grammars, or JSON schemas (which have limits of their own).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Syntax = Literal["lark", "regex"]
# Of all grammars of one request together:
CHARACTERS = 10_000
RULES = 200  # and terminals; chains of thousands overflow the compiler's stack
EXPANDED = 20_000  # words of all terminals, with those that they refer to in their place

_LITERAL = re.compile(r'"(?:\\[^\n]|[^"\\\n])*"i?|//[^\n]*|#[^\n]*|/(?:\\.|[^/\\])+/[a-z]*', re.DOTALL)
_DEFINITION = re.compile(r"^\s*[?!]?(\w+)\s*(?:\.-?\d+)?\s*(?:\[[^\]]*\])?\s*:(?!:)", re.MULTILINE)
_FORBIDDEN = re.compile(r"<\S{0,20}|@\w{0,20}|%(?!(?:ignore|import)\b)\w{0,20}|[\"']")
_WORD = re.compile(r"\w+|\"\"")


class GrammarError(ValueError):
    """A grammar that is refused."""


class CustomGrammars:
    """The grammars of one request, which share what they may cost."""

    def __init__(self) -> None:
        self._characters = self._rules = self._words = 0

    def as_lark(self, syntax: Syntax, definition: str) -> str:
        """A grammar in llguidance's dialect of Lark. Raises GrammarError for one that costs or can do too much.

        A regular expression describes the whole input, whether it says so with ^ and $ or not.
        """
        self._characters += len(definition)
        if self._characters > CHARACTERS:
            raise GrammarError(f"the grammars have more than {CHARACTERS} characters")
        if syntax == "regex":
            return f"start: /{_inside_slashes(_without_anchors(definition))}/"
        self._check(definition)
        return definition

    def _check(self, lark: str) -> None:
        bare = _LITERAL.sub('""', lark)  # comments become words, too: they count little
        if found := _FORBIDDEN.search(bare.replace('""', "")):
            raise GrammarError(f"{found.group()!r} is not supported in grammars")
        parts = _DEFINITION.split(bare)
        bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
        self._rules += len(bodies)
        if self._rules > RULES:
            raise GrammarError(f"the grammars have more than {RULES} rules and terminals")
        self._words += _written_out(bodies)
        if self._words > EXPANDED:
            raise GrammarError(f"the terminals come to more than {EXPANDED} words when they are written out")


def _written_out(bodies: Mapping[str, str]) -> int:
    """Words of all terminals, with those that they refer to in their place. A circle, which the compiler refuses, ends where
    it closes."""
    sizes: dict[str, int] = {}

    def size(name: str) -> int:
        if name not in sizes:
            sizes[name] = 0
            words: list[str] = _WORD.findall(bodies[name])
            inside = sum(size(word) for word in words if _terminal(word) and word in bodies)
            sizes[name] = min(len(words) + inside, EXPANDED + 1)
        return sizes[name]

    return sum(map(size, filter(_terminal, bodies)))


def _terminal(name: str) -> bool:
    return name.isupper()


def _without_anchors(pattern: str) -> str:
    pattern = pattern.removeprefix("^")
    escaped = len(pattern[:-1]) - len(pattern[:-1].rstrip("\\"))
    return pattern[:-1] if pattern.endswith("$") and escaped % 2 == 0 else pattern


def _inside_slashes(pattern: str) -> str:
    """A pattern as it stands between two slashes of Lark's."""
    return re.sub(r"(\\.)|/", lambda match: match.group(1) or r"\/", pattern, flags=re.DOTALL)
