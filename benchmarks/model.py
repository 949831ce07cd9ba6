"""The vocabulary of the harness: cases, targets and measurements; data only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import attrs

__all__ = ["Case", "Measurement", "Skipped", "Target"]

SUBJECT = "fdshare"


class Skipped(Exception):
    """This peer cannot run here (no compiler, too low a descriptor limit): the text says why."""


@attrs.frozen
class Measurement:
    """What one worker process measured: seconds an operation, one entry for each batch; ``extra`` likewise, by name."""

    seconds: list[float]
    extra: dict[str, list[float]] = attrs.field(factory=dict)


@attrs.frozen
class Target:
    """What fdshare should reach, pinned to one CPU.

    ``kind`` "faster": baseline time / fdshare time is at least ``bound``; "share": fdshare time / baseline time is at
    most ``bound``; "micros": fdshare's own time in microseconds is at most ``bound``.
    """

    kind: Literal["faster", "share", "micros"]
    bound: float

    def text(self) -> str:
        """Return the target as a reader wants it."""
        if self.kind == "faster":
            return f"≥ {self.bound:g}× as fast"
        if self.kind == "share":
            return f"≤ {self.bound:g} of the time"
        return f"≤ {self.bound:g} µs"

    def met(self, subject_seconds: float, times_faster: float | None) -> bool | None:
        """Tell whether it is reached; None where the baseline that it is relative to did not run."""
        if self.kind == "micros":
            return subject_seconds * 1e6 <= self.bound
        if times_faster is None:
            return None
        return times_faster >= self.bound if self.kind == "faster" else 1 / times_faster <= self.bound

    def as_times_faster(self) -> float | None:
        """Return the bound on the chart's axis; None for an absolute one."""
        if self.kind == "micros":
            return None
        return self.bound if self.kind == "faster" else 1 / self.bound


@attrs.frozen
class Case:
    """One row: the same work done by each of ``peers``, of which ``baseline`` is what "times faster" refers to.

    ``run(peer, budget)`` measures for about ``budget`` seconds; ``heavy`` cases are left out of quick runs.
    """

    name: str
    title: str
    group: str
    run: Callable[[str, float], Measurement]
    peers: tuple[str, ...]
    baseline: str | None
    target: Target | None = None
    heavy: bool = False
