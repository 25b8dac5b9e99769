"""The kernels' twins against straightforward maths in float64, written loop by loop from the operators' definitions."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gptoss_compile.dialect import MXFP4_VALUES, OPS
from gptoss_compile.kernels import registry  # noqa: F401  declares the operators
from gptoss_compile.kernels.maths import rms_norm
from gptoss_compile.kernels.quantize import mxfp8_quantize

ops = torch.ops.gptoss


def close(got: Tensor, want: np.ndarray, tolerance: float = 2e-5) -> None:
    assert got.shape == want.shape
    assert np.abs(got.double().numpy() - want).max() <= tolerance * max(1.0, np.abs(want).max())


def wide(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return np.stack([row / math.sqrt(sum(v * v for v in row) / len(row) + eps) * weight for row in x])


def dequantised(blocks: Tensor, scales: Tensor) -> np.ndarray:
    """[E, N, K] of MXFP4 blocks, value by value."""
    experts, rows, groups, _ = blocks.shape
    out = np.zeros((experts, rows, groups * 32))
    for index in np.ndindex(experts, rows, groups, 16):
        byte, scale = int(blocks[index]), 2.0 ** (int(scales[index[:3]]) - 127)
        at = index[2] * 32 + 2 * index[3]
        out[index[0], index[1], at : at + 2] = MXFP4_VALUES[byte & 15] * scale, MXFP4_VALUES[byte >> 4] * scale
    return out


def activation(y: np.ndarray, alpha: float, limit: float) -> np.ndarray:
    gate, up = np.minimum(y[0::2], limit), np.clip(y[1::2], -limit, limit)
    return gate / (1 + np.exp(-alpha * gate)) * (up + 1)


def test_dense() -> None:
    x, weight, n, bias = torch.randn(5, 24), torch.randn(7, 24), torch.randn(24), torch.randn(7)
    residual, rows = torch.randn(5, 7), torch.tensor([4, 0, 4], dtype=torch.int32)
    y = norm(wide(x), wide(n), 1e-5) @ wide(weight).T
    close(ops.norm_linear(x, n, weight, bias, 1e-5), y + wide(bias))
    close(ops.norm_head(x, None, n, weight, 1e-5), y)
    close(ops.norm_head(x, rows, n, weight, 1e-5), y[[4, 0, 4]])
    close(ops.linear_residual(x, weight, bias, residual), wide(x) @ wide(weight).T + wide(bias) + wide(residual))


def test_rope_table() -> None:
    positions, frequencies = torch.tensor([-1, 0, 3, 900], dtype=torch.int32), torch.rand(4)
    want = [[[s * f(p * w) for w in wide(frequencies)] for f in (math.cos, math.sin)]
            for s in (1.25,) for p in positions.tolist()]
    close(ops.rope_table(positions, frequencies, 1.25), np.array(want), 2e-4)  # fp32 rounds the angle itself


def test_router() -> None:
    x, weight, n, bias = torch.randn(6, 24), torch.randn(9, 24), torch.randn(24), torch.randn(9)
    probs, ids = ops.norm_route(x, n, weight, bias, 1e-5, 3)
    logits = norm(wide(x), wide(n), 1e-5) @ wide(weight).T + wide(bias)
    for t in range(6):
        best = sorted(range(9), key=lambda e: (-logits[t, e], e))[:3]
        power = np.exp(logits[t, best])
        assert ids[t].tolist() == best
        close(probs[t], power / power.sum())


@pytest.mark.parametrize("mxfp4", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 11])  # few pairs and many: the twins' two ways
def test_experts(tokens: int, mxfp4: bool) -> None:
    experts, top_k, hidden, inner = 7, 2, 32, 64
    x, n, residual = torch.randn(tokens, hidden), torch.randn(hidden), torch.randn(tokens, hidden)
    probs = torch.rand(tokens, top_k)
    ids = torch.tensor([random.sample(range(experts), top_k) for _ in range(tokens)], dtype=torch.int32)
    bias_up, bias_down = torch.randn(experts, 2 * inner), torch.randn(experts, hidden)
    stacks: list[tuple[Tensor, Tensor | None, np.ndarray]] = []
    for rows, columns in ((2 * inner, hidden), (hidden, inner)):
        if mxfp4:
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(119, 125, (experts, rows, columns // 32), dtype=torch.uint8)
            stacks.append((blocks, scales, dequantised(blocks, scales)))
        else:
            weight = torch.randn(experts, rows, columns)
            stacks.append((weight, None, wide(weight)))
    (up, up_scales, up_wide), (down, down_scales, down_wide) = stacks
    normed = norm(wide(x), wide(n), 1e-5)
    h = np.zeros((tokens, top_k, inner))
    y = np.zeros((tokens, top_k, hidden))
    for t, a in np.ndindex(tokens, top_k):
        e = int(ids[t, a])
        h[t, a] = activation(up_wide[e] @ normed[t] + wide(bias_up)[e], 1.702, 7.0)
        y[t, a] = down_wide[e] @ h[t, a] + wide(bias_down)[e]
    total = wide(residual) + (y * wide(probs)[..., None]).sum(1)

    act = (1e-5, 1.702, 7.0)
    close(ops.moe_gate_up(x, n, ids, up, up_scales, bias_up, *act), h)
    close(ops.moe_down(torch.from_numpy(h).float(), ids, probs, down, down_scales, bias_down, residual), total)
    weights = (up, up_scales, bias_up, down, down_scales, bias_down)
    close(ops.moe_grouped(x, n, ids, probs, *weights, *act), wide(x) + total - wide(residual))
    if mxfp4:  # 3 mantissa bits: an error of at most 2^-4 a value
        q, scales = mxfp8_quantize(rms_norm(x, n, 1e-5))
        values = np.array([0.0] * 256)
        values[:] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        decoded = values[q.numpy()] * np.repeat(2.0 ** (wide(scales) - 127), 32, 1)
        assert q.shape == (tokens, 128) and (decoded[:, hidden:] == 0).all()
        assert (np.abs(decoded[:, :hidden] - normed) <= np.abs(normed) * 2**-4 + 1e-3 * np.abs(normed).max()).all()
        assert np.isfinite(decoded).all()
        want = wide(x)
        for t, a in np.ndindex(tokens, top_k):
            e = int(ids[t, a])
            hidden_value = activation(up_wide[e] @ decoded[t, :hidden] + wide(bias_up)[e], 1.702, 7.0)
            want[t] += wide(probs)[t, a] * (down_wide[e] @ hidden_value + wide(bias_down)[e])
        close(ops.moe_grouped_mx(x, n, ids, probs, *weights, *act), want)


@pytest.mark.parametrize("window", [0, 16, 128])
@pytest.mark.parametrize("lengths", [(9,), (1, 1, 1), (4, 1, 6)])
def test_attention(window: int, lengths: tuple[int, ...]) -> None:
    """A history of keys written position by position into the ring, then one step; edges around 127, 128, 129."""
    heads, kv_heads, dim, page = 4, 2, 8, 4
    entries = 40 if not window else -(-(window + 16) // page)
    pages = 1 + len(lengths) * entries
    table = (1 + torch.randperm(pages - 1)).reshape(len(lengths), entries).int()
    cache, sinks = torch.randn(pages, 2, kv_heads, page, dim), torch.randn(heads)
    frequencies = torch.rand(dim // 2)
    sequences, positions, history = [], [], []
    for s, length in enumerate(lengths):
        start = random.choice([0, 100, 126, 127, 128, 129])
        history.append([(torch.randn(kv_heads, dim), torch.randn(kv_heads, dim)) for _ in range(start)])
        for p, (k, v) in enumerate(history[s]):
            row = int(table[s, p // page % entries])
            cache[row, 0, :, p % page], cache[row, 1, :, p % page] = k, v
        sequences += [s] * length
        positions += range(start, start + length)
    count = len(positions)
    at, rows = torch.tensor([*positions, -1]).int(), torch.tensor([*sequences, len(lengths) - 1]).int()
    qkv = torch.randn(count + 1, (heads + 2 * kv_heads) * dim)
    angles = ops.rope_table(at, frequencies, 1.1)
    kept = cache.clone()
    q, stored = ops.rope_kv(qkv, angles, cache, table, rows, at)
    assert torch.equal(cache, kept), "the operator is functional"
    got = ops.attention(q, stored, table, rows, at, sinks, window, 0.3)
    assert got.isfinite().all()

    split = wide(qkv).reshape(count + 1, -1, dim)
    turned = np.zeros_like(split)
    half = dim // 2
    for t in range(count):
        cos, sin = wide(angles)[t]
        a, b = split[t, :, :half], split[t, :, half:]
        turned[t] = np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
    keys = [[wide(k) for k, _ in h] for h in history]
    values = [[wide(v) for _, v in h] for h in history]
    for t in range(count):
        keys[sequences[t]].append(turned[t, heads : heads + kv_heads])
        values[sequences[t]].append(split[t, heads + kv_heads :])
    for t in range(count):
        for head in range(heads):
            p, kv = positions[t], head // (heads // kv_heads)
            seen = range(max(0, p - window + 1) if window else 0, p + 1)
            scores = [0.3 * turned[t, head] @ keys[sequences[t]][n][kv] for n in seen]
            power = np.exp(np.array([*scores, float(sinks[head])]))
            want = sum(w * values[sequences[t]][n][kv] for w, n in zip(power, seen, strict=False)) / power.sum()
            close(got[t, head * dim : (head + 1) * dim], want)
    if all(length == 1 for length in lengths):
        fused, cached = ops.rope_kv_attention(qkv[:-1], angles[:-1], cache, table, rows[:-1], at[:-1], sinks, window,
                                              0.3)
        assert torch.equal(fused, got[:-1]) and torch.equal(cached[1:], stored[1:])


@pytest.mark.parametrize("name", ["rope_kv", "rope_kv_attention"])
def test_twins_that_update_a_cache_trace_without_data(name: str) -> None:
    """index_put on the cache itself, so that Inductor may do it in place."""
    cache, table = torch.randn(9, 2, 2, 4, 8), torch.ones(2, 4, dtype=torch.int32)
    rows, at = torch.zeros(3).int(), torch.arange(3).int()
    arguments = [torch.randn(3, 64), torch.randn(3, 2, 4), cache, table, rows, at]
    if name == "rope_kv_attention":
        arguments += [torch.randn(4), 4, 0.3]
    graph = make_fx(OPS[name].reference, tracing_mode="fake")(*arguments).graph
    puts = [n for n in graph.nodes if n.target == torch.ops.aten.index_put.default]
    assert [n.args[0].op for n in puts] == ["placeholder"]
