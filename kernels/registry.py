"""Every kernel there is. Importing this module declares all kernel operators."""

from __future__ import annotations

from gptoss_compile.kernels import (  # noqa: F401  (imported for their declarations)
    attention,
    embed,
    moe,
    moe_grouped,
    norm_linear,
    quantize,
    rope,
    router,
)
from gptoss_compile.kernels.spec import KernelSpec

SPECS: tuple[KernelSpec, ...] = ()
