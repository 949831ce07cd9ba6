"""One measurement in a fresh process: ``python -m benchmarks.worker CASE PEER SECONDS [CPU]``.

Prints one JSON object: what was measured, or ``{"skipped": why}``.  Anything else is a benchmark that broke.
"""

from __future__ import annotations

import json
import os
import sys

import attrs

from benchmarks.cases.support import need_descriptors
from benchmarks.model import Skipped
from benchmarks.plan import CASES

__all__ = ["main"]


def main(arguments: list[str]) -> int:
    """Run the measurement that the arguments name; the partner process inherits the CPU."""
    name, peer, budget, *cpu = arguments
    case = next(case for case in CASES if case.name == name)
    if cpu:
        os.sched_setaffinity(0, {int(cpu[0])})
    try:
        need_descriptors(0)  # the same, raised limit for every peer
        result = attrs.asdict(case.run(peer, float(budget)))
    except Skipped as why:
        result = {"skipped": str(why)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
