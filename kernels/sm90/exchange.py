"""The kernels of several ranks on Hopper: their one-rank namesakes' with an exchange in front or behind.

Up to FEW_TOKENS tokens values are pushed into slots: producers are variants of gemv.cu and moe_pair.cu, consumers of gemv.cu
and route_few.cu, or exchange_slots.cu comes first. Above, exchange_rows.cu comes before the launches of the consumer's
namesake, and producers store as ever; but above ONE_SHOT_TOKENS each row on the rank whose share it is in. Experts in BF16,
which these do not take, run in the kernels of all targets: exchange_push.cu behind them pushes few tokens' sums, and
moe_combine takes the place of their last where there are many. See exchange.cuh for the exchange itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from gptoss_compile.kernels import moe
from gptoss_compile.kernels import moe_grouped as any_moe_grouped
from gptoss_compile.kernels.common import cdiv, cuda_launch, integer, tensor
from gptoss_compile.kernels.exchange import FEW_TOKENS, ONE_SHOT_TOKENS
from gptoss_compile.kernels.sm90 import gemv, linear, moe_grouped, moe_pair, router
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target

MOST_RANKS = 8
COLLECT_TOKENS = 2  # above, the blocks of a projection would read more slots than a launch of its own costs
BLOCKS = 2  # of exchange_rows.cu on a processor
ROW_THREADS, SLOT_THREADS, GATHER_THREADS = 256, 128, 256
IN_FLIGHT = 8  # loads of 16 bytes of a thread of exchange_rows.cu


# ---- producers --------------------------------------------------------------------------------------


def linear_partial_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    x, features = tensor(operands, "x"), tensor(operands, "weight").shape[0]
    if x.shape[0] > FEW_TOKENS:
        return linear.launches(target, operands, push=x.shape[0] > ONE_SHOT_TOKENS)
    return (gemv.gemv_launch(target, operands, TensorSpec((x.shape[0], features), "fp32"), push=True),)


def moe_down_partial_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    return moe_pair.down_supports(target, operands) and tensor(operands, "h").shape[0] <= FEW_TOKENS


def moe_grouped_partial_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    return moe_grouped.supports(target, operands) and tensor(operands, "x").shape[0] > FEW_TOKENS


def moe_grouped_partial_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    push = tensor(operands, "x").shape[0] > ONE_SHOT_TOKENS
    return moe_grouped.launches(target, operands, residual=False, push=push)


def any_moe_down_partial_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    return target.name == "sm90" and tensor(operands, "h").shape[0] <= FEW_TOKENS


def any_moe_down_partial_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """The launch of all targets, and one that pushes what it gives."""
    (down,), tokens = moe.down_launch(target, operands), tensor(operands, "h").shape[0]
    sums = TensorSpec((tokens, tensor(operands, "bias").shape[1]), "fp32")
    values = sums.bytes // 4
    return (replace(down, args=tuple("sums" if name == "out0" else name for name in down.args), common=(("sums", sums),)),
            cuda_launch("exchange_push.cu", "exchange_push", {"VALUES": values, "THREADS": SLOT_THREADS},
                        ("sums", "exchange", "out0"), common={"sums": sums}, grid=cdiv(values, SLOT_THREADS),
                        threads=SLOT_THREADS, moved=3 * sums.bytes))


def any_moe_grouped_partial_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    x = tensor(operands, "x")
    return target.name == "sm90" and x.dtype == "bf16" and x.shape[0] > FEW_TOKENS and x.shape[1] % 8 == 0


def any_moe_grouped_partial_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """The launches of all targets, but for the last."""
    size, push = any_moe_grouped.Sizes.of(operands), tensor(operands, "x").shape[0] > ONE_SHOT_TOKENS
    return (*any_moe_grouped.grouped_launches(target, operands)[:-1],
            moe_grouped.combine_launch(target, operands, size, {"y": size.y}, residual=False, push=push))


# ---- consumers --------------------------------------------------------------------------------------


def _one_rank(operands: Mapping[str, Operand], gathered: bool = False) -> dict[str, Operand]:
    """The operands of the one-rank namesake. gathered: x has the rows wanted alone."""
    rest = {name: value for name, value in operands.items() if name not in ("partial", "residual", "rows")}
    residual, rows = tensor(operands, "residual"), operands.get("rows")
    if gathered and isinstance(rows, TensorSpec):
        residual = TensorSpec((rows.shape[0], residual.shape[1]), residual.dtype)
    return {"x": residual, **({"rows": None} if "rows" in operands else {}), **rest}


def _supports_sums(target: Target, operands: Mapping[str, Operand]) -> bool:
    """x in bf16, in whole vectors, and partial sums as such operators get them."""
    partial, residual = tensor(operands, "partial"), tensor(operands, "residual")
    few = residual.shape[0] <= FEW_TOKENS
    return (target.name == "sm90" and residual.dtype == "bf16" and residual.shape[1] % 8 == 0
            and partial.dtype == ("fp32" if few else "bf16"))


def reduce_norm_linear_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    return _supports_sums(target, operands) and linear.supports(target, _one_rank(operands, True))


def reduce_norm_route_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    return _supports_sums(target, operands) and router.supports(target, _one_rank(operands))


def sum_launch(target: Target, operands: Mapping[str, Operand], *, into: str = "out0", share: bool = True,
               done: bool = True) -> Launch:
    """residual + the sum of the ranks' partial sums, or its `rows` if there are any, goes to the output or common buffer.

    share: the buffer is in the exchange area if there are more than ONE_SHOT_TOKENS tokens, so that each rank sums up its
    share of the rows and gives them to all. Else each sums up all. done: all ranks have when the launch ends.
    """
    residual, partial, rows = tensor(operands, "residual"), tensor(operands, "partial"), operands.get("rows")
    tokens, columns = residual.shape
    gather = isinstance(rows, TensorSpec)
    count = rows.shape[0] if isinstance(rows, TensorSpec) else tokens
    out = TensorSpec((count, columns), residual.dtype)
    common = {} if into == "out0" else {into: out}
    defines = {"ROWS": count, "COLUMNS": columns, "GATHER": int(gather)}
    args = ["partial", "residual", *(["rows"] if gather else []), "exchange"]
    if tokens <= FEW_TOKENS:
        return cuda_launch("exchange_slots.cu", "exchange_slots",
                           {**defines, "SLOT_ROWS": tokens, "THREADS": SLOT_THREADS}, (*args, into), common=common,
                           grid=cdiv(out.bytes // 4, SLOT_THREADS), threads=SLOT_THREADS,
                           moved=2 * out.bytes + 2 * partial.bytes)
    pushed, chunks = tokens > ONE_SHOT_TOKENS, out.bytes // 16
    share &= pushed
    done &= share
    each = 4 if chunks > BLOCKS * target.processors * ROW_THREADS else 1
    defines |= {"TOKENS": tokens, "PUSHED": int(pushed), "SHARE": int(share), "DONE": int(done),
                "CHUNKS": each, "TOGETHER": IN_FLIGHT // each, "THREADS": ROW_THREADS, "MIN_BLOCKS": BLOCKS}
    counter = (TensorSpec((1,), "i32"),) if done else ()
    args += ["flags", *(["scratch0"] if done else []), into]
    return cuda_launch("exchange_rows.cu", "exchange_rows", defines, args, common=common, scratch=counter,
                       zeroed=(0,) if done else (), threads=ROW_THREADS, moved=4 * out.bytes,
                       grid=min(cdiv(chunks, each * ROW_THREADS), BLOCKS * target.processors))


def _behind_sums(launches: tuple[Launch, ...], names: Mapping[str, str],
                 sums: TensorSpec | None = None) -> tuple[Launch, ...]:
    """A one-rank operator's launches, with what they read and write renamed: x is what the launch before them writes, in a
    common buffer if `sums` says so."""
    assert all("x" not in launch.pdl.preloads for launch in launches), "it would read x before it is there"
    return tuple(replace(launch, args=tuple(names.get(name, name) for name in launch.args),
                         common=launch.common + (((names["x"], sums),) if sums and "x" in launch.args else ()))
                 for launch in launches)


def reduce_norm_linear_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    residual, features = tensor(operands, "residual"), tensor(operands, "weight").shape[0]
    if residual.shape[0] <= COLLECT_TOKENS:
        return (gemv.gemv_launch(target, operands, TensorSpec((residual.shape[0], features), residual.dtype)),)
    return (sum_launch(target, operands),
            *_behind_sums(linear.launches(target, _one_rank(operands)), {"x": "out0", "out0": "out1"}))


def reduce_norm_route_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    tokens = tensor(operands, "residual").shape[0]
    if tokens <= FEW_TOKENS:
        return router.launches(target, operands)
    share = tokens > max(router.FEW_TOKENS, ONE_SHOT_TOKENS)
    return (sum_launch(target, operands, done=not share),
            *_behind_sums(router.launches(target, _one_rank(operands), share=share),
                          {"x": "out0", "out0": "out1", "out1": "out2"}))


def reduce_norm_head_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """x is no output, so that no peer can write it: every rank sums up the rows it needs itself. lm_head's blocks, which are
    many, do not collect the slots each for itself either."""
    alone = _one_rank(operands, True)
    return (sum_launch(target, operands, into="sums", share=False),
            *_behind_sums(linear.launches(target, alone), {"x": "sums"}, tensor(alone, "x")))


# ---- the end of a step ------------------------------------------------------------------------------


def all_gather_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    x = tensor(operands, "x")
    return target.name == "sm90" and x.dtype == "fp32" and len(x.shape) == 2


def all_gather_launches(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    (rows, _), columns = tensor(operands, "x").shape, integer(operands, "columns")
    units, most = cdiv(rows * columns, 4), BLOCKS * target.processors * GATHER_THREADS
    each = min(max(units // most, 1), 4)
    defines = {"ROWS": rows, "COLUMNS": columns, "UNITS": each, "THREADS": GATHER_THREADS}
    return (cuda_launch("all_gather.cu", "all_gather", defines, ("x", "exchange", "flags", "scratch0", "out0"),
                        grid=min(cdiv(units, each * GATHER_THREADS), BLOCKS * target.processors), threads=GATHER_THREADS,
                        scratch=(TensorSpec((1,), "i32"),), zeroed=(0,), moved=8 * rows * columns),)


_TILES = {"weight": "tiles"}
SPECS = (
    KernelSpec("sm90_linear_partial", "linear_partial", linear.supports, linear_partial_launches, _TILES),
    KernelSpec("sm90_moe_down_partial", "moe_down_partial", moe_down_partial_supports, moe_pair.down_launch,
               {"weight": "mxfp4_down"}),
    KernelSpec("sm90_moe_grouped_partial", "moe_grouped_partial", moe_grouped_partial_supports, moe_grouped_partial_launches,
               {"up": "mxfp4_gate_up", "down": "mxfp4_down"}),
    KernelSpec("moe_down_partial", "moe_down_partial", any_moe_down_partial_supports, any_moe_down_partial_launches),
    KernelSpec("moe_grouped_partial", "moe_grouped_partial", any_moe_grouped_partial_supports,
               any_moe_grouped_partial_launches),
    KernelSpec("sm90_reduce_norm_linear", "reduce_norm_linear", reduce_norm_linear_supports, reduce_norm_linear_launches,
               _TILES),
    KernelSpec("sm90_reduce_norm_route", "reduce_norm_route", reduce_norm_route_supports, reduce_norm_route_launches,
               _TILES),
    KernelSpec("sm90_reduce_norm_head", "reduce_norm_head", reduce_norm_linear_supports, reduce_norm_head_launches, _TILES),
    KernelSpec("sm90_all_gather", "all_gather", all_gather_supports, all_gather_launches),
)
