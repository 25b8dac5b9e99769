"""The loss curve of a training log as an SVG picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 320, 60, 40
_PAPER, _INK, _GRID = "#ffffff", "#24292f", "#d0d7de"


def loss_curve(log: Path) -> str:
    """Cross entropy (nats a written token, log scale) and held-out exact accuracy over the run's minutes."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [(e["seconds"] / 60, e["loss"]) for e in entries if "loss" in e and math.isfinite(e["loss"])]
    exact = [(e["seconds"] / 60, e["exact"]) for e in entries if "exact" in e]
    minutes = max(x for x, _ in losses + exact)
    high = math.ceil(math.log10(max(y for _, y in losses)))
    low = math.floor(math.log10(max(1e-4, min(y for _, y in losses))))

    def x_of(minute: float) -> float:
        return _LEFT + minute / float(minutes) * (_WIDTH - 2 * _LEFT)

    def y_of(part: float) -> float:
        return _HEIGHT - _BOTTOM - part * float(_HEIGHT - 2 * _BOTTOM)

    def loss_y(loss: float) -> float:
        return y_of((math.log10(max(loss, 10**low)) - low) / (high - low))

    parts = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="{_PAPER}"/>']
    for exponent in range(low, high + 1):
        y = loss_y(10**exponent)
        parts += [f'<line x1="{_LEFT}" x2="{_WIDTH - _LEFT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>',
                  _text(_LEFT - 6, y + 4, f"{10.0**exponent:g}", "end")]
    for percent in (0, 50, 100):
        parts.append(_text(_WIDTH - _LEFT + 6, y_of(percent / 100) + 4, f"{percent}%", "start"))
    step = max(1, round(minutes / 8))
    parts += [_text(x_of(m), _HEIGHT - _BOTTOM + 18, str(m), "middle") for m in range(0, int(minutes) + 1, step)]
    parts.append(_text(_WIDTH / 2, _HEIGHT - 6, "minutes", "middle"))
    parts.append(_line([(x_of(x), loss_y(y)) for x, y in losses], "#0969da"))
    parts.append(_line([(x_of(x), y_of(y)) for x, y in exact], "#bc4c00"))
    parts += [_text(_LEFT, 20, "training loss (left, log scale)", "start", "#0969da"),
              _text(_WIDTH - _LEFT, 20, "held-out conversations predicted exactly (right)", "end", "#bc4c00")]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            f'font-size="12">' + "\n".join(parts) + "</svg>\n")


def _line(points: list[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, anchor: str, colour: str = _INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{text}</text>'
