"""Fail on tests that were skipped (or xfailed) for a reason nobody allowed, and on a report without tests.

usage: check_skips.py [--for PYTHON] ALLOWED REPORT.xml...

PYTHON is what the reports come from, such as 3.14: lines that are for other Pythons alone count only there.
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def read_allowed(text: str, python: str = "") -> list[re.Pattern[str]]:
    """Return the patterns of an allow-list: one a line; empty lines and those that start with ``#`` are comments.

    A line ``@3.11,3.12 pattern`` is for these Pythons alone.
    """
    patterns = []
    for line in map(str.strip, text.splitlines()):
        pythons, _, pattern = line[1:].partition(" ") if line.startswith("@") else (python, "", line)
        if pattern and not pattern.startswith("#") and python in pythons.split(","):
            patterns.append(re.compile(pattern.strip()))
    return patterns


def unexpected(report: str, allowed: list[re.Pattern[str]]) -> list[str]:
    """Return a line for each skip in a JUnit report whose reason no pattern matches in full.

    Raises:
        ValueError: the report holds no test at all.
    """
    cases = list(ET.fromstring(report).iter("testcase"))
    if not cases:
        raise ValueError("the report holds no test")
    lines = []
    for case in cases:
        for skip in case.iter("skipped"):
            reason = skip.get("message", "")
            if not any(pattern.fullmatch(reason) for pattern in allowed):
                lines.append(f"{case.get('classname')}::{case.get('name')}: {reason}")
    return lines


def main(arguments: list[str]) -> int:
    """Run it: 0 where every skip was allowed, 1 where not, 2 on a usage error."""
    python = ""
    if len(arguments) > 2 and arguments[0] == "--for":
        python, arguments = arguments[1], arguments[2:]
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    allowed = read_allowed(Path(arguments[0]).read_text(), python)
    status = 0
    for name in arguments[1:]:
        try:
            lines = unexpected(Path(name).read_text(), allowed)
        except (OSError, ET.ParseError, ValueError) as error:
            lines = [f"{name}: {error}"]
        for line in lines:
            print(f"not allowed to be skipped: {line}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
