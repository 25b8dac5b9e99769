"""Tests marked `gpu` are skipped, with the reason, where there is no GPU for them."""

from __future__ import annotations

import pytest

from .harness import device


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu"):
        device()
