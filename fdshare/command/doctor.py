"""``fdshare doctor``: what this system offers, each thing tried, with advice; as a report for people and as JSON."""

from __future__ import annotations

import json

import fdshare
from fdshare.command import probes, probing, surroundings
from fdshare.command.ls import columns, counted, printable
from fdshare.command.probing import MISSING, OK, WARN, Finding, Probe, run

__all__ = ["examine", "main"]

LISTS = (probes, surroundings)
"""The modules whose import puts the probes on the list."""

GROUPS = ("software", "who", "transports", "limits", "memory", "events", "places", "security", "processes")


def examine() -> list[tuple[Probe, Finding]]:
    """Run every probe, group by group, and return what they found."""
    return [(one, run(one)) for one in sorted(probing.probes, key=lambda one: GROUPS.index(one.group))]


def main(*, as_json: bool) -> int:
    """Print the report; return 1 where something is missing without which fdshare cannot work, else 0."""
    found = examine()
    if as_json:
        print(
            json.dumps({"fdshare": fdshare.__version__, "findings": [_told(*one) for one in found]}, indent=1)
        )
    else:
        _report(found)
    return int(any(finding.state == MISSING and one.needed for one, finding in found))


def _told(one: Probe, finding: Finding) -> dict[str, object]:
    return {
        "group": one.group,
        "name": one.name,
        "state": finding.state,
        "needed": one.needed,
        "found": finding.found,
        "advice": finding.advice,
        "values": finding.values,
    }


def _report(found: list[tuple[Probe, Finding]]) -> None:
    rows = []
    for one, finding in found:
        rows.append((finding.state, one.name, printable(finding.found)))
    lines = columns(rows)
    group = ""
    for (one, finding), line in zip(found, lines, strict=True):
        if one.group != group:
            group = one.group
            print(f"{group}")
        print(f"  {line}")
        if finding.advice:
            print(f"  {'':7}  -> {printable(finding.advice)}")
    count = {state: sum(finding.state == state for _, finding in found) for state in (OK, WARN, MISSING)}
    print(f"{count[OK]} ok, {counted(count[WARN], 'warning')}, {count[MISSING]} missing")
