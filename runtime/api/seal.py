"""Reasoning that clients carry: the model's tokens in an opaque, authenticated blob (`encrypted_content`).

The blob keeps nothing secret (the same answer shows the reasoning as text); it makes sure that only tokens this server
wrote come back as such.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import zlib
from array import array


class Seal:
    def __init__(self, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(32)

    def close(self, tokens: tuple[int, ...]) -> str:
        data = zlib.compress(array("I", tokens).tobytes())
        return base64.urlsafe_b64encode(self._tag(data) + data).decode()

    def open(self, blob: str) -> tuple[int, ...] | None:
        """The tokens, or None if this seal did not close them."""
        try:
            raw = base64.urlsafe_b64decode(blob.encode())
        except (binascii.Error, ValueError):
            return None
        tag, data = raw[:32], raw[32:]
        if not hmac.compare_digest(tag, self._tag(data)):
            return None
        return tuple(array("I", zlib.decompress(data)))

    def _tag(self, data: bytes) -> bytes:
        return hmac.digest(self._key, data, hashlib.sha256)
