"""Cache read + masked scores + softmax with a sink column + weighted values -> gptoss::attention, one a layer."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from gptoss_compile.match import call
from gptoss_compile.passes.base import Context, Pass, PassResult, rewrite


def attention(q: Tensor, cache: Tensor, table: Tensor, sequences: Tensor, positions: Tensor, sinks: Tensor, *,
              window: int, scale: float) -> Tensor:
    """The idiom as the model writes it; see `model.attend` for the maths."""
    keys, values = torch.ops.gptoss.kv_read(cache, table, sequences)
    tokens, capacity, kv_heads, _ = keys.shape
    grouped = q.to(torch.float32).view(tokens, kv_heads, -1, q.shape[-1])
    scores = torch.einsum("tkgd,tckd->tkgc", grouped, keys.to(torch.float32)) * scale
    back = torch.remainder(positions.unsqueeze(1) - torch.arange(capacity, device=q.device), capacity)
    hidden = back > positions.unsqueeze(1)
    if window:
        hidden = hidden | (back >= window)
    scores = scores.masked_fill(hidden.view(tokens, 1, 1, capacity), float("-inf"))
    column = sinks.to(torch.float32).view(1, kv_heads, -1, 1).expand(tokens, -1, -1, -1)
    weights = torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1]
    out = torch.einsum("tkgc,tckd->tkgd", weights, values.to(torch.float32))
    return out.reshape(tokens, -1).to(q.dtype)


def run(graph: fx.Graph, ctx: Context) -> PassResult:
    c, scale = ctx.config, ctx.config.head_dim**-0.5
    q, index = ctx.example(ctx.bucket.tokens, c.num_heads, c.head_dim), ctx.example(ctx.bucket.tokens, dtype=torch.int32)
    results: list[PassResult] = []
    for windowed in ctx.layer_kinds:
        window = ctx.window(windowed)
        examples = (q, *ctx.paged_examples(windowed), index, index, ctx.example(c.num_heads))
        results.append(rewrite(
            graph, ctx.after(results), lambda *x, w=window: (attention(*x, window=w, scale=scale),), [examples],
            lambda *x, w=window: call(graph, torch.ops.gptoss.attention.default, *x, w, scale)))
    return PassResult.sum(results)


RAISE_ATTENTION_SINKS = Pass("raise_attention_sinks", run, lambda ctx: ctx.config.num_layers, "rtol")
