"""norm_linear, linear_residual and norm_head of Hopper against their twins in fp32."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from .harness import Prepared, error, run_kernel

pytestmark = pytest.mark.gpu
EPS = 1e-5
TOLERANCE = 4e-3  # x times the norm's weight and the output are rounded to bf16
SIZES = [(5120, 2880), (1000, 448), (200, 1088)]  # rows of the weight that fill no tile, columns that share out unevenly


def randn(*shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale + offset).bfloat16()


def norm_arguments(tokens: int, features: int, columns: int) -> dict[str, Tensor | float]:
    x = randn(tokens, columns) * torch.logspace(-1, 1, tokens, device="cuda")[:, None].bfloat16()
    return {"x": x, "norm_weight": randn(columns, scale=0.3, offset=1.0),
            "weight": randn(features, columns, scale=columns**-0.5), "bias": randn(features), "eps": EPS}


def head_arguments(tokens: int, features: int, columns: int, rows: Tensor | None) -> dict[str, Tensor | float | None]:
    given = norm_arguments(tokens, features, columns)
    return {"x": given["x"], "rows": rows, **{name: given[name] for name in ("norm_weight", "weight", "eps")}}


def twin(op: str, arguments: Mapping[str, Tensor | float | None]) -> Tensor:
    """In fp32, on the host."""
    host = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    wide = {name: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in host.items()}
    result: Tensor = getattr(torch.ops.gptoss, op)(**wide)
    return result


def check(op: str, arguments: Mapping[str, Tensor | float | None]) -> None:
    (got,) = run_kernel(op, arguments, f"sm90_{op}")
    expected = twin(op, arguments)
    for j in range(len(expected)):
        assert error(got[j], expected[j]) < TOLERANCE, f"token {j}"


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize(("features", "columns"), SIZES)
def test_norm_linear(tokens: int, features: int, columns: int) -> None:
    check("norm_linear", norm_arguments(tokens, features, columns))


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize(("features", "columns"), [(2880, 4096), *SIZES[1:]])
def test_linear_residual(tokens: int, features: int, columns: int) -> None:
    check("linear_residual", {"x": randn(tokens, columns), "weight": randn(features, columns, scale=columns**-0.5),
                              "bias": randn(features), "residual": randn(tokens, features)})


@pytest.mark.parametrize("tokens", [1, 4, 8])
@pytest.mark.parametrize("features", [201088, 1000])
def test_norm_head(tokens: int, features: int) -> None:
    check("norm_head", head_arguments(tokens, features, 2880, None))


def test_norm_head_of_some_rows() -> None:
    rows = torch.tensor([49, 0, 7, 7, 21, 0], dtype=torch.int32, device="cuda")
    check("norm_head", head_arguments(50, 1000, 448, rows))


@pytest.mark.parametrize("tokens", [4, 8])
def test_what_is_no_number_stays_in_its_token(tokens: int) -> None:
    arguments = norm_arguments(tokens, 256, 384)
    expected = twin("norm_linear", arguments)
    x = arguments["x"]
    assert isinstance(x, Tensor)
    x[1] = float("nan")
    (got,) = run_kernel("norm_linear", arguments, "sm90_norm_linear")
    others = [j for j in range(tokens) if j != 1]
    assert got[1].isnan().all() and error(got[others], expected[others]) < TOLERANCE


def test_same_bits_every_time() -> None:
    prepared = Prepared("norm_linear", norm_arguments(8, 5120, 2880), "sm90_norm_linear")
    prepared.launch()
    first = prepared.outputs[0].clone()
    for _ in range(20):
        prepared.launch()
        assert torch.equal(prepared.outputs[0], first)
