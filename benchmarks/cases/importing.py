"""Import time: ``import fdshare`` against what it stands on, each in many fresh interpreters.

Only the statement is timed, inside the interpreter, so that starting Python does not dilute the difference.  Both find
all their byte code cached, as installed packages do, in a cache of this measurement's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
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
    """Measure the import in fresh interpreters one after the other; the first, which fills the cache, is not counted."""
    with tempfile.TemporaryDirectory(prefix="fdshare-bench-") as cache:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-c", PROGRAM.format(statement=STATEMENTS[peer])]
        seconds: list[float] = []
        end = (
            perf_counter() + 2 * budget
        )  # a median of few would be noise: an interpreter alone takes some 30 ms
        while len(seconds) <= MINIMUM or perf_counter() < end:
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            seconds.append(float(done.stdout))
    return Measurement(seconds[1:])
