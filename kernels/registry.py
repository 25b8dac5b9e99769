"""Every kernel there is. Importing this module declares all kernel operators."""

from __future__ import annotations

from gptoss_compile.kernels import (
    advance,
    attention,
    embed,
    generate,
    moe,
    moe_grouped,
    norm_linear,
    quantize,
    rope,
    router,
)
from gptoss_compile.kernels.spec import KernelSpec

SPECS: tuple[KernelSpec, ...] = (
    *embed.SPECS, *rope.SPECS, *norm_linear.SPECS, *attention.SPECS, *router.SPECS, *moe.SPECS, *moe_grouped.SPECS,
    *quantize.SPECS,
)

# Kernels beside the graph, which no pass chooses: the executor runs them.
BESIDE: tuple[KernelSpec, ...] = (*advance.SPECS, *generate.SPECS)
