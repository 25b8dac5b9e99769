"""What is compiled for: descriptions of machines. Nothing here, or anywhere on the compile side, asks a live device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Feature = Literal["tma", "wgmma", "tcgen05", "block_scaled_mma", "pdl"]


class TargetError(ValueError):
    """An unknown target name; the message lists the known ones."""


@dataclass(frozen=True)
class Target:
    """One architecture as the compiler sees it.

    shared_bytes is the largest dynamic shared memory of one block; bandwidth (bytes/s) and bf16_flops (FLOP/s, dense)
    are the vendor's data-sheet rates of the part named in `part` and serve only to print time floors.
    """

    name: str
    backend: Literal["cuda", "hip", "cpu"]
    arch: int | str
    warp: int
    processors: int
    shared_bytes: int
    features: frozenset[Feature]
    part: str
    bandwidth: float
    bf16_flops: float

    def has(self, feature: Feature) -> bool:
        return feature in self.features

    @property
    def is_gpu(self) -> bool:
        return self.backend != "cpu"

    @staticmethod
    def parse(name: str) -> Target:
        """The target of that name. Raises TargetError, which lists the known names."""
        try:
            return TARGETS[name]
        except KeyError:
            raise TargetError(f"unknown target {name!r}; known targets: {', '.join(TARGETS)}") from None


def _features(*names: Feature) -> frozenset[Feature]:
    return frozenset(names)


_HOPPER = _features("tma", "wgmma", "pdl")
_BLACKWELL = _features("tma", "tcgen05", "block_scaled_mma", "pdl")

TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("sm90", "cuda", 90, 32, 132, 232448, _HOPPER, "H200 SXM", 4.8e12, 989e12),
        Target("sm100", "cuda", 100, 32, 148, 232448, _BLACKWELL, "B200", 8.0e12, 2250e12),
        Target("sm103", "cuda", 103, 32, 148, 232448, _BLACKWELL, "B300", 8.0e12, 2250e12),
        Target("sm120", "cuda", 120, 32, 188, 101376, _features("tma", "pdl"), "RTX PRO 6000", 1.8e12, 500e12),
        Target("gfx950", "hip", "gfx950", 64, 256, 163840, _features("block_scaled_mma"), "MI350X", 8.0e12, 2300e12),
        Target("cpu", "cpu", "native", 1, 1, 0, _features(), "CPU", 5e10, 1e11),
    )
}
