"""Rows as text: the table on the terminal, the one in Markdown, and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.model import SUBJECT
from benchmarks.stats import PeerResult, Row

__all__ = ["broken", "to_json", "to_markdown", "to_text"]

HEAD = ("benchmark", "fdshare", "peer", "", "times faster", "target", "", "beside it")

MODES = {
    "pinned": "Both processes on one CPU",
    "unpinned": "Both processes wherever the scheduler puts them",
}

MARKS = {True: "✓", False: "✗", None: ""}


def duration(seconds: float | None) -> str:
    """Return ``seconds`` with three significant digits in the unit that suits it."""
    if seconds is None:
        return "-"
    factor, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    value = seconds * factor
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def times(value: float | None) -> str:
    """Return a ratio with a sensible number of digits: 1.62×, 13.4×, 480×."""
    if value is None:
        return "-"
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}×"


def _cell(result: PeerResult | None) -> str:
    if result is None:
        return "-"
    if result.problem and not result.rounds:
        return result.problem.partition(":")[0]
    return duration(result.seconds)


def _beside(row: Row) -> str:
    parts = [
        f"{peer} {_cell(result)}" for peer, result in row.peers.items() if peer not in (SUBJECT, row.baseline)
    ]
    subject = row.peers.get(SUBJECT)
    if subject:
        parts += [f"{name} alone {duration(value)}" for name, value in subject.extra.items()]
    return ", ".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.title,
        _cell(row.peers.get(SUBJECT)),
        _cell(row.peers.get(row.baseline or "")),
        row.baseline or "",
        times(row.times_faster),
        row.target.text() if row.target else "",
        MARKS[row.met],
        _beside(row),
    )


def _by_mode(rows: Iterable[Row]) -> dict[str, list[Row]]:
    modes: dict[str, list[Row]] = {}
    for row in rows:
        modes.setdefault(row.mode, []).append(row)
    return modes


def broken(rows: Iterable[Row]) -> list[str]:
    """Return one line for each peer that broke (not for those skipped)."""
    return [
        f"{row.mode} {row.name}, {peer} {result.problem}"
        for row in rows
        for peer, result in row.peers.items()
        if result.problem and not result.problem.startswith("skipped")
    ]


def to_text(rows: Sequence[Row]) -> str:
    """Return the tables for a terminal."""
    blocks = []
    for mode, group in _by_mode(rows).items():
        lines = [HEAD, *map(_cells, group)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
        right = {1, 2, 4}
        blocks.append(
            "\n".join(
                [
                    f"{MODES[mode]}:",
                    *(
                        "  ".join(
                            cell.rjust(width) if column in right else cell.ljust(width)
                            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
                        ).rstrip()
                        for line in lines
                    ),
                ]
            )
        )
    return "\n\n".join(blocks)


def to_markdown(rows: Sequence[Row], facts: Mapping[str, str], chart: str | None) -> str:
    """Return the results page; ``chart`` is the file name of the picture beside it."""
    lines = ["# Benchmark results", ""]
    lines += ["Written by `make bench`; `benchmarks/cases/` says what each row does."]
    lines += ["", "; ".join(f"{name}: {value}" for name, value in facts.items()) + ".", ""]
    if chart:
        lines += [f"![Times faster than the peer, one CPU]({chart})", ""]
    for mode, group in _by_mode(rows).items():
        lines += [f"## {MODES[mode]}", ""]
        lines.append("| " + " | ".join(HEAD) + " |")
        lines.append(
            "|" + "|".join("---:" if column in (1, 2, 4) else "---" for column in range(len(HEAD))) + "|"
        )
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in group]
        lines.append("")
    lines += [
        "Each figure is the median over several pairs of processes, started afresh in interleaved rounds;",
        "“times faster” is the median of the rounds' own ratios.",
        "Targets hold for one CPU and are shown, not asserted.",
        "",
    ]
    return "\n".join(lines)


def to_json(rows: Sequence[Row], facts: Mapping[str, str], settings: Mapping[str, object]) -> str:
    """Return everything measured, for machines: seconds an operation, each round's median, ratios, targets."""
    document = {
        "schema": 1,
        "machine": dict(facts),
        "settings": dict(settings),
        "results": [
            {
                "name": row.name,
                "title": row.title,
                "group": row.group,
                "mode": row.mode,
                "baseline": row.baseline,
                "times_faster": row.times_faster,
                "target": None
                if row.target is None
                else {"kind": row.target.kind, "bound": row.target.bound},
                "target_met": row.met,
                "peers": {
                    peer: {
                        "seconds": result.seconds,
                        "spread": result.spread,
                        "rounds": result.rounds,
                        "extra": result.extra,
                        "problem": result.problem,
                    }
                    for peer, result in row.peers.items()
                },
            }
            for row in rows
        ],
    }
    return json.dumps(document, indent=1) + "\n"
