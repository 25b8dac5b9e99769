"""sm90's dense projections of more than a few tokens against the operators' maths in fp32."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from gptoss_compile.build import build_all, key_of
from gptoss_compile.kernels.maths import rms_norm
from gptoss_compile.kernels.sm90.gemm import best_shape, gemm_launches, shapes
from gptoss_compile.kernels.spec import Operand, TensorSpec
from gptoss_compile.lint import check_launch
from gptoss_compile.target import Target

from .harness import Prepared, device, error

EPS = 1e-5
TOKENS = [9, 32, 33, 128, 1000, 8192]
SM90 = Target.parse("sm90")


def linear_operands(tokens: int, features: int, inner: int, *, residual: bool) -> dict[str, Operand]:
    """Of linear_residual, else of norm_linear, in the schema's order."""
    x, weight, bias = (TensorSpec(shape, "bf16") for shape in ((tokens, inner), (features, inner), (features,)))
    if residual:
        return {"x": x, "weight": weight, "bias": bias, "residual": TensorSpec((tokens, features), "bf16")}
    return {"x": x, "norm_weight": TensorSpec((inner,), "bf16"), "weight": weight, "bias": bias, "eps": EPS}


def head_operands(tokens: int, rows: int | None, features: int, inner: int) -> dict[str, Operand]:
    x, norm, weight = (TensorSpec(shape, "bf16") for shape in ((tokens, inner), (inner,), (features, inner)))
    chosen = None if rows is None else TensorSpec((rows,), "i32")
    return {"x": x, "rows": chosen, "norm_weight": norm, "weight": weight, "eps": EPS}


def random_arguments(operands: Mapping[str, Operand]) -> dict[str, Tensor | int | float | None]:
    """x and residual of variance 1, weights such that the product has it too; rows anywhere in x."""
    device()
    scale = {"weight": operands["weight"].shape[1] ** -0.5}  # type: ignore[union-attr]
    made: dict[str, Tensor | int | float | None] = {}
    for name, operand in operands.items():
        if not isinstance(operand, TensorSpec):
            made[name] = operand
        elif operand.dtype == "i32":
            made[name] = torch.randint(operands["x"].shape[0], operand.shape, device="cuda").int()  # type: ignore[union-attr]
        else:
            made[name] = (torch.randn(operand.shape, device="cuda") * scale.get(name, 1.0)).bfloat16()
    return made


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ in true fp32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    return x.float() @ weight.float().T


def check(op: str, operands: Mapping[str, Operand]) -> None:
    a = random_arguments(operands)
    prepared, results = Prepared(op, a, f"sm90_{op}"), []
    for _ in range(2):
        prepared.poison()
        prepared.launch()
        results.append(prepared.outputs[0].clone())
    assert torch.equal(*results), "not the same twice"
    x, weight = a["x"], a["weight"]
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    if isinstance(rows := a.get("rows"), Tensor):
        x = x[rows.long()]
    if isinstance(norm := a.get("norm_weight"), Tensor):
        x = rms_norm(x, norm, EPS)
    expected = product(x, weight)
    for name in ("bias", "residual"):
        if isinstance(added := a.get(name), Tensor):
            expected += added.float()
    assert results[0].shape == expected.shape
    assert error(results[0], expected) < 4e-3  # the rounding of the normed x and of the output, 1.7e-3 each
    assert float((results[0].float() - expected).abs().max()) < 0.04 * float(expected.std())


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("features", "inner"), [(5120, 2880), (576, 384), (200, 64)])
def test_norm_linear(tokens: int, features: int, inner: int, seed: int) -> None:
    torch.manual_seed(seed)
    check("norm_linear", linear_operands(tokens, features, inner, residual=False))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("features", "inner"), [(2880, 4096), (384, 512), (104, 448)])
def test_linear_residual(tokens: int, features: int, inner: int, seed: int) -> None:
    torch.manual_seed(seed)
    check("linear_residual", linear_operands(tokens, features, inner, residual=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "rows"), [(9, None), (300, 33), (128, None), (40, 200), (17, 9)])
@pytest.mark.parametrize(("features", "inner"), [(201088, 2880), (1000, 384)])
def test_norm_head(tokens: int, rows: int | None, features: int, inner: int, seed: int) -> None:
    torch.manual_seed(seed)
    check("norm_head", head_operands(tokens, rows, features, inner))


@pytest.mark.parametrize("tokens", [9, 64, 2048])
@pytest.mark.parametrize("kind", ["norm_linear", "linear_residual", "norm_head"])
def test_machine_code(kind: str, tokens: int) -> None:
    """Streams weights before the wait, multiplies on the tensor cores, spills nothing."""
    if kind == "norm_head":
        operands, out = head_operands(tokens, None, 201088, 2880), TensorSpec((tokens, 201088), "fp32")
    else:
        features, inner = (5120, 2880) if kind == "norm_linear" else (2880, 4096)
        operands = linear_operands(tokens, features, inner, residual=kind == "linear_residual")
        out = TensorSpec((tokens, features), "bf16")
    launches = gemm_launches(SM90, operands, out)
    binaries = build_all([launch.source for launch in launches], SM90, processes=1)
    for launch in launches:
        binary = binaries[key_of(launch.source, SM90)]
        assert check_launch(launch, binary, SM90) == []
        assert binary.spilled == 0
        assert launch.source.shared <= SM90.shared_bytes  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", [9, 16, 33, 128, 250, 1000, 2048, 8192])
@pytest.mark.parametrize(("features", "inner"), [(5120, 2880), (2880, 4096), (576, 384), (8, 64), (201088, 2880)])
def test_shapes(tokens: int, features: int, inner: int) -> None:
    """Some shape always fits; a cluster that splits K has one item; every SM has work where there is enough."""
    shape = best_shape(SM90, tokens, features, inner)
    assert shape in set(shapes(SM90, tokens, features, inner))
    assert shape.split == 1 or shape.items <= shape.clusters(SM90)
    assert shape.split * 64 <= inner
    blocks = min(shape.items, shape.clusters(SM90)) * shape.split
    assert blocks <= SM90.processors
    if features >= 2880:
        assert blocks >= 0.6 * SM90.processors
