"""Settings of the HTTP server."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class ServerOptions:
    """served_model_names: the first is the model's id in answers, the others are aliases. api_keys: none means open.

    allowed_origins: web pages of these origins (`*`: all) may call the API from a browser (CORS).
    responses_dialect: whose name the reasoning events of /v1/responses have.
    system_date pins `Current date` in prompts (YYYY-MM-DD). body_timeout is in seconds, for the whole request body.
    """

    served_model_names: tuple[str, ...] = ("gpt-oss",)
    api_keys: tuple[str, ...] = ()
    system_date: str | None = None
    allowed_origins: tuple[str, ...] = ()
    responses_dialect: Literal["openai", "open-responses"] = "openai"
    max_body_bytes: int = 16 << 20
    body_timeout: float = 30.0
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def model(self) -> str:
        return self.served_model_names[0]

    @property
    def reasoning_event(self) -> str:
        return "response.reasoning" if self.responses_dialect == "open-responses" else "response.reasoning_text"
