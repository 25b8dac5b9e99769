"""Log-probabilities as OpenAI's chat and Responses write them."""

from __future__ import annotations

from typing import Any

from gptoss_compile.runtime.api.tokenizer import Tokenizer
from gptoss_compile.runtime.sampler import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON has not


class LogprobNames:
    """Names tokens in log-probability entries."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def entry(self, scores: TokenLogprobs) -> dict[str, Any]:
        """A token's log-probability with its alternatives."""
        return self._one(scores.token_id, scores.logprob) | {"top_logprobs": [self._one(*top) for top in scores.top]}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {
            "token": self._tokenizer.token_text(token),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(data),
        }
