"""GPT-OSS in plain PyTorch, one step over flat tokens: what gets traced.

Written to be read beside OpenAI's reference (gpt_oss/torch/model.py). Everything PyTorch can say is said in tensor
operations; only the paged cache, packed MXFP4 weights and what ranks exchange are `gptoss::` operators. The passes raise
the idioms below (RMSNorm, RoPE, router, SwiGLU, attention with sinks) back to operators, fuse and lower them.

Shape suffixes: see `gptoss_compile.dialect`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss_compile import dialect  # noqa: F401  registers the gptoss:: operators
from gptoss_compile.config import SWIGLU_ALPHA, ModelConfig
from gptoss_compile.sharding import spans

ops = torch.ops.gptoss


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, in fp32, rounded to x's dtype at the end (Zhang & Sennrich, 2019)."""
    wide_TH = x_TH.to(torch.float32)
    scaled_TH = wide_TH * torch.rsqrt(wide_TH.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled_TH * weight_H.to(torch.float32)).to(x_TH.dtype)


def rope_table(positions_T: Tensor, inv_freq: Tensor, concentration: float) -> Tensor:
    """[T, 2, D/2]: cos and sin of position · inverse frequency, times YaRN's concentration. fp32."""
    angles = positions_T.to(torch.float32).unsqueeze(-1) * inv_freq
    return torch.stack((angles.cos(), angles.sin()), 1) * concentration


def rope(x_TND: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotates the pairs (x[d], x[d + D/2]) of every head by the position's angles, in fp32."""
    cos, sin = cos_sin[:, 0].unsqueeze(1), cos_sin[:, 1].unsqueeze(1)
    first, second = x_TND.to(torch.float32).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x_TND.dtype)


def attend(q_TQD: Tensor, k_TCKD: Tensor, v_TCKD: Tensor, positions_T: Tensor, sinks_Q: Tensor, window: int,
           scale: float) -> Tensor:
    """Attention over the keys a token's table addresses, with one learnt sink logit a head in the softmax's sum.

    Entry j of a ring of C keys, seen from position p, holds position p - ((p - j) mod C); it is visible if that is not
    negative and, in a window layer (window > 0), less than `window` back. Returns [T, Q·D].
    """
    tokens, capacity, kv_heads, dim = k_TCKD.shape
    q_TKGD = q_TQD.to(torch.float32).view(tokens, kv_heads, -1, dim)
    scores = torch.einsum("tkgd,tckd->tkgc", q_TKGD, k_TCKD.to(torch.float32)) * scale
    back_TC = torch.remainder(positions_T.unsqueeze(1) - torch.arange(capacity, device=q_TQD.device), capacity)
    hidden_TC = back_TC > positions_T.unsqueeze(1)
    if window:
        hidden_TC = hidden_TC | (back_TC >= window)
    scores = scores.masked_fill(hidden_TC.view(tokens, 1, 1, capacity), float("-inf"))
    sinks = sinks_Q.to(torch.float32).view(1, kv_heads, -1, 1).expand(tokens, -1, -1, -1)
    weights = torch.softmax(torch.cat((scores, sinks), -1), -1)[..., :-1]
    out = torch.einsum("tkgc,tckd->tkgd", weights, v_TCKD.to(torch.float32))
    return out.reshape(tokens, -1).to(q_TQD.dtype)


