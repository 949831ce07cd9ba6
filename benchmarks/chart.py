"""The chart: times faster than the standard library, as horizontal bars in one SVG file that is written by hand.

The axis is logarithmic and starts from 1× in both directions, so that twice as fast and half as fast are equally long;
it is labelled as such, every gridline and every bar carries its number.  The picture brings its own background
for light and dark, so it stays readable on any page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from benchmarks.report import times
from benchmarks.stats import Row

__all__ = ["to_svg"]

WIDTH = 860
LABELS = 280
"""Pixels for the names on the left."""
RIGHT = 90
"""Pixels to the right of the axis, where the number of the longest bar goes."""
MAX_TICKS = 10
BAR = 16
STEP = 24
GROUP_GAP = 26
TOP = 74
BOTTOM = 58

STYLE = """
.card{fill:#ffffff;stroke:#d0d7de}text{font:13px system-ui,sans-serif;fill:#1f2328}
.title{font-size:17px;font-weight:600}.note,.tick{font-size:11px;fill:#59636e}.group{font-weight:600}
.grid{stroke:#d8dee4}.one{stroke:#59636e}.faster{fill:#1a7f5a}.slower{fill:#c4532d}.target{stroke:#1f2328;stroke-width:2}
@media(prefers-color-scheme:dark){.card{fill:#0d1117;stroke:#3d444d}text{fill:#e6edf3}
.note,.tick{fill:#9198a1}.grid{stroke:#2a313c}.one{stroke:#9198a1}.faster{fill:#2fa878}.slower{fill:#e0734d}
.target{stroke:#e6edf3}}
"""


def ticks(low: float, high: float) -> list[float]:
    """Return the gridlines from ``low`` (at most 1) to ``high``: 1, 2 and 5 times the powers of ten; fewer if many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1,)):
        found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) <= MAX_TICKS:
            break
    return found


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of the axis: from 1, or the next gridline below the smallest value, to just over the largest."""
    smallest = min([1.0, *values])
    low = 1.0
    while low > smallest:
        low /= 2 if low in (1.0, 0.1, 0.01, 0.001) else 2.5 if round(low, 6) in (0.5, 0.05, 0.005) else 2
    return low, max([2.0, *values])


def to_svg(rows: Sequence[Row], note: str) -> str:
    """Return the chart of those ``rows`` that have a ratio; ``note`` is the line below the title.

    A mark across a bar's track shows the target of that row.
    """
    shown = [(row, row.times_faster) for row in rows if row.times_faster]
    targets = [row.target.as_times_faster() if row.target else None for row, _ratio in shown]
    low, high = bounds([ratio for _row, ratio in shown] + [target for target in targets if target])
    span = WIDTH - LABELS - RIGHT

    def x(value: float) -> float:
        return LABELS + span * (math.log(value / low) / math.log(high / low))

    body: list[str] = []
    y, group = TOP, None
    for (row, ratio), target in zip(shown, targets, strict=True):
        if row.group != group:
            y += 0 if group is None else GROUP_GAP - STEP
            group = row.group
            body.append(f'<text class="group" x="16" y="{y + 13}">{escape(group)}</text>')
            y += STEP
        left, right = sorted((x(1), x(ratio)))
        kind = "faster" if ratio >= 1 else "slower"
        body.append(f'<text x="{LABELS - 10}" y="{y + 13}" text-anchor="end">{escape(row.title)}</text>')
        body.append(
            f'<rect class="{kind}" x="{left:.1f}" y="{y}" width="{max(1, right - left):.1f}" height="{BAR}" rx="2"/>'
        )
        if target:
            body.append(
                f'<line class="target" x1="{x(target):.1f}" x2="{x(target):.1f}" y1="{y - 2}" y2="{y + BAR + 2}"/>'
            )
        # clear of the target mark, which may stand beyond the bar's end
        end = max(right, x(target)) if target and x(target) < right + 60 else right
        body.append(f'<text x="{end + 7:.1f}" y="{y + 13}">{times(ratio)}</text>')
        y += STEP

    foot = y + 6
    grid = []
    for tick in ticks(low, high):
        name = "one" if tick == 1 else "grid"
        grid.append(
            f'<line class="{name}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP - 6}" y2="{foot}"/>'
        )
        grid.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{foot + 15}" text-anchor="middle">{tick:,g}×</text>'
        )
    height = foot + BOTTOM
    title = "Times faster than the standard library's multiprocessing"
    legend = "logarithmic axis; 1× is the same speed; an upright mark is the target"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"',
            f' height="{height}" role="img" aria-label="{escape(title)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            f'<text class="title" x="16" y="30">{escape(title)}</text>',
            f'<text class="note" x="16" y="50">{escape(note)}</text>',
            *grid,
            *body,
            f'<text class="note" x="{LABELS}" y="{foot + 38}">{escape(legend)}</text>',
            "</svg>\n",
        ]
    )
