"""The kernels that lay weights out on the device, see `kernels.layouts`.

parameters: i32 [4], experts (1 for a dense weight), rows, columns, and whether the rows are those of `mxfp4_down`. A dense
weight has no scales: whatever stands in their place is not read.
"""

from __future__ import annotations

from gptoss_compile.kernels.common import cuda_launch
from gptoss_compile.kernels.spec import Launch
from gptoss_compile.target import Target

SYMBOLS = {"tiles": "tiles", "mxfp4_gate_up": "mxfp4", "mxfp4_down": "mxfp4"}


def launches(target: Target) -> dict[str, Launch]:
    """For each kind of layout the launch that makes it, of any shape."""
    return {kind: cuda_launch(f"layout_{symbol}.cu", symbol, {}, ("parameters", "source", "scales", "out"), moved=0,
                              grid=8 * target.processors, threads=256) for kind, symbol in SYMBOLS.items()}