def route(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k experts of each token, by logit, and the softmax over those logits: (probs [T, A] fp32, ids [T, A])."""
    best_TA, ids_TA = torch.topk(logits_TE.to(torch.float32), top_k, -1)
    return torch.softmax(best_TA, -1), ids_TA.to(torch.int32)


def swiglu(x: Tensor, alpha: float, limit: float) -> Tensor:
    """gate · sigmoid(alpha · gate) · (up + 1) with gate and up interleaved, clamped: gate <= limit, |up| <= limit."""
    gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(min=-limit, max=limit)
    return gate * torch.sigmoid(gate * alpha) * (up + 1)


class Experts(nn.Module):
    """One expert projection for all experts: MXFP4 blocks and scales, or BF16 weights, with a bias."""

    def __init__(self, config: ModelConfig, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        experts, groups = config.num_experts, inputs // 32
        if config.expert_format == "mxfp4":
            self.blocks = _parameter((experts, outputs, groups, 16), torch.uint8)
            self.scales = _parameter((experts, outputs, groups), torch.uint8)
        else:
            self.weight = _parameter((experts, outputs, inputs), dtype)
        self.bias = _parameter((experts, outputs), dtype)

    def forward(self, x: Tensor, ids_TA: Tensor) -> Tensor:
        """x [T, A, inputs] (or A = 1, the same input for every expert) -> fp32 [T, A, outputs]."""
        packed = hasattr(self, "blocks")
        weight = ops.mxfp4_dequantize(self.blocks, self.scales, self.bias.dtype) if packed else self.weight
        chosen, bias = weight[ids_TA.long()], self.bias[ids_TA.long()]
        product = torch.einsum("tai,taoi->tao", x.expand(-1, ids_TA.shape[1], -1).to(torch.float32),
                               chosen.to(torch.float32))
        return product + bias.to(torch.float32)


class Layer(nn.Module):
    """One transformer layer. With several ranks the projections back into the residual stream give partial sums."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, ranks: int) -> None:
        super().__init__()
        self.config, self.window = config, config.sliding_window if config.windowed[index] else 0
        self.reduce = ops.all_reduce if ranks > 1 else nn.Identity()
        self.attn_norm = _Vector((config.hidden,), dtype)
        self.q = _Linear(config.hidden, config.q_size, dtype)
        self.k = _Linear(config.hidden, config.kv_size, dtype)
        self.v = _Linear(config.hidden, config.kv_size, dtype)
        self.o = _Linear(config.q_size, config.hidden, dtype)
        self.sinks = _parameter((config.num_heads,), dtype)
        self.moe_norm = _Vector((config.hidden,), dtype)
        self.router = _Linear(config.hidden, config.num_experts, dtype)
        self.gate_up = Experts(config, 2 * config.intermediate, config.hidden, dtype)
        self.down = Experts(config, config.hidden, config.intermediate, dtype)

    def forward(self, x_TH: Tensor, cos_sin: Tensor, cache: Tensor, table: Tensor, sequences: Tensor,
                positions: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        normed = rms_norm(x_TH, self.attn_norm.weight, c.rms_eps)
        q = rope(self.q(normed).view(-1, c.num_heads, c.head_dim), cos_sin)
        k = rope(self.k(normed).view(-1, c.num_kv_heads, c.head_dim), cos_sin)
        v = self.v(normed).view(-1, c.num_kv_heads, c.head_dim)
        cache = ops.kv_write(cache, k, v, table, sequences, positions)
        keys, values = ops.kv_read(cache, table, sequences)
        attended = attend(q, keys, values, positions, self.sinks, self.window, c.head_dim**-0.5)
        x_TH = x_TH + self.reduce(self.o(attended))

        normed = rms_norm(x_TH, self.moe_norm.weight, c.rms_eps)
        probs, ids = route(self.router(normed), c.experts_per_token)
        gated = swiglu(self.gate_up(normed.unsqueeze(1), ids), SWIGLU_ALPHA, c.swiglu_limit).to(x_TH.dtype)
        mixed = (self.down(gated, ids) * probs.unsqueeze(-1)).sum(1)
        return x_TH + self.reduce(mixed.to(x_TH.dtype)), cache


class Model(nn.Module):
    """One step of a bucket. Inputs are those of the runtime's step (see `trace.step_inputs`), then one cache a layer.

    With several ranks, as one of them runs it: config is the rank's (see `sharding`), and lm_head has its rows alone.
    Returns (logits [R, V] fp32, new caches...).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, ranks: int = 1, rank: int = 0) -> None:
        super().__init__()
        self.config, self.dtype, self.ranks = config, dtype, ranks
        self.embed = _Vector((config.vocab_size, config.hidden), dtype)
        self.layers = nn.ModuleList(Layer(config, i, dtype, ranks) for i in range(config.num_layers))
        self.norm = _Vector((config.hidden,), dtype)
        first, last = spans(config.vocab_size, ranks)[rank]
        self.lm_head = _Vector((last - first, config.hidden), dtype)
        self.rope = _Vector((config.head_dim // 2,), torch.float32)

    def forward(self, tokens: Tensor, positions: Tensor, sequences: Tensor, full_table: Tensor, window_table: Tensor,
                rows: Tensor | None, caches: list[Tensor]) -> tuple[Tensor, ...]:
        cos_sin = rope_table(positions, self.rope.weight, self.config.rope_concentration)
        x_TH = F.embedding(tokens, self.embed.weight)
        written = []
        for layer, cache in zip(self.layers, caches, strict=True):
            table = window_table if layer.window else full_table
            x_TH, cache = layer(x_TH, cos_sin, cache, table, sequences, positions)
            written.append(cache)
        normed = rms_norm(x_TH, self.norm.weight, self.config.rms_eps)
        if rows is not None:
            normed = normed[rows.long()]
        logits = F.linear(normed, self.lm_head.weight).to(torch.float32)
        if self.ranks > 1:
            logits = ops.all_gather(logits, self.config.vocab_size)
        return (logits, *written)


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class _Vector(nn.Module):
    """A bare weight, so that its name ends in `.weight` as in every checkpoint."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(shape, dtype)


class _Linear(nn.Module):
    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.bias = _parameter((outputs, inputs), dtype), _parameter((outputs,), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

