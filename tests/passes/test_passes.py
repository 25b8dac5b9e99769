"""Every pass on a function of its own, before and after: structure and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gptoss_compile.config import SWIGLU_ALPHA, Bucket, ModelConfig
from gptoss_compile.kernels import registry  # noqa: F401
from gptoss_compile.model import attend, rms_norm, rope, rope_table, route, swiglu
from gptoss_compile.passes.base import Context, PassResult
from gptoss_compile.passes.canonicalize import CANONICALIZE
from gptoss_compile.passes.fuse_allreduce_rms_norm import FUSE_ALLREDUCE_RMS_NORM
from gptoss_compile.passes.fuse_norm_linear import FUSE_NORM_LINEAR
from gptoss_compile.passes.fuse_pad_quant import FUSE_PAD_QUANT
from gptoss_compile.passes.fuse_residual import FUSE_RESIDUAL
from gptoss_compile.passes.fuse_rope_kv import FUSE_ROPE_KV
from gptoss_compile.passes.lower_attention_sinks import LOWER_ATTENTION_SINKS
from gptoss_compile.passes.lower_ends import LOWER_EMBEDDING, LOWER_HEAD
from gptoss_compile.passes.lower_moe import LOWER_MOE
from gptoss_compile.passes.lower_router import LOWER_ROUTER
from gptoss_compile.passes.merge_qkv import MERGE_QKV
from gptoss_compile.passes.place_pdl import PLACE_PDL
from gptoss_compile.passes.raise_attention_sinks import RAISE_ATTENTION_SINKS
from gptoss_compile.passes.raise_experts import RAISE_EXPERTS
from gptoss_compile.passes.raise_rms_norm import RAISE_RMS_NORM
from gptoss_compile.passes.raise_rope import RAISE_ROPE, RAISE_ROPE_TABLE
from gptoss_compile.passes.raise_router import RAISE_ROUTER
from gptoss_compile.passes.raise_swiglu import RAISE_SWIGLU
from gptoss_compile.passes.select_kernels import SELECT_KERNELS
from gptoss_compile.target import Target
from gptoss_compile.testing import check_rewrite, difference, function_graph, random_weight, tiny_context
from gptoss_compile.trace import trace_function

ops = torch.ops.gptoss
MODEL = ModelConfig(num_layers=2, hidden=2880, intermediate=2880, num_heads=64, num_kv_heads=8, head_dim=64, num_experts=128,
                    experts_per_token=4, vocab_size=201088, sliding_window=128, windowed=(True, False))
EPS = MODEL.rms_eps


def context(kind: str = "extend", target: str = "cpu", **changes: object) -> Context:
    config = dataclasses.replace(MODEL, **changes)  # type: ignore[arg-type]
    bucket = Bucket.decode(3) if kind == "decode" else Bucket.extend(24, 3)
    return tiny_context(config, bucket, Target.parse(target))


CTX = context()
T, H, I = CTX.bucket.tokens, CTX.config.hidden, CTX.config.intermediate
E, A, V = CTX.config.num_experts, CTX.config.experts_per_token, CTX.config.vocab_size
Q, K, D = CTX.config.num_heads, CTX.config.num_kv_heads, CTX.config.head_dim
x, vector = CTX.example(T, H), CTX.example(H)
QKV = (CTX.config.q_size, CTX.config.kv_size, CTX.config.kv_size)


def ints(*shape: int) -> Tensor:
    return CTX.example(*shape, dtype=torch.int32)


def experts(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    return (CTX.example(E, outputs, inputs // 32, 16, dtype=torch.uint8),
            CTX.example(E, outputs, inputs // 32, dtype=torch.uint8), CTX.example(E, outputs))


def distinct_ids(tokens: int) -> Tensor:
    """A router never gives a token the same expert twice."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack([torch.randperm(E, generator=generator)[:A] for _ in range(tokens)]).to(torch.int32)


def test_canonicalize() -> None:
    """Removes what does nothing and keeps what does something."""
    graph = trace_function(lambda x: (x.to(torch.float32).view(T, H)[:, :].to(torch.bfloat16).view(H, T)[1:],), [x])
    result = CANONICALIZE.run(graph, CTX)
    left = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    assert left == ["aten.to.dtype", "aten.view.default", "aten.slice.Tensor"]
    assert result.matches >= 3


def test_raise_rms_norm() -> None:
    check_rewrite(RAISE_RMS_NORM, CTX, lambda x, g: (rms_norm(x, g, EPS),), lambda x, g: (ops.rms_norm(x, g, EPS),),
                  [x, vector])


