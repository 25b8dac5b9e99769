"""What the model writes, token by token, as messages with a channel. Never raises, never leaks a special token.

openai-harmony's own StreamableParser raises on anything but a perfectly formed turn and cannot go on afterwards,
which at temperature 1 would fail a few answers in a hundred. This parser, on the library's encoding, agrees with it on
well-formed turns (a test compares them) and recovers otherwise: it resynchronises at the next special token, keeps the
text, and counts a repair.

    HEADER   after <|start|>, and at first (the prompt ends on `<|start|>assistant`), up to <|message|>
    CONTENT  after <|message|>, up to <|end|>, <|return|> or <|call|>
    BETWEEN  after a message, up to the next <|start|>
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gptoss_compile.runtime.api.tokenizer import FIRST_SPECIAL, Detokenizer, Tokenizer

RETURN, CONSTRAIN, CHANNEL, START, END, MESSAGE, CALL = 200002, 200003, 200005, 200006, 200007, 200008, 200012
CHANNELS = ("analysis", "commentary", "final")
STOP_IDS = (RETURN, CALL)  # <|end|> closes a message, not the turn
HEADER_LIMIT = 64  # tokens; what is longer is no header but text that the model wrote without one


@dataclass(eq=False)
class Message:
    """recipient: whom a commentary or analysis message is for (`functions.get_weather`), None for people.

    closed: the model ended it; False for one that is open or was cut off.
    tokens: the message as the model wrote it, from <|start|> to its end, fit for a later prompt (there <|return|> becomes
    <|end|>); None if it was malformed or cut off.
    """

    channel: str
    recipient: str | None = None
    content_type: str | None = None
    text: str = ""
    closed: bool = False
    tokens: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Event:
    """`open`, any number of `text`, `close`, for one message after the other.

    from_token: the text is that of the token just pushed (it may be empty: part of a character).
    """

    kind: Literal["open", "text", "close"]
    message: Message
    text: str = ""
    from_token: bool = False


class HarmonyParser:
    """One assistant turn. ignore_eos: <|return|> and <|call|> are skipped, and the open message goes on."""

    def __init__(self, tokenizer: Tokenizer, *, ignore_eos: bool = False) -> None:
        self._tokenizer = tokenizer
        self._ignore_eos = ignore_eos
        self._utf8 = Detokenizer(tokenizer)
        self._state: Literal["header", "content", "between"] = "header"
        self._header: list[int] = []
        self._raw = [START, *tokenizer.encode("assistant")]  # the message so far; its beginning is the prompt's end
        self._clean = True  # no repair was needed in it
        self.messages: list[Message] = []
        self.repairs = 0

    def push(self, token: int) -> list[Event]:
        """Take one token of the turn and return what it brought."""
        if self._ignore_eos and token in STOP_IDS:
            self._clean = False
            return []
        before = self.repairs
        self._raw.append(token)
        step = {"header": self._in_header, "content": self._in_content, "between": self._between}[self._state]
        events = step(token)
        self._clean &= self.repairs == before
        return events

    def finish(self) -> list[Event]:
        """The turn is over, wherever it stands."""
        if self._state == "content":
            return self._close(cut=True)
        if self._state != "header" or may_begin_header(text := self._header_text()):
            return []
        self.repairs += 1
        return self._write_headless(headless_text(text)) + self._close()

    # States ----------------------------------------------------------------------------------------------------------

    def _in_header(self, token: int) -> list[Event]:
        if token == MESSAGE:
            header = parse_header(self._header_text())
            self.repairs += header.malformed
            return self._open(header)
        if token < FIRST_SPECIAL or token in (CHANNEL, CONSTRAIN):
            self._header.append(token)
            if len(self._header) <= HEADER_LIMIT:
                return []
            self.repairs += 1
            return self._write_headless(headless_text(self._header_text()))
        self.repairs += 1
        if token not in (START, END, *STOP_IDS):
            return []  # reserved: dropped
        text = headless_text(self._header_text())
        events = self._write_headless(text) + self._close() if text else []
        self._enter("header" if token == START else "between")
        return events

    def _in_content(self, token: int) -> list[Event]:
        if token < FIRST_SPECIAL:
            return self._write(self._utf8.push(token), from_token=True)
        if token in (END, *STOP_IDS):
            if self._clean:
                self.messages[-1].tokens = (*self._raw[:-1], END if token == RETURN else token)
            return self._close()
        self.repairs += 1
        if token not in (START, CHANNEL):
            return []
        events = self._close()  # the model forgot <|end|>, or even <|end|><|start|>assistant
        self._enter("header", [CHANNEL] if token == CHANNEL else [])
        return events

    def _between(self, token: int) -> list[Event]:
        if token == START:
            self._enter("header")
            return []
        self.repairs += 1
        if token == MESSAGE:
            return self._open(Header(self.messages[-1].channel if self.messages else "final"))
        if token < FIRST_SPECIAL or token == CHANNEL:
            self._enter("header", [token])
        return []

    # Steps -----------------------------------------------------------------------------------------------------------

    def _enter(self, state: Literal["header", "between"], header: list[int] | None = None) -> None:
        self._state, self._header = state, header or []
        self._raw, self._clean = [*(header or [START])], header is None

    def _header_text(self) -> str:
        marks = {CHANNEL: b"<|channel|>", CONSTRAIN: b"<|constrain|>"}
        parts = [marks.get(token) or self._tokenizer.token_bytes(token) for token in self._header]
        return b"".join(parts).decode(errors="replace")

    def _open(self, header: Header) -> list[Event]:
        self._state, self._header = "content", []
        self.messages.append(Message(header.channel, header.recipient, header.content_type))
        return [Event("open", self.messages[-1])]

    def _write(self, text: str, *, from_token: bool = False) -> list[Event]:
        self.messages[-1].text += text
        return [Event("text", self.messages[-1], text, from_token)]

    def _write_headless(self, text: str) -> list[Event]:
        """Open a message for text that came where its header should have been."""
        header = parse_header(self._header_text()) if CHANNEL in self._header else Header("final")
        return self._open(header) + self._write(text)

    def _close(self, *, cut: bool = False) -> list[Event]:
        rest = self._utf8.finish()
        events = self._write(rest) if rest else []
        self._enter("between")
        self.messages[-1].closed = not cut
        return [*events, Event("close", self.messages[-1])]


@dataclass(frozen=True)
class Header:
    channel: str
    recipient: str | None = None
    content_type: str | None = None
    malformed: bool = False


_RECIPIENT = re.compile(r"(?<!\S)to=([^\s<]*)")
_ROLE = re.compile(r"\s*assistant(?=[\s<]|$)")
_CHANNEL_WORD = re.compile(rf"\s*({'|'.join(CHANNELS)})(?![a-z])")


def parse_header(text: str) -> Header:
    """The header between <|start|> and <|message|>, in either order of recipient and channel, as far as it makes sense.

    Accepts `[assistant][ to=X][<|channel|>C[ to=X][ json][<|constrain|>json]]`; anything else is malformed, and is then
    read as what is most likely meant. A message in another role's name is nobody's answer: its channel is analysis.
    """
    before, *channels = text.split("<|channel|>")
    match = _RECIPIENT.search(text.replace("<|channel|>", " ").replace("<|constrain|>", " "))
    recipient = match.group(1) if match and match.group(1) not in ("", "assistant", "all", "user") else None
    role_words = _RECIPIENT.sub(" ", before).split()
    heads, constrains = [], []
    for part in channels:
        head, *constrain = part.split("<|constrain|>")
        heads.append(_RECIPIENT.sub(" ", head).split())
        constrains += constrain
    words = [word for head in heads for word in head] or [word for word in role_words if word in CHANNELS]
    channel, known = _channel(words, recipient)
    rest = words[1:] if known else words
    constraint = _RECIPIENT.sub(" ", " ".join(constrains)).split() or rest
    foreign = "to=assistant" in before or role_words[:1] in (["user"], ["system"], ["developer"], ["tool"])
    malformed = (
        foreign
        or role_words not in ([], ["assistant"])
        or not known
        or len(channels) != 1
        or len(constraint) > 1
        or len(constrains) + len(rest) > 1
    )
    if foreign:
        channel, recipient = "analysis", None
    return Header(channel, None if channel == "final" else recipient, constraint[0] if constraint else None, malformed)


def _channel(words: list[str], recipient: str | None) -> tuple[str, bool]:
    """The channel that a header's words name, and whether the first word is exactly its name."""
    if words and words[0] in CHANNELS:
        return words[0], True
    named = [channel for word in words for channel in CHANNELS if word.startswith(channel)]
    return named[-1] if named else "commentary" if recipient else "final", False


def headless_text(text: str) -> str:
    """What a header that never came to <|message|> holds beyond a header's own words."""
    before, *channels = text.split("<|channel|>")
    kept = [_ROLE.sub("", before, count=1), *(_CHANNEL_WORD.sub("", part, count=1) for part in channels)]
    return _RECIPIENT.sub("", "".join(kept).replace("<|constrain|>", "")).strip()


def may_begin_header(text: str) -> bool:
    """Whether a turn that ends with this was cut off in a header, so that the text is nothing to show."""
    return "<|channel|>" in text or any(word.startswith(headless_text(text)) for word in ("assistant", "to="))
