"""How a device chooses tokens: greedily, or at a temperature by the Gumbel-max trick with counted noise. Numpy only.

A row of logits comes with five 32-bit words:

    temperature   fp32; 0 is greedy, below 0 asks for no token
    limit         ids from it on are never chosen
    seed          two words, low one first
    counter       which token of its sequence is chosen

The token is the id with the largest logit + temperature · noise(id), the lowest such id on ties. With noise = -log(E) and E
from the exponential distribution, that is a draw from softmax(logits / temperature). A largest value that is not finite
gives no token. All arithmetic on words is unsigned, modulo 2^32; `mix` is that of random_weights.py:

    k0 = mix(seed low + mix(counter)),  k1 = mix(seed high ^ k0)
    word(id) = mix(mix(id ^ k0) + k1)
    v  = min((word + 1/2) / 2^32, 1 - 2^-24)
    E  = -log(1 - v); near 0, where 1 - v rounds, v + v²/2 + v³/3

So a token depends on its own logits and words alone: not on the row it has, nor on the rows beside it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FIELDS = 5  # words of a row
NO_TOKEN = -1
LARGEST = 1e30  # temperature: beyond it the noise would overflow, and it drowns every logit already
_WORD = 2**32 - 1

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


def words(temperature: float, limit: int, seed: int, counter: int = 0) -> Ints:
    """The five words of a row. seed: any integer, modulo 2^64."""
    row = np.array((0, limit, seed & _WORD, seed >> 32 & _WORD, counter), np.uint32).view(np.int32)
    row[:1] = np.array([min(temperature, LARGEST)], np.float32).view(np.int32)
    return row


NOTHING = words(-1, 0, 0)  # of a row that asks for no token


def choose(logits_RV: Floats, words_RF: Ints) -> Ints:
    """The token of each row, NO_TOKEN where none was asked for or the largest value is not finite."""
    tokens_R = np.full(len(words_RF), NO_TOKEN, np.int32)
    temperatures = words_RF[:, 0].copy().view(np.float32)
    for row in np.flatnonzero(temperatures >= 0).tolist():
        _, limit, low, high, counter = words_RF[row].tolist()
        scores_V = logits_RV[row, :limit]
        if temperatures[row] > 0:
            scores_V = scores_V + temperatures[row] * noise(limit, low, high, counter)
        best = int(scores_V.argmax())  # the first NaN, if there is one
        if np.isfinite(scores_V[best]):
            tokens_R[row] = best
    return tokens_R


def noise(count: int, low: int, high: int, counter: int) -> Floats:
    """Of the ids [0, count), fp32."""
    key0 = int(_mix(np.array([low + int(_mix(np.array([counter & _WORD], np.uint32))[0]) & _WORD], np.uint32))[0])
    key1 = int(_mix(np.array([high & _WORD ^ key0], np.uint32))[0])
    word_V = _mix(_mix(np.arange(count, dtype=np.uint32) ^ np.uint32(key0)) + np.uint32(key1))
    v_V = np.minimum(word_V.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33), np.float32(1 - 2**-24))
    near_V = v_V * (1 + v_V * (np.float32(0.5) + v_V * np.float32(1 / 3)))
    exponential_V = np.where(v_V < np.float32(2**-6), near_V, -np.log(1 - v_V))
    result: Floats = -np.log(exponential_V)
    return result


def _mix(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """lowbias32."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
