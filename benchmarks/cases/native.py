"""The C peer: compiles ``c/pingpong.c`` once for a run and reads its batches."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from benchmarks.model import Measurement, Skipped

__all__ = ["BINARY_VARIABLE", "build", "run_native"]

SOURCE = Path(__file__).resolve().parent.parent / "c" / "pingpong.c"
BINARY_VARIABLE = "FDSHARE_BENCH_PINGPONG"
"""The environment variable that tells workers where the compiled program is."""


def build(directory: Path) -> Path | None:
    """Compile into ``directory``; None where there is no C compiler or it fails (the peer is then skipped)."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        return None
    binary = directory / "pingpong"
    done = subprocess.run([compiler, "-O2", "-o", str(binary), str(SOURCE)], check=False, capture_output=True)
    return binary if done.returncode == 0 else None


def run_native(mode: str, size: int, descriptors: int, budget: float) -> Measurement:
    """Run the C program; ``mode`` as in its source, ``size`` in bytes.

    Raises:
        Skipped: it was not compiled.
        CalledProcessError: it failed.
    """
    binary = os.environ.get(BINARY_VARIABLE)
    if not binary:
        raise Skipped("no C compiler")
    done = subprocess.run(
        [binary, mode, str(size), str(descriptors), str(budget)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    pairs = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    extra = {"close": [closing for _took, closing in pairs]} if mode == "separate" else {}
    return Measurement([took for took, _closing in pairs], extra)
