"""Import time: ``import fdshare`` against what it stands on, each in many fresh interpreters.

Only the statement is timed, inside the interpreter, so that starting Python does not dilute the difference.
"""

from __future__ import annotations

import subprocess
import sys
from time import perf_counter

from benchmarks.model import Measurement

__all__ = ["run_import"]

STATEMENTS = {
    "fdshare": "import fdshare",
    "multiprocessing + attrs": "import multiprocessing.connection, attrs",
}

PROGRAM = "from time import perf_counter as clock; start = clock(); {statement}; print(clock() - start)"

MINIMUM = 5
"""Interpreters at least, however short the budget."""


def run_import(peer: str, budget: float) -> Measurement:
    """Measure the import in fresh interpreters one after the other; the first, which fills the caches, is not counted."""
    seconds: list[float] = []
    end = perf_counter() + 2 * budget  # a median of few would be noise: an interpreter alone takes some 30 ms
    while len(seconds) <= MINIMUM or perf_counter() < end:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(statement=STATEMENTS[peer])],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        seconds.append(float(done.stdout))
    return Measurement(seconds[1:])
