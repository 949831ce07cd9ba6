"""The command: ``python -m benchmarks [--quick] [--only NAME] [--out DIR]``.

A full run writes ``benchmarks/results/``; a quick or partial one writes only where ``--out`` says, so that it never
replaces the published figures.  The exit status is 0 unless a benchmark broke: speed is shown, not asserted.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import attrs

from benchmarks import chart, machine, report
from benchmarks.cases import native
from benchmarks.plan import select
from benchmarks.runner import FULL, QUICK, run_cases

__all__ = ["main"]

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="fdshare and its peers, side by side."
    )
    parser.add_argument("--quick", action="store_true", help="a rough look in under a minute, one CPU only")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="cases whose name contains NAME"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where to write (a full run: benchmarks/results)"
    )
    options = parser.parse_args(arguments)
    try:
        cases = select(options.only, quick=options.quick)
    except ValueError as error:
        parser.error(str(error))
    settings = QUICK if options.quick else FULL
    facts = machine.facts()
    start = perf_counter()
    with tempfile.TemporaryDirectory(prefix="fdshare-bench-") as directory:
        binary = native.build(Path(directory))
        environment = _environment(binary)
        rows = run_cases(cases, settings, environment, _progress)
    print(report.to_text(rows))
    print(
        f"\n{'; '.join(f'{name}: {value}' for name, value in facts.items())}; took {perf_counter() - start:.0f} s"
    )

    problems = report.broken(rows)
    for line in problems:
        print(line, file=sys.stderr)
    out = options.out or (None if options.quick or options.only else RESULTS)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        pinned = [row for row in rows if row.mode == "pinned"] or rows
        note = f"one run, both processes on one CPU; {facts['cpu']}, {facts['system']}, {facts['python']}"
        (out / "chart.svg").write_text(chart.to_svg(pinned, note), encoding="utf-8")
        (out / "results.md").write_text(report.to_markdown(rows, facts, "chart.svg"), encoding="utf-8")
        (out / "results.json").write_text(
            report.to_json(rows, facts, attrs.asdict(settings)), encoding="utf-8"
        )
    return 1 if problems else 0


def _environment(binary: Path | None) -> dict[str, str]:
    """Return the environment of every worker: one thread each, so that NumPy's own do not run beside what is timed."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    if binary:
        environment[native.BINARY_VARIABLE] = str(binary)
    return environment


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
