"""norm_linear, linear_residual and norm_head on Hopper: gemv.cu for up to 8 tokens, matrix products above."""

from __future__ import annotations

from collections.abc import Mapping

from gptoss_compile.kernels.common import tensor
from gptoss_compile.kernels.sm90 import gemm, gemv
from gptoss_compile.kernels.spec import KernelSpec, Launch, Operand, TensorSpec
from gptoss_compile.target import Target

BF16 = ("x", "norm_weight", "weight", "bias", "residual")


def _outputs(operands: Mapping[str, Operand]) -> TensorSpec:
    """norm_head's logits [R, V] fp32, else [T, N] of x's dtype."""
    x, features = tensor(operands, "x"), tensor(operands, "weight").shape[0]
    if "bias" in operands:
        return TensorSpec((x.shape[0], features), x.dtype)
    rows = operands["rows"]
    return TensorSpec(((rows if isinstance(rows, TensorSpec) else x).shape[0], features), "fp32")


def supports(target: Target, operands: Mapping[str, Operand]) -> bool:
    if any(tensor(operands, name).dtype != "bf16" for name in BF16 if name in operands):
        return False
    if _outputs(operands).shape[0] > gemv.MAX_TOKENS:
        return target.name == "sm90" and gemm.gemm_supports(target, operands)
    return gemv.supports(target, tensor(operands, "weight"))


def launches(target: Target, operands: Mapping[str, Operand], *, push: bool = False) -> tuple[Launch, ...]:
    """push: many tokens' rows go to the ranks whose share they are in."""
    out = _outputs(operands)
    if out.shape[0] > gemv.MAX_TOKENS:
        return gemm.gemm_launches(target, operands, out, push=push)
    assert not push
    return (gemv.gemv_launch(target, operands, out),)


SPECS = tuple(KernelSpec(f"sm90_{op}", op, supports, launches, {"weight": "tiles"})
              for op in ("norm_linear", "linear_residual", "norm_head"))
