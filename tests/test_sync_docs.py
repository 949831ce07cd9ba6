"""The programs of the page on queues, locks, events and processes run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_examples import environment

PAGE = Path(__file__).resolve().parent.parent / "docs" / "sync.md"
PROGRAMS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_there_are_programs() -> None:
    assert len(PROGRAMS) == 5


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: re.findall(r"fdshare\.(\w+)", program)[0])
def test_program(program: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(program)
    run = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        env=environment(),
        text=True,
        timeout=40,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert run.stdout in ("", "3\n")
