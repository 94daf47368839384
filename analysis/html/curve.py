"""Conditional acceptance by slot as a small inline SVG, drawn with the colours of the page."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from specbench.runs.result_schema import SlotRate

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 320, 220, 56, 12, 24, 40  # pixels
FEW = 5  # rounds below which a slot is not drawn

STYLE = """
svg.curve { width: 100%; height: auto; background: none; padding: 0; }
svg.curve text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg.curve text.name { fill: var(--ink); font-weight: 600; }
svg.curve .grid { stroke: var(--line); stroke-width: 1; } svg.curve .band { fill: var(--link); opacity: .18; }
svg.curve .line { fill: none; stroke: var(--link); stroke-width: 2; } svg.curve circle { fill: var(--link); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
"""


def curves(found: Mapping[str, Sequence[SlotRate]]) -> str:
    """One panel a domain, all with the same axes; slots that fewer than FEW rounds reached are left out."""
    drawn = {
        name: [slot for slot in curve if slot.rounds is None or slot.rounds >= FEW] for name, curve in found.items()
    }
    last = max((slot.slot for curve in drawn.values() for slot in curve), default=1)
    return f'<div class="curves">{"".join(_panel(name, curve, last) for name, curve in drawn.items() if curve)}</div>'


def _panel(name: str, curve: Sequence[SlotRate], last: int) -> str:
    def x(slot: float) -> float:
        return LEFT + (slot - 0.5) * (WIDTH - LEFT - RIGHT) / last

    def y(rate: float) -> float:
        return HEIGHT - BOTTOM - rate * (HEIGHT - TOP - BOTTOM)

    def points(pairs: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{x(slot):.1f},{y(rate):.1f}" for slot, rate in pairs)

    said = ", ".join(f"slot {slot.slot}: {slot.conditional.value:.2f}" for slot in curve)
    label = html.escape(f"Conditional acceptance by slot, {name}: {said}")
    parts = [
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>'
    ]
    parts.append(f'<text class="name" x="{LEFT}" y="14">{html.escape(name)}</text>')
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for slot in range(1, last + 1) if last <= 16 else range(1, last + 1, 4):
        parts.append(f'<text x="{x(slot):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{slot}</text>')
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">slot k of the block</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(11 {middle}) rotate(-90)" text-anchor="middle">conditional acceptance</text>'
    )
    known = [(slot.slot, slot.conditional) for slot in curve if slot.conditional.low is not None]
    if known:
        around = [(slot, rate.high) for slot, rate in known] + [(slot, rate.low) for slot, rate in reversed(known)]
        parts.append(f'<polygon class="band" points="{points(around)}"/>')
    parts.append(f'<polyline class="line" points="{points([(s.slot, s.conditional.value) for s in curve])}"/>')
    parts += [f'<circle cx="{x(s.slot):.1f}" cy="{y(s.conditional.value):.1f}" r="3"/>' for s in curve]
    return "".join([*parts, "</svg>"])
