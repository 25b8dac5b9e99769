"""Every kernel there is. Importing this module declares all kernel operators."""

from __future__ import annotations

from gptoss_compile.kernels import (
    attention,
    embed,
    exchange,  # noqa: F401  operators, whose kernels are in sm90
    generate,
    moe,
    moe_grouped,
    norm_linear,
    quantize,
    rope,
    router,
    sample,
)
from gptoss_compile.kernels.sm90 import attention as sm90_attention
from gptoss_compile.kernels.sm90 import exchange as sm90_exchange
from gptoss_compile.kernels.sm90 import flashinfer, moe_pair
from gptoss_compile.kernels.sm90 import linear as sm90_linear
from gptoss_compile.kernels.sm90 import moe_grouped as sm90_moe_grouped
from gptoss_compile.kernels.sm90 import router as sm90_router
from gptoss_compile.kernels.spec import KernelSpec

SPECS: tuple[KernelSpec, ...] = (
    *sm90_attention.SPECS, *sm90_linear.SPECS, *sm90_router.SPECS, *moe_pair.SPECS, *sm90_moe_grouped.SPECS,
    *sm90_exchange.SPECS,
    *embed.SPECS, *rope.SPECS, *norm_linear.SPECS, *attention.SPECS, *router.SPECS, *moe.SPECS, *moe_grouped.SPECS,
    *quantize.SPECS,
)

# Other projects' kernels, see `passes/select_kernels.py`.
EXTERN: tuple[KernelSpec, ...] = flashinfer.SPECS

# Kernels beside the graph, which no pass chooses: the executor runs them.
BESIDE: tuple[KernelSpec, ...] = (*sample.SPECS, *generate.SPECS)