def test_raise_rms_norm_wants_this_epsilon() -> None:
    with pytest.raises(AssertionError, match=r"matched 0 times.*argument 0\.5 of aten\.add"):
        check_rewrite(RAISE_RMS_NORM, CTX, lambda x, g: (rms_norm(x, g, 0.5),), lambda x, g: (x,), [x, vector])


def test_raise_rope_table() -> None:
    scale = CTX.config.rope_concentration
    check_rewrite(RAISE_ROPE_TABLE, CTX, lambda p, f: (rope_table(p, f, scale),),
                  lambda p, f: (ops.rope_table(p, f, scale),),
                  [ints(T), CTX.example(D // 2)])


@pytest.mark.parametrize("heads", [Q, K])
def test_raise_rope(heads: int) -> None:
    check_rewrite(RAISE_ROPE, CTX, lambda x, t: (rope(x, t),), lambda x, t: (ops.rope(x, t),),
                  [CTX.example(T, heads, D), CTX.example(T, 2, D // 2)])


def test_raise_router() -> None:
    check_rewrite(RAISE_ROUTER, CTX, lambda logits: route(logits, A), lambda logits: tuple(ops.route(logits, A)),
                  [CTX.example(T, E)])


def test_raise_swiglu() -> None:
    limit = CTX.config.swiglu_limit
    check_rewrite(RAISE_SWIGLU, CTX, lambda x: (swiglu(x, SWIGLU_ALPHA, limit),),
                  lambda x: (ops.swiglu(x, SWIGLU_ALPHA, limit),), [CTX.example(T, A, 2 * I)])


@pytest.mark.parametrize("windowed", [True, False])
def test_raise_attention_sinks(windowed: bool) -> None:
    window, scale = CTX.window(windowed), D**-0.5

    def before(q: Tensor, cache: Tensor, table: Tensor, sequences: Tensor, positions: Tensor,
               sinks: Tensor) -> tuple[Tensor]:
        keys, values = ops.kv_read(cache, table, sequences)
        return (attend(q, keys, values, positions, sinks, window, scale),)

    check_rewrite(RAISE_ATTENTION_SINKS, CTX, before, lambda *a: (ops.attention(*a, window, scale),),
                  [CTX.example(T, Q, D), *CTX.paged_examples(windowed), ints(T), ints(T), CTX.example(Q)])


@pytest.mark.parametrize("copies", [1, A])
def test_raise_experts(copies: int) -> None:
    def before(x: Tensor, ids: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor) -> tuple[Tensor]:
        chosen, offset = ops.mxfp4_dequantize(blocks, scales, bias.dtype)[ids.long()], bias[ids.long()]
        return (torch.einsum("tai,taoi->tao", x.expand(-1, ids.shape[1], -1), chosen) + offset,)

    sizes = (2 * I, H) if copies == 1 else (H, I)
    check_rewrite(RAISE_EXPERTS, CTX, before, lambda x, i, w, s, b: (ops.experts_linear(x, i, w, s, b),),
                  [CTX.example(T, copies, sizes[1]), ints(T, A), *experts(*sizes)])


def test_merge_qkv() -> None:
    def before(x: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, p[0], p[1]), F.linear(x, p[2], p[3]), F.linear(x, p[4], p[5])

    def after(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return torch.split(F.linear(x, weight, bias), list(QKV), -1)

    check_rewrite(MERGE_QKV, CTX, before, after, [x, *(t for n in QKV for t in (CTX.example(n, H), CTX.example(n)))],
                  after_examples=[x, CTX.example(sum(QKV), H), CTX.example(sum(QKV))])


def test_fuse_rope_kv() -> None:
    def before(qkv: Tensor, t: Tensor, cache: Tensor, table: Tensor, s: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = qkv.split(list(QKV), -1)
        q, k = ops.rope(q.view(-1, Q, D), t), ops.rope(k.view(-1, K, D), t)
        return q, ops.kv_write(cache, k, v.view(-1, K, D), table, s, p)

    check_rewrite(FUSE_ROPE_KV, CTX, before, lambda *a: tuple(ops.rope_kv(*a)),
                  [CTX.example(T, sum(QKV)), CTX.example(T, 2, D // 2), *CTX.paged_examples(True), ints(T), ints(T)])


def test_fuse_allreduce_rms_norm() -> None:
    def before(partial: Tensor, residual: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + ops.all_reduce(partial)
        return total, ops.rms_norm(total, g, EPS)

    check_rewrite(FUSE_ALLREDUCE_RMS_NORM, CTX, before, lambda p, r, g: tuple(ops.allreduce_add_rms_norm(p, r, g, EPS)),
                  [x, x, vector])


def test_fuse_norm_linear() -> None:
    check_rewrite(FUSE_NORM_LINEAR, CTX, lambda x, g, w, b: (F.linear(ops.rms_norm(x, g, EPS), w, b),),
                  lambda x, g, w, b: (ops.norm_linear(x, g, w, b, EPS),),
                  [x, vector, CTX.example(sum(QKV), H), CTX.example(sum(QKV))])


def test_fuse_residual() -> None:
    check_rewrite(FUSE_RESIDUAL, CTX, lambda r, x, w, b: (r + F.linear(x, w, b),),
                  lambda r, x, w, b: (ops.linear_residual(x, w, b, r),),
                  [x, CTX.example(T, QKV[0]), CTX.example(H, QKV[0]), vector])


def test_lower_embedding() -> None:
    check_rewrite(LOWER_EMBEDDING, CTX, lambda t, w: (F.embedding(t, w),), lambda t, w: (ops.embed(t, w),),
                  [ints(T), CTX.example(V, H)])


@pytest.mark.parametrize("kind", ["decode", "extend"])
def test_lower_head(kind: str) -> None:
    ctx = context(kind)
    tokens = ctx.example(ctx.bucket.tokens, H)
    if kind == "decode":
        check_rewrite(LOWER_HEAD, ctx, lambda x, g, w: (F.linear(ops.rms_norm(x, g, EPS), w),),
                      lambda x, g, w: (ops.norm_head(x, None, g, w, EPS),), [tokens, vector, CTX.example(V, H)])
    else:
        check_rewrite(LOWER_HEAD, ctx, lambda x, g, w, r: (F.linear(ops.rms_norm(x, g, EPS)[r.long()], w),),
                      lambda x, g, w, r: (ops.norm_head(x, r, g, w, EPS),),
                      [tokens, vector, CTX.example(V, H), ints(ctx.bucket.rows)])


def test_lower_router() -> None:
    check_rewrite(LOWER_ROUTER, CTX, lambda x, g, w, b: tuple(ops.route(F.linear(ops.rms_norm(x, g, EPS), w, b), A)),
                  lambda x, g, w, b: tuple(ops.norm_route(x, g, w, b, EPS, A)),
                  [x, vector, CTX.example(E, H), CTX.example(E)])


@pytest.mark.parametrize("tokens", [2, 24])
def test_lower_moe(tokens: int) -> None:
    """Few tokens run pair by pair, many grouped by expert."""
    ctx = dataclasses.replace(CTX, bucket=Bucket.extend(tokens, 1))
    limit, act = ctx.config.swiglu_limit, (EPS, SWIGLU_ALPHA, ctx.config.swiglu_limit)

    def before(x: Tensor, g: Tensor, i: Tensor, p: Tensor, uw: Tensor, us: Tensor, ub: Tensor, dw: Tensor, ds: Tensor,
               db: Tensor) -> tuple[Tensor]:
        h = ops.swiglu(ops.experts_linear(ops.rms_norm(x, g, EPS).unsqueeze(1), i, uw, us, ub), SWIGLU_ALPHA, limit)
        return (x + (ops.experts_linear(h, i, dw, ds, db) * p.unsqueeze(-1)).sum(1),)

    def after(x: Tensor, g: Tensor, i: Tensor, p: Tensor, uw: Tensor, us: Tensor, ub: Tensor, dw: Tensor, ds: Tensor,
              db: Tensor) -> tuple[Tensor]:
        if tokens == 2:
            return (ops.moe_down(ops.moe_gate_up(x, g, i, uw, us, ub, *act), i, p, dw, ds, db, x),)
        return (ops.moe_grouped(x, g, i, p, uw, us, ub, dw, ds, db, *act),)

    check_rewrite(LOWER_MOE, ctx, before, after, [
        ctx.example(tokens, H), vector, ints(tokens, A), CTX.example(tokens, A), *experts(2 * I, H), *experts(H, I)],
        values={2: distinct_ids(tokens)})


# ------------------------------------------------------------------------------------------------ several ranks

TWO = dataclasses.replace(CTX, ranks=2)


def test_fuse_norm_linear_behind_an_exchange() -> None:
    def before(p: Tensor, r: Tensor, g: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total, normed = ops.allreduce_add_rms_norm(p, r, g, EPS)
        return F.linear(normed, w, b), total

    def after(p: Tensor, r: Tensor, g: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total, projected = ops.reduce_norm_linear(p, r, g, w, b, EPS)
        return projected, total

    check_rewrite(FUSE_NORM_LINEAR, TWO, before, after, [x, x, vector, CTX.example(sum(QKV), H), CTX.example(sum(QKV))])


def test_lower_router_behind_an_exchange() -> None:
    """The residual stream and its norm stay available: the experts need them."""
    def before(p: Tensor, r: Tensor, g: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        total, normed = ops.allreduce_add_rms_norm(p, r, g, EPS)
        return *ops.route(F.linear(normed, w, b), A), total, normed

    def after(p: Tensor, r: Tensor, g: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        total, probs, ids = ops.reduce_norm_route(p, r, g, w, b, EPS, A)
        return probs, ids, total, ops.rms_norm(total, g, EPS)

    check_rewrite(LOWER_ROUTER, TWO, before, after, [x, x, vector, CTX.example(E, H), CTX.example(E)])


@pytest.mark.parametrize("kind", ["decode", "extend"])
def test_lower_head_behind_an_exchange(kind: str) -> None:
    ctx = dataclasses.replace(context(kind), ranks=2)
    tokens, head = ctx.example(ctx.bucket.tokens, H), ctx.example(ctx.head_rows, H)
    rows = [] if kind == "decode" else [ints(ctx.bucket.rows)]

    def before(p: Tensor, r: Tensor, g: Tensor, w: Tensor, *rows: Tensor) -> tuple[Tensor]:
        normed = ops.allreduce_add_rms_norm(p, r, g, EPS)[1]
        return (F.linear(normed[rows[0].long()] if rows else normed, w),)

    def after(p: Tensor, r: Tensor, g: Tensor, w: Tensor, *rows: Tensor) -> tuple[Tensor]:
        return (ops.reduce_norm_head(p, r, rows[0] if rows else None, g, w, EPS),)

    assert ctx.head_rows == V // 2
    check_rewrite(LOWER_HEAD, ctx, before, after, [tokens, tokens, vector, head, *rows])


def test_fuse_residual_gives_partial_sums() -> None:
    check_rewrite(FUSE_RESIDUAL, TWO, lambda x, w, b: (F.linear(x, w, b),), lambda x, w, b: (ops.linear_partial(x, w, b),),
                  [CTX.example(T, QKV[0]), CTX.example(H, QKV[0]), vector])


@pytest.mark.parametrize("tokens", [2, 24])
def test_lower_moe_gives_partial_sums(tokens: int) -> None:
    ctx = dataclasses.replace(TWO, bucket=Bucket.extend(tokens, 1))
    limit, act = ctx.config.swiglu_limit, (EPS, SWIGLU_ALPHA, ctx.config.swiglu_limit)

    def before(x: Tensor, g: Tensor, i: Tensor, p: Tensor, *w: Tensor) -> tuple[Tensor]:
        h = ops.swiglu(ops.experts_linear(ops.rms_norm(x, g, EPS).unsqueeze(1), i, *w[:3]), SWIGLU_ALPHA, limit)
        return ((ops.experts_linear(h, i, *w[3:]) * p.unsqueeze(-1)).sum(1),)

    def after(x: Tensor, g: Tensor, i: Tensor, p: Tensor, *w: Tensor) -> tuple[Tensor]:
        if tokens == 2:
            return (ops.moe_down_partial(ops.moe_gate_up(x, g, i, *w[:3], *act, 0), i, p, *w[3:]),)
        return (ops.moe_grouped_partial(x, g, i, p, *w, *act),)

    check_rewrite(LOWER_MOE, ctx, before, after, [
        ctx.example(tokens, H), vector, ints(tokens, A), CTX.example(tokens, A), *experts(2 * I, H), *experts(H, I)],
        values={2: distinct_ids(tokens)})


@pytest.mark.parametrize("windowed", [True, False])
def test_lower_attention_sinks(windowed: bool) -> None:
    ctx, scale = context("decode"), D**-0.5
    window, n = ctx.window(windowed), ctx.bucket.tokens

    def before(qkv: Tensor, t: Tensor, c: Tensor, table: Tensor, s: Tensor, p: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, written = ops.rope_kv(qkv, t, c, table, s, p)
        return ops.attention(q, written, table, s, p, k, window, scale), written

    check_rewrite(LOWER_ATTENTION_SINKS, ctx, before, lambda *a: tuple(ops.rope_kv_attention(*a, window, scale)),
                  [ctx.example(n, sum(QKV)), ctx.example(n, 2, D // 2), *ctx.paged_examples(windowed), ints(n), ints(n),
                   ctx.example(Q)])


def test_extend_keeps_attention_apart() -> None:
    assert LOWER_ATTENTION_SINKS.expect(CTX) == 0 and LOWER_ATTENTION_SINKS.expect(context("decode")) == 2


def test_fuse_pad_quant() -> None:
    """What the pass trades: the numbers may move by e4m3's three mantissa bits, and must move at all."""
    ctx = dataclasses.replace(context(target="sm100"), dtype=torch.bfloat16)
    half = torch.bfloat16
    act = (SWIGLU_ALPHA, ctx.config.swiglu_limit)
    generator = torch.Generator().manual_seed(3)

    def value(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return random_weight(shape, dtype, generator)

    ids, probs = distinct_ids(T), torch.ones(T, A)
    weights = [value(*shape, dtype=dtype) for rows, columns in ((2 * I, H), (H, I))
               for shape, dtype in (((E, rows, columns // 32, 16), torch.uint8), ((E, rows, columns // 32), torch.uint8),
                                    ((E, rows), half))]
    inputs, g = torch.randn(T, H, generator=generator).to(half), torch.ones(H, dtype=half)
    exact = ops.moe_grouped(inputs, g, ids, probs, *weights, EPS, *act) - inputs
    rounded = ops.moe_grouped_mx(inputs, g, ids, probs, *weights, EPS, *act) - inputs
    gap = difference([exact.float()], [rounded.float()])
    assert 1e-3 < gap < 8e-2, gap
    assert FUSE_PAD_QUANT.expect(ctx) == 2
    assert FUSE_PAD_QUANT.expect(dataclasses.replace(ctx, target=Target.parse("sm90"))) == 0


def test_select_kernels_names_what_is_left() -> None:
    graph = function_graph(lambda x, g: (ops.rms_norm(x, g, EPS) * 2,), [x, vector])
    result = SELECT_KERNELS.run(graph, context(target="sm90"))
    assert (result.matches, result.expected) == (0, 2)
    assert "rms_norm" in str(result.near_misses[0]) and "no kernel operator" in str(result.near_misses[0])


def launched(function: Callable[..., object], examples: list[Tensor], target: str = "sm90") -> tuple[PassResult, fx.Graph]:
    """The graph of kernels that a function is, with kernels chosen and PDL placed."""
    graph, ctx = function_graph(function, examples), context(target=target)
    assert SELECT_KERNELS.run(graph, ctx).matches == SELECT_KERNELS.run(graph, ctx).expected
    return PLACE_PDL.run(graph, ctx), graph


def linear_chain(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> tuple[Tensor]:
    return (ops.linear_residual(ops.linear_residual(x, w, b, r), w, b, r),)


def test_place_pdl() -> None:
    examples = [x, CTX.example(H, H), vector, x]
    assert launched(linear_chain, examples, "gfx950")[0].matches == 0
    result, graph = launched(linear_chain, examples)
    assert (result.matches, result.expected) == (1, 1)
    first, second = [n for n in graph.nodes if n.op == "call_function"]
    assert not first.meta.get("pdl") and second.meta["pdl"]


def test_what_a_kernel_reads_before_its_wait_must_be_complete() -> None:
    """moe_gate_up reads x early. That is sound behind the router, which waits before it lets others start, and a compile
    error where x comes from the kernel right before."""
    act = (EPS, SWIGLU_ALPHA, CTX.config.swiglu_limit)

    def behind_the_router(x: Tensor, w: Tensor, b: Tensor, g: Tensor, rw: Tensor, rb: Tensor, *up: Tensor) -> tuple[Tensor]:
        y = ops.linear_residual(x, w, b, x)
        _, ids = ops.norm_route(y, g, rw, rb, EPS, A)
        return (ops.moe_gate_up(y, g, ids, up[0], up[1], up[2], *act),)

    def without_it(x: Tensor, w: Tensor, b: Tensor, g: Tensor, ids: Tensor, *up: Tensor) -> tuple[Tensor]:
        return (ops.moe_gate_up(ops.linear_residual(x, w, b, x), g, ids, up[0], up[1], up[2], *act),)

    shared = [x, CTX.example(H, H), vector, vector]
    good, _ = launched(behind_the_router, [*shared, CTX.example(E, H), CTX.example(E), *experts(2 * I, H)])
    assert good.matches == good.expected == 2
    bad, _ = launched(without_it, [*shared, ints(T, A), *experts(2 * I, H)])
    assert bad.matches != bad.expected and "it reads x before its wait" in str(bad.near_misses[0])
