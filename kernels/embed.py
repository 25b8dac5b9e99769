"""embed: rows of the embedding table."""

from __future__ import annotations

from torch import Tensor

from gptoss_compile.dialect import kernel_op


@kernel_op("embed(Tensor tokens, Tensor weight) -> Tensor",
           fake=lambda tokens, weight: weight.new_empty((tokens.shape[0], weight.shape[1])))
def embed(tokens: Tensor, weight: Tensor) -> Tensor:
    """weight[tokens]: [T, H] of tokens [T] i32 and weight [V, H]."""
    return weight[tokens.long()]
