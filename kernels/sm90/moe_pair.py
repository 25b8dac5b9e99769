"""moe_gate_up and moe_down with MXFP4 experts on Hopper: moe_pair.cu."""

from __future__ import annotations

from collections.abc import Mapping

from gptoss_compile.kernels.common import cdiv, cuda_launch, number, tensor
from gptoss_compile.kernels.moe import expert_bytes
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target

STAGE_ROWS = 192  # of three slabs of the weights' layout; to multiples of it the layout fills columns up, too
PARTS = 3  # warps that share a row, a third of its columns each


def _supports(target: Target, operands: Mapping[str, Operand], hidden: int, inner: int) -> bool:
    """MXFP4 experts whose rows, in both projections, are whole stages: one of gate_up's is gate and up of 96 features."""
    return (target.name == "sm90" and isinstance(operands["scales"], TensorSpec) and tensor(operands, "bias").dtype == "bf16"
            and hidden % STAGE_ROWS == 0 and 2 * inner % STAGE_ROWS == 0)


def gate_up_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    return _supports(target, operands, tensor(operands, "x").shape[1], tensor(operands, "weight").shape[1] // 2)


def down_supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    return _supports(target, operands, tensor(operands, "weight").shape[1], tensor(operands, "h").shape[2])


def gate_up_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """A block is 64 rows, hence 32 features, of one pair: four units of 16 rows, two for each of two groups of warps."""
    x, (tokens, top_k) = tensor(operands, "x"), tensor(operands, "ids").shape
    hidden, inner = x.shape[1], tensor(operands, "weight").shape[1] // 2
    pairs, early = tokens * top_k, operands.get("early", 1) != 0
    defines = {"DOWN": 0, "HIDDEN": hidden, "INNER": inner, "TOP_K": top_k, "EPS": number(operands, "eps"),
               "ALPHA": number(operands, "alpha"), "LIMIT": number(operands, "limit"), "EARLY": int(early)}
    return (cuda_launch("moe_pair.cu", "moe_gate_up", defines, ("x", "norm_weight", "ids", "weight", "bias", "out0"),
                        grid=pairs * (inner // 32), threads=32 * PARTS * 2, shared=2 * hidden + 128,
                        moved=x.bytes + 2 * pairs * inner + expert_bytes(operands, pairs),
                        flops=4 * pairs * inner * hidden, preloads=("x", "norm_weight") if early else ("norm_weight",),
                        late_trigger=True,
                        promises=("HMMA",)),)


def down_launch(target: Target, operands: Mapping[str, Operand]) -> tuple[Launch, ...]:
    """moe_down, or without a residual moe_down_partial, whose results go into the ranks' slots.

    A cluster is 16 features of one token: two blocks with half of the experts each, three warps an expert.
    """
    (tokens, top_k, inner), push = tensor(operands, "h").shape, "residual" not in operands
    hidden, pairs, columns = tensor(operands, "bias").shape[1], tokens * top_k, cdiv(inner, STAGE_ROWS) * STAGE_ROWS
    blocks = 1 if top_k % 2 else 2
    warps = PARTS * top_k // blocks
    defines = {"DOWN": 1, "HIDDEN": hidden, "INNER": inner, "TOP_K": top_k, "PUSH": int(push), "TOKENS": tokens}
    args = ("h", "ids", "probs", "weight", "bias", "exchange" if push else "residual", "out0")
    return (cuda_launch("moe_pair.cu", "moe_down", defines, args,
                        grid=blocks * tokens * (hidden // 16), threads=32 * warps,
                        shared=2 * top_k // blocks * columns + 128 * warps,
                        moved=tensor(operands, "h").bytes + 4 * tokens * hidden + expert_bytes(operands, pairs),
                        flops=2 * pairs * inner * hidden, promises=("HMMA",),
                        preloads=("ids", "probs", "weight", "bias", *(() if push else ("residual",)))),)


SPECS = (
    KernelSpec("sm90_moe_gate_up_pair", "moe_gate_up", gate_up_supports, gate_up_launch, {"weight": "mxfp4_gate_up"}),
    KernelSpec("sm90_moe_down_pair", "moe_down", down_supports, down_launch, {"weight": "mxfp4_down"}),
)
