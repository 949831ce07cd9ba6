"""From the samples of several rounds to the figures of one row: medians, spread, ratios paired by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import attrs

from benchmarks.model import SUBJECT, Case, Target

__all__ = ["PeerResult", "Row", "paired_ratio", "summarise"]


@attrs.frozen
class PeerResult:
    """One peer of one row: ``rounds`` holds the median of each of its processes, in seconds an operation."""

    rounds: list[float]
    extra: dict[str, float] = attrs.field(factory=dict)
    problem: str | None = None

    @property
    def seconds(self) -> float | None:
        """The median of the rounds, or None where nothing was measured."""
        return median(self.rounds) if self.rounds else None

    @property
    def spread(self) -> float | None:
        """(Slowest - fastest round) / median."""
        middle = self.seconds
        return (max(self.rounds) - min(self.rounds)) / middle if middle else None


@attrs.frozen
class Row:
    """One case in one mode ("pinned" or "unpinned")."""

    name: str
    title: str
    group: str
    mode: str
    peers: dict[str, PeerResult]
    baseline: str | None
    times_faster: float | None
    target: Target | None
    met: bool | None


def paired_ratio(baseline: Sequence[float], subject: Sequence[float]) -> float | None:
    """Return the median over rounds of baseline / subject: each pair ran back to back, so slow drift cancels out."""
    ratios = [theirs / ours for theirs, ours in zip(baseline, subject, strict=False) if ours > 0]
    return median(ratios) if ratios else None


def summarise(case: Case, mode: str, peers: Mapping[str, PeerResult]) -> Row:
    """Make the row of ``case``; a target is judged where the case runs pinned, which is what targets are set for."""
    subject = peers.get(SUBJECT, PeerResult([]))
    baseline = peers.get(case.baseline or "", PeerResult([]))
    faster = paired_ratio(baseline.rounds, subject.rounds)
    target = case.target if mode == "pinned" else None
    seconds = subject.seconds
    met = target.met(seconds, faster) if target and seconds is not None else None
    return Row(case.name, case.title, case.group, mode, dict(peers), case.baseline, faster, target, met)
