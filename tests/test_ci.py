"""The CI's own parts: the check on skips is able to fail, and the script at least parses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CI = Path(__file__).resolve().parent.parent / ".ci"

REPORT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" tests="3">
<testcase classname="tests.test_a" name="test_runs"/>
<testcase classname="tests.test_a" name="test_skipped"><skipped type="pytest.skip" message="no kqueue here"/></testcase>
<testcase classname="tests.test_a" name="test_xfails"><skipped type="pytest.xfail" message="a known bug"/></testcase>
</testsuite></testsuites>"""

EMPTY = "<testsuites><testsuite/></testsuites>"


def check(folder: Path, allowed: str, report: str | None) -> subprocess.CompletedProcess[str]:
    (folder / "allowed.txt").write_text(allowed)
    if report is not None:
        (folder / "report.xml").write_text(report)
    arguments = [folder / "allowed.txt", folder / "report.xml"]
    return subprocess.run(
        [sys.executable, CI / "check_skips.py", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_allowed_skips_pass(tmp_path: Path) -> None:
    result = check(tmp_path, "# kqueue is BSD's\nno kqueue .*\n\na known bug\n", REPORT)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    "allowed", ["no kqueue here", "no kqueue here\n# a known bug", "no kqueue here\na known"]
)
def test_other_skip_fails_and_is_named(tmp_path: Path, allowed: str) -> None:
    result = check(tmp_path, allowed, REPORT)
    assert result.returncode == 1
    assert result.stdout == "not allowed to be skipped: tests.test_a::test_xfails: a known bug\n"


@pytest.mark.parametrize("report", [EMPTY, "<broken", None])
def test_report_that_says_nothing_fails(tmp_path: Path, report: str | None) -> None:
    assert check(tmp_path, ".*", report).returncode == 1


def test_repository_list_is_readable(tmp_path: Path) -> None:
    result = check(tmp_path, (CI / "allowed_skips.txt").read_text(), REPORT)
    assert result.returncode == 1
    assert "a known bug" in result.stdout


def test_script_parses() -> None:
    subprocess.run(["bash", "-n", CI / "run"], check=True, timeout=30)
