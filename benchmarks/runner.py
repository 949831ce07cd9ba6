"""Runs the plan: each case with each of its peers in processes of their own, in interleaved rounds.

Rounds go A B C, A B C, … with each peer's process (and the partner it forks) started anew, so that whatever
drifts in the machine meets all peers alike, and no peer inherits another's heap or threads.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import attrs

from benchmarks.model import Case, Measurement
from benchmarks.stats import PeerResult, Row, summarise

__all__ = ["FULL", "QUICK", "Settings", "can_pin", "parse_result", "run_cases"]

ROOT = Path(__file__).resolve().parent.parent

WORKER_TIMEOUT = 120.0
"""Seconds after which a worker counts as broken: some ten times what the slowest takes."""

HEAVY_ROUNDS = 2
"""Rounds of a heavy case: its single operations are long enough to be steady, and would take minutes."""


@attrs.frozen
class Settings:
    """``rounds`` by mode ("pinned", "unpinned"); ``budget`` in seconds, of one worker's measuring."""

    rounds: dict[str, int]
    budget: float


FULL = Settings({"pinned": 5, "unpinned": 3}, 0.2)
QUICK = Settings({"pinned": 2}, 0.05)


def can_pin() -> bool:
    """Tell whether this system lets a process choose its CPU."""
    return hasattr(os, "sched_setaffinity")


def run_cases(
    cases: Sequence[Case], settings: Settings, environment: dict[str, str], progress: Callable[[str], None]
) -> list[Row]:
    """Run all ``cases`` in all modes; what broke or was skipped is told in the rows, nothing is raised for it."""
    rows = []
    for mode, rounds in settings.rounds.items():
        if mode == "pinned" and not can_pin():
            progress("this system cannot pin a process to a CPU: unpinned only")
            continue
        cpu = (
            [str(max(os.sched_getaffinity(0)))] if mode == "pinned" else []
        )  # the first often serves interrupts
        for case in cases:
            progress(f"{mode}: {case.title}")
            count = min(rounds, HEAVY_ROUNDS) if case.heavy else rounds
            rows.append(_run_case(case, mode, count, settings.budget, cpu, environment))
    return rows


def _run_case(
    case: Case, mode: str, rounds: int, budget: float, cpu: list[str], environment: dict[str, str]
) -> Row:
    medians: dict[str, list[float]] = {peer: [] for peer in case.peers}
    extras: dict[str, dict[str, list[float]]] = {peer: {} for peer in case.peers}
    problems: dict[str, str] = {}
    for _ in range(rounds):
        for peer in case.peers:
            if peer in problems:
                continue
            result = _run_worker([case.name, peer, str(budget), *cpu], environment)
            if isinstance(result, str):
                problems[peer] = result
                continue
            medians[peer].append(median(result.seconds))
            for name, values in result.extra.items():
                extras[peer].setdefault(name, []).append(median(values))
    return summarise(
        case,
        mode,
        {
            peer: PeerResult(
                medians[peer],
                {name: median(values) for name, values in extras[peer].items()},
                problems.get(peer),
            )
            for peer in case.peers
        },
    )


def _run_worker(arguments: list[str], environment: dict[str, str]) -> Measurement | str:
    """Return what it measured, or why there is nothing: text that begins with "skipped" or "broke"."""
    command = [sys.executable, "-m", "benchmarks.worker", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    ) as worker:
        try:
            output, errors = worker.communicate(timeout=WORKER_TIMEOUT)
        except BaseException as error:
            os.killpg(worker.pid, signal.SIGKILL)  # its partner too, which holds the same pipes open
            if isinstance(error, subprocess.TimeoutExpired):
                return f"broke: no result after {WORKER_TIMEOUT:g} s"
            raise
    return parse_result(worker.returncode, output, errors)


def parse_result(status: int, output: str, errors: str) -> Measurement | str:
    """Turn a worker's end into its measurement, or into text that begins with "skipped" or "broke"."""
    lines = output.splitlines()
    if status == 0 and lines:
        try:
            found: dict[str, Any] = json.loads(lines[-1])
        except ValueError:
            return f"broke: printed {lines[-1][:80]!r}"
        if "skipped" in found:
            return f"skipped: {found['skipped']}"
        if found.get("seconds"):
            return Measurement(found["seconds"], found["extra"])
    last = errors.strip().splitlines()[-1:] or [f"exit status {status}"]
    return f"broke: {last[0][:200]}"
