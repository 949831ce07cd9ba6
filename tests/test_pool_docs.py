"""The programs of the pages on pools run as they stand there, and print what is said there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_examples import environment

DOCS = Path(__file__).resolve().parent.parent / "docs"


def program_of(page: str) -> str:
    """The one whole program of a page: the others show single calls."""
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)
    programs: list[str] = [block for block in blocks if "__main__" in block]
    assert len(programs) == 1
    return programs[0]


def run(page: str, directory: Path, **variables: str) -> str:
    path = directory / "program.py"
    path.write_text(program_of(page))
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        env={**environment(), **variables},
        text=True,
        timeout=40,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def test_failure_cases(tmp_path: Path) -> None:
    output = re.search(r"^```text\n(.*?)^```$", (DOCS / "pools.md").read_text(), re.MULTILINE | re.DOTALL)
    assert output is not None
    assert run("pools.md", tmp_path) == output[1]


@pytest.mark.skipif(not Path("/etc/hostname").exists(), reason="the program reads /etc/hostname")
def test_stock_pools(tmp_path: Path) -> None:
    # A stock pool's worker drops what it returns, and is told so where warnings are on.
    output = run("stock_pools.md", tmp_path, PYTHONWARNINGS="ignore::ResourceWarning")
    assert output.split() == 2 * Path("/etc/hostname").read_text().split()
