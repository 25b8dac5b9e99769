"""From logits to tokens and log-probabilities, in numpy.

Work is vectorised over the vocabulary and loops over rows: a row (0.8 MB for 201,088 ids) fills a core's
cache, and what a row gets depends on nothing but that row and its request, whatever else is in the batch.
Shape suffix: V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptoss_compile.runtime.executor import Floats
from gptoss_compile.runtime.request import Request
from gptoss_compile.runtime.sampling_params import SamplingParams


class LogitsError(RuntimeError):
    """Logits that no token can be chosen from: the model's output is not finite, or every id is forbidden."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """log P(token_id | what precedes it), and the likeliest (id, log-probability) pairs, likeliest first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """vocab_limit: ids from it on (padding of the model's vocabulary, unknown to the tokenizer) are never
    chosen nor listed; they do take part in the normalisation of log-probabilities."""

    def __init__(self, vocab_limit: int) -> None:
        self._limit = vocab_limit

    def sample(self, logits_V: Floats, request: Request) -> int:
        """The next token of a request. Raises LogitsError."""
        scores_V = self._edited(logits_V[: self._limit], request)
        best = int(scores_V.argmax())  # the first NaN, if there is one
        if not math.isfinite(scores_V[best]):
            where = f"request {request.request_id!r}, token {len(request.tokens)}"
            raise LogitsError(f"{where}: the largest logit is {scores_V[best]}")
        if request.params.greedy:
            return best
        u = uniform(request.seed, request.num_generated)
        return draw(scores_V, float(scores_V[best]), request.params, u)

    def logprobs(self, logits_V: Floats, token: int, count: int) -> TokenLogprobs:
        """The token's log-probability, and those of the `count` likeliest ids. Raises LogitsError."""
        peak = logits_V.max()
        if not math.isfinite(peak):
            raise LogitsError(f"the largest logit is {peak}")
        normaliser = float(peak) + math.log(np.exp(logits_V - peak).sum(dtype=np.float64))
        ids = _largest(logits_V[: self._limit], count)
        top = tuple((i, float(logits_V[i]) - normaliser) for i in ids)
        return TokenLogprobs(token, float(logits_V[token]) - normaliser, top)

    def _edited(self, scores_V: Floats, request: Request) -> Floats:
        """The logits after bias, penalties, min_tokens and the processor; a copy if any of them applies."""
        params, generated = request.params, request.num_generated
        hold_open = generated < params.min_tokens
        if not (params.logit_bias or hold_open or params.penalised or request.logits_processor):
            return scores_V
        scores_V = scores_V.copy()
        if params.logit_bias:
            scores_V[list(params.logit_bias)] += np.fromiter(params.logit_bias.values(), np.float32)
        if params.penalised and generated:
            ids, counts = np.unique(np.asarray(request.generated), return_counts=True)
            scores_V[ids] -= params.presence_penalty + params.frequency_penalty * counts.astype(np.float32)
        if hold_open:
            scores_V[[i for i in request.stop_ids if i < self._limit]] = -np.inf
        if request.logits_processor:
            request.logits_processor(request.generated, scores_V)
        return scores_V


def draw(scores_V: Floats, peak: float, params: SamplingParams, u: float) -> int:
    """The id at quantile u of the distribution that temperature, top_k, min_p and top_p make of the scores.

    Each truncation is a floor on x = (score - peak) / temperature, so ids that tie at a floor stay or go
    together. In this order: top_k, min_p (on the full distribution), then top_p on what these left.
    """
    x_V = (scores_V - np.float32(peak)) / np.float32(params.temperature)
    floor = -math.inf
    if 0 < params.top_k < x_V.size:
        floor = float(np.partition(x_V, x_V.size - params.top_k)[x_V.size - params.top_k])
    if params.min_p > 0:
        floor = max(floor, math.log(params.min_p))
    if params.top_p < 1:
        floor = max(floor, _nucleus_floor(x_V[x_V >= floor], params.top_p))
    ids = np.flatnonzero(x_V >= floor) if floor > -math.inf else None
    index = _quantile(np.exp(x_V if ids is None else x_V[ids]), u)
    return index if ids is None else int(ids[index])


def _quantile(weights_V: Floats, u: float, block: int = 512) -> int:
    """The first index at which the running sum of the weights exceeds u of their total.

    Sums blocks first, then runs through one block: a full running sum in float64 takes ten times as long.
    """

    def crossing(cumulative: npt.NDArray[np.float64], target: float) -> int:
        # Rounding may carry the target to the total; the last index that adds anything is the answer then.
        return int(min(cumulative.searchsorted(target, "right"), cumulative.searchsorted(cumulative[-1])))

    sums = np.cumsum(np.add.reduceat(weights_V, np.arange(0, weights_V.size, block)), dtype=np.float64)
    target = u * float(sums[-1])
    at = crossing(sums, target)
    inside = np.cumsum(weights_V[at * block : (at + 1) * block], dtype=np.float64)
    return at * block + crossing(inside, target - (float(sums[at - 1]) if at else 0.0))


def _nucleus_floor(x_V: Floats, top_p: float) -> float:
    """The smallest x of the smallest set of likeliest ids whose probabilities sum to at least top_p."""
    weights = np.exp(x_V)
    total = weights.sum(dtype=np.float64)
    # Ids less likely than (1 - top_p) / V sum to less than 1 - top_p, so none of them is in the set: skip
    # sorting them.
    x_V = np.sort(x_V[weights >= (1 - top_p) / x_V.size * total * 0.999])[::-1]
    cumulative = np.cumsum(np.exp(x_V), dtype=np.float64)
    return float(x_V[min(np.searchsorted(cumulative, top_p * total), x_V.size - 1)])


def _largest(x_V: Floats, count: int) -> list[int]:
    """Ids of the `count` largest values, largest first, of equals the lowest id."""
    count = min(count, x_V.size)
    if count == 0:
        return []
    ids = np.flatnonzero(x_V >= np.partition(x_V, x_V.size - count)[x_V.size - count])
    return [int(i) for i in ids[np.argsort(-x_V[ids], kind="stable")][:count]]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that is a function of the seed and of how many tokens came before (Philox4x64)."""
    raw = int(np.random.Philox(key=seed % 2**64, counter=index).random_raw())
    return (raw >> 11) * 2.0**-53
