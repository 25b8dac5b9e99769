"""Text to token ids and back, on openai-harmony's encoding, in bounded time whatever the text.

The library's `encode` takes time quadratic in the length of an unbroken run (a megabyte of one letter makes it panic)
and holds the interpreter lock for the whole call. So text is cut into short pieces first: at places where the
tokenisation starts afresh anyway, or, in a run that has no such place, after RUN characters.
"""

from __future__ import annotations

import asyncio
import codecs
import functools
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from openai_harmony import HarmonyEncoding, HarmonyError, load_harmony_encoding

FILE = "o200k_base.tiktoken"
VOCABULARY = 201088
FIRST_SPECIAL = 199998
LONGEST_TOKEN = 128  # bytes of the longest entry of o200k_base

PIECE = 2048
RUN = 256
# Between letters, a single space, newline or comma-like character always begins a new token of o200k's pattern.
_BOUNDARY = re.compile(r"(?<=[^\W\d_])(?=[ \n,.;:、。，][^\W\d_])")
_INLINE = 20_000  # characters that are encoded within 5 ms, so not worth a thread


class TokenizerError(ValueError):
    """The artifact's tokenizer file cannot be loaded."""


class TooLongError(ValueError):
    """The text has more tokens than asked for; `tokens` is how many were counted until that was certain."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"at least {tokens} tokens")
        self.tokens = tokens


class Tokenizer:
    """o200k_harmony. Text never becomes a special token; special tokens have no text of their own."""

    def __init__(self, encoding: HarmonyEncoding) -> None:
        self.encoding = encoding
        self._bytes = functools.lru_cache(maxsize=VOCABULARY)(self._lookup)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """The tokenizer whose file is in `folder`, without any download. Raises TokenizerError."""
        if not (folder / FILE).is_file():
            raise TokenizerError(f"{folder} has no {FILE}")
        before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
        os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(folder)  # the only way to tell the library
        try:
            return cls(load_harmony_encoding("HarmonyGptOss"))
        except HarmonyError as error:
            raise TokenizerError(f"{folder / FILE}: {error}") from None
        finally:
            if before is None:
                del os.environ["TIKTOKEN_ENCODINGS_BASE"]
            else:
                os.environ["TIKTOKEN_ENCODINGS_BASE"] = before

    def encode(self, text: str, limit: int | None = None, pause: float = 0.0) -> list[int]:
        """Token ids of a text without lone surrogates.

        Raises TooLongError once there are more than `limit` of them. pause: seconds to sleep between pieces, which a
        background thread uses to let the event loop run.
        """
        if limit is not None and len(text) > limit * LONGEST_TOKEN:
            raise TooLongError(len(text) // LONGEST_TOKEN)
        ids: list[int] = []
        for number, piece in enumerate(pieces(text)):
            ids += self.encoding._inner.encode(piece, [])
            if limit is not None and len(ids) > limit:
                raise TooLongError(len(ids))
            if pause and number % 8 == 7:
                time.sleep(pause)
        return ids

    async def encode_async(self, text: str, limit: int | None = None) -> list[int]:
        """`encode` without holding up the event loop."""
        if len(text) <= _INLINE:
            return self.encode(text, limit)
        return await asyncio.to_thread(self.encode, text, limit, 1e-4)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; none for special and unknown ids."""
        return self._bytes(token)

    def token_text(self, token: int) -> str:
        """A token for people, in OpenAI's spelling: bytes that are no text by themselves as `bytes:\\xe2\\x80`."""
        if token >= FIRST_SPECIAL:
            return self.special_text(token)
        data = self.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def special_text(self, token: int) -> str:
        return str(self.encoding.decode([token])) if FIRST_SPECIAL <= token < VOCABULARY else f"token_id:{token}"

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of the ordinary tokens among these; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def _lookup(self, token: int) -> bytes:
        if not 0 <= token < FIRST_SPECIAL:
            return b""
        return bytes(self.encoding._inner.decode_bytes([token]))


class Detokenizer:
    """Text of a growing sequence of tokens, delivered in whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """What an incomplete character at the end amounts to."""
        rest = self._utf8.decode(b"", True)
        self._utf8.reset()
        return rest


def pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at most PIECE characters that can be encoded one by one."""
    start = 0
    while len(text) - start > PIECE:
        cut = max((m.start() for m in _BOUNDARY.finditer(text, start + 1, start + PIECE)), default=start + RUN)
        yield text[start:cut]
        start = cut
    yield text[start:]
