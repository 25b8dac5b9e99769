"""GPT-OSS for training: the maths of `gptoss_compile.model`, over whole rows [B, T] instead of a paged cache.

Weights have the names of `logical_tensors`, with dense experts, and embedding and head over the used token ids only
(row 0 is OTHER, which stands for all ids that are never used). Three things are written for speed: rows hold several
conversations, kept apart by masks; every expert computes every token, weighted with zero if it was not chosen; and the
sink of a head is one more key, whose score is the sink and whose value is zero.

Shape suffixes: B rows, T tokens of a row, S keys (T and the padded sink), otherwise as in `gptoss_compile.dialect`.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptoss_compile.config import SWIGLU_ALPHA, ModelConfig
from gptoss_compile.demo.mxfp4 import fake_bf16, fake_quantize
from gptoss_compile.logical import logical_tensors

_PAD = 8  # keys beyond the row's, of which the first is the sink; fused attention wants multiples of 8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x_BNTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x_BNTD.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def weighted_swiglu(x: Tensor, weights: Tensor, limit: float) -> Tensor:
    """SwiGLU of interleaved gate and up [N, E, 2I], times the experts' weights [N, E]: [N, E·I] in x's dtype."""
    gate, up = x[..., ::2].float().clamp(max=limit), x[..., 1::2].float().clamp(min=-limit, max=limit)
    gated = gate * torch.sigmoid(gate * SWIGLU_ALPHA) * (up + 1)
    return (gated * weights.unsqueeze(-1)).to(x.dtype).flatten(1)


class Network(nn.Module):
    """vocabulary: U + 1 classes. quantized: whether weights are seen as a checkpoint keeps them (MXFP4 and bf16).

    plain: whether the elementwise parts run as they are, not compiled.
    """

    def __init__(self, config: ModelConfig, classes: int, seed: int = 0) -> None:
        super().__init__()
        self.config, self.classes, self.quantized = config, classes, False
        self.use_plain_parts()
        self.names = list(dense_shapes(config, classes))
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.ParameterList(nn.Parameter(_initial(name, shape, config, generator))
                                        for name, shape in dense_shapes(config, classes).items())
        self._index = {name: i for i, name in enumerate(self.names)}
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.tensor(config.rope_inverse_frequencies(), dtype=torch.float32))

    def compile_parts(self) -> None:
        """Fuse the elementwise parts; they are compiled when first used."""
        self.plain = False
        self.rms_norm = torch.compile(rms_norm)
        self.rope = torch.compile(rope)
        self.weighted_swiglu = torch.compile(weighted_swiglu)

    def use_plain_parts(self) -> None:
        self.plain = True
        self.rms_norm, self.rope, self.weighted_swiglu = rms_norm, rope, weighted_swiglu

    def weight(self, name: str) -> Tensor:
        value: Tensor = self.weights[self._index[name]]
        if not self.quantized:
            return value
        return fake_quantize(value) if is_expert(name) else fake_bf16(value)

    def forward(self, tokens_BT: Tensor, positions_BT: Tensor, segments_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(normed hidden states [B, T, H], imbalance of the experts, 1 if they are used evenly)."""
        c = self.config
        angles = positions_BT.float().unsqueeze(-1) * self.inv_freq
        cos, sin = ((f(angles) * c.rope_concentration).unsqueeze(1) for f in (torch.cos, torch.sin))
        masks = {window: _mask(positions_BT, segments_BT, window) for window in (0, c.sliding_window)}
        x = F.embedding(tokens_BT, self.weight("embed.weight"))
        imbalance = x.new_zeros(())
        for i in range(c.num_layers):
            normed = self.rms_norm(x, self.weight(f"layers.{i}.attn_norm.weight"), c.rms_eps)
            x = x + self._attention(i, normed, cos, sin, masks[c.sliding_window if c.windowed[i] else 0])
            normed = self.rms_norm(x, self.weight(f"layers.{i}.moe_norm.weight"), c.rms_eps)
            mixed, uneven = self._experts(i, normed.flatten(0, 1))
            x = x + mixed.view_as(x)
            imbalance = imbalance + uneven / c.num_layers
        return self.rms_norm(x, self.weight("norm.weight"), c.rms_eps), imbalance

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight("lm_head.weight")).float()

    def _linear(self, layer: int, name: str, x: Tensor) -> Tensor:
        at = f"layers.{layer}.{name}"
        return F.linear(x, self.weight(f"{at}.weight"), self.weight(f"{at}.bias"))

    def _attention(self, i: int, normed: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        c = self.config

        def heads(x: Tensor, count: int) -> Tensor:
            return x.view(*x.shape[:2], count, c.head_dim).transpose(1, 2)  # [B, N, T, D]

        q = self.rope(heads(self._linear(i, "q", normed), c.num_heads), cos, sin)
        k = self.rope(heads(self._linear(i, "k", normed), c.num_kv_heads), cos, sin)
        v = heads(self._linear(i, "v", normed), c.num_kv_heads)
        k, v = (x.repeat_interleave(c.heads_per_kv, 1) for x in (k, v))
        # One more dimension: 1 in every query, 0 in every key but the sink's, where it is the sink over the scale.
        sink = self.weight(f"layers.{i}.sinks").view(1, -1, 1, 1) * math.sqrt(c.head_dim)
        k = F.pad(k, (0, _PAD, 0, _PAD))
        at = torch.zeros_like(k[:1, :1])
        at[..., normed.shape[1], c.head_dim] = 1.0
        k = k + at * sink
        q = torch.cat((q, torch.ones_like(q[..., :1]), torch.zeros_like(q[..., :_PAD - 1])), -1)
        v = F.pad(v, (0, 0, 0, _PAD))
        device = normed.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else normed.dtype
        out = F.scaled_dot_product_attention(q.to(kind), k.to(kind), v.to(kind), mask, scale=c.head_dim**-0.5)
        return self._linear(i, "o", out.transpose(1, 2).flatten(2))

    def _experts(self, i: int, normed_NH: Tensor) -> tuple[Tensor, Tensor]:
        c = self.config
        with torch.autocast(normed_NH.device.type, enabled=False):  # which experts are chosen must not be rounded
            scores_NE = self._linear(i, "router", normed_NH.float())
        best, ids = torch.topk(scores_NE, c.experts_per_token, -1)
        weights_NE = torch.zeros_like(scores_NE).scatter(-1, ids, torch.softmax(best, -1))
        chosen = torch.zeros_like(scores_NE).scatter(-1, ids, 1.0).mean(0) / c.experts_per_token
        uneven = c.num_experts * (chosen * torch.softmax(scores_NE, -1).mean(0)).sum()  # Fedus et al., 2021, eq. 4
        up = F.linear(normed_NH, self.weight(f"layers.{i}.gate_up.weight").flatten(0, 1),
                      self.weight(f"layers.{i}.gate_up.bias").flatten())
        gated = self.weighted_swiglu(up.view(len(up), c.num_experts, -1), weights_NE, c.swiglu_limit)
        down = self.weight(f"layers.{i}.down.weight").transpose(0, 1).flatten(1)  # [H, E·I]
        return F.linear(gated, down) + weights_NE @ self.weight(f"layers.{i}.down.bias"), uneven


def _mask(positions_BT: Tensor, segments_BT: Tensor, window: int) -> Tensor:
    """[B, 1, T, S] true where a key is seen: of the same conversation, not later, within the window; and the sink."""
    back = positions_BT.unsqueeze(2) - positions_BT.unsqueeze(1)
    seen = (segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)) & (back >= 0)
    if window:
        seen = seen & (back < window)
    sink = torch.arange(_PAD, device=seen.device).eq(0).expand(*seen.shape[:2], _PAD)
    return torch.cat((seen, sink), -1).unsqueeze(1)


def is_expert(name: str) -> bool:
    """Whether a weight is kept in MXFP4."""
    return name.endswith(("gate_up.weight", "down.weight"))


def dense_shapes(config: ModelConfig, classes: int) -> dict[str, tuple[int, ...]]:
    """Every trained weight: those of a BF16 checkpoint, with `classes` rows of embedding and head."""
    dense = dataclasses.replace(config, expert_format="bf16", vocab_size=classes)
    return {name: info.shape for name, info in logical_tensors(dense).items()}


def _initial(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(shape)
    if name.endswith((".bias", "sinks")):
        return torch.zeros(shape)
    deviation = 0.5 / math.sqrt(shape[-1])
    if name == "embed.weight":
        deviation = 0.3
    elif name.endswith(("o.weight", "down.weight")):
        deviation /= math.sqrt(2 * config.num_layers)
    return torch.randn(shape, generator=generator) * deviation
