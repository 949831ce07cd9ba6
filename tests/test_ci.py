"""The CI's own parts: the check on skips is able to fail, and the scripts go the ways they should."""

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


def check(folder: Path, allowed: str, report: str | None, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "allowed.txt").write_text(allowed)
    if report is not None:
        (folder / "report.xml").write_text(report)
    arguments = [*options, folder / "allowed.txt", folder / "report.xml"]
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


def test_skip_is_allowed_for_some_pythons_alone(tmp_path: Path) -> None:
    allowed = "a known bug\n@3.11,3.14  no kqueue here\n"
    assert check(tmp_path, allowed, REPORT, "--for", "3.14").returncode == 0
    for options in (("--for", "3.15"), ("--for", "3.1"), ()):
        result = check(tmp_path, allowed, REPORT, *options)
        assert (result.returncode, result.stdout.count("\n")) == (1, 1), options
        assert "no kqueue here" in result.stdout


@pytest.mark.parametrize("script", ["run", "debian"])
def test_script_parses(script: str) -> None:
    subprocess.run(["bash", "-n", CI / script], check=True, timeout=30)


def test_debian_says_how_it_is_used() -> None:
    """And does nothing without being told what."""
    result = subprocess.run([CI / "debian"], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 2
    assert ".ci/debian run COMMAND..." in result.stderr


def run_stage(folder: Path, *arguments: str, make: str = "exit 0") -> subprocess.CompletedProcess[str]:
    """Run a copy of ``.ci/run`` that wants Python 3.99, which no machine has, with a stand-in for ``.ci/debian``."""
    (folder / ".ci").mkdir()
    (folder / "bin").mkdir()
    script = (CI / "run").read_text()
    assert "newer=(3.14 3.15)" in script
    debian = 'if [ "$1" = make ]; then %s; elif [ "$1" = pythons ]; then echo 3.99; else shift; echo "there: $*"; fi'
    for name, text in (
        (".ci/run", script.replace("newer=(3.14 3.15)", "newer=(3.99)")),
        (".ci/debian", debian % make),
        *((f"bin/{name}", "exit 0") for name in ("wrk", "debootstrap", "unshare", "apt-get")),
        ("bin/id", "echo 0"),
    ):
        (folder / name).write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return subprocess.run(
        [folder / ".ci" / "run", *arguments],
        env={"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_a_python_that_is_not_here_is_tried_in_a_debian(tmp_path: Path) -> None:
    result = run_stage(tmp_path, "3.99")
    assert result.returncode == 0, result.stderr
    for target in ("check", "test"):
        assert f"there: make VENV=.venv-ci-sid-3.99 PYTHON=python3.99 {target}" in result.stdout
    assert "--for 3.99" in result.stdout
    assert result.stdout.endswith("all passed on 3.99\n")


def test_a_mirror_that_fails_is_told_and_no_failure(tmp_path: Path) -> None:
    result = run_stage(tmp_path, "3.99", make="exit 1")
    assert result.returncode == 0, result.stderr
    assert "left out       3.99: no mirror of Debian" in result.stdout
    assert "there:" not in result.stdout
