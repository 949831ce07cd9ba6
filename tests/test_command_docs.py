"""The sessions of docs/command.md are run as they stand, and print what the page says they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command import ROOT, TIMEOUT

from fdshare.command import doctor, probing

PAGE = (ROOT / "docs" / "command.md").read_text()
PROGRAM = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SESSION = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def split(session: str) -> tuple[str, str]:
    """Return the commands of a session, and what they print."""
    lines = session.splitlines()
    commands = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return "\n".join(commands), "\n".join(line for line in lines if not line.startswith("$ "))


def alike(text: str) -> list[list[str]]:
    """Return what does not depend on the day: the words of each line, without numbers, folders and names of programs."""
    text = re.sub(r"(?m)(?<=\s)/(?!dev/)\S*?(/words)?$", r"FOLDER\1", text)
    text = re.sub(r"\((?:python|fdshare)[^)]*\)", "(PROGRAM)", text)
    return [re.sub(r"\d+", "N", line).split() for line in text.splitlines()]


SESSIONS = [split(session) for session in SESSION.findall(PAGE)]


@pytest.mark.parametrize("place", range(len(SESSIONS)))
def test_session_prints_what_the_page_says(place: int, tmp_path: Path) -> None:
    script, expected = SESSIONS[place]
    fdshare = (
        f'fdshare() {{ "{sys.executable}" -m fdshare "$@"; }}\npython() {{ "{sys.executable}" "$@"; }}\n'
    )
    program = tmp_path / "bin" / "fdshare"  # for --exec, which knows no functions of a shell
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fdshare "$@"\n')
    program.chmod(0o755)
    folder = tmp_path / "home"
    folder.mkdir()
    for name, code in PROGRAM.findall(PAGE):
        (folder / name).write_text(code)
    result = subprocess.run(
        ["sh", "-c", f"{fdshare}{script}\nwait\n"],
        cwd=folder,
        env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert alike(result.stdout) == alike(expected), result.stdout
    assert result.returncode == 0


def test_there_are_sessions() -> None:
    assert len(SESSIONS) >= 6
    assert all(output for _, output in SESSIONS)


def test_report_of_the_doctor_is_of_today() -> None:
    """Every probe has its line on the page, under its heading, and there is no other."""
    (report,) = re.findall(r"^```text\n(software\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines = [line for line in report.splitlines()[:-1] if "->" not in line]
    found = [re.split(r"\s{2,}", line.strip())[0:2] for line in lines if line.startswith(" ")]
    names = {
        line[1] if line[0] in ("ok", "warn", "missing") else line[0].split(maxsplit=1)[1] for line in found
    }
    assert names == {one.name for one in probing.probes}
    assert [line for line in lines if not line.startswith(" ")] == list(doctor.GROUPS)


def test_a_wrong_session_is_found() -> None:
    assert split("$ a\nb\n$ c\n") == ("a\nc", "b")
    assert alike("pid 12 (python3) /tmp/x/words") == alike("pid 4 (fdshare) /home/me/words")
    assert alike("pid 12 fd 3") != alike("pid 12 3")
    assert alike("/a/b /c") != alike("/dev/null /c")
