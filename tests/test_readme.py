"""The README's code is run as it stands, and prints what the README says it prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# A python block, and the text block with its output where one follows.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)


def snippets(text: str) -> list[tuple[str, str]]:
    """Return each python block of a page with the output the page shows for it ('' where it shows none)."""
    return BLOCK.findall(text)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a snippet as a user would, as a file; a descriptor dropped open is reported on its stderr."""
    script = folder / "snippet.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, "-W", "error", script.name],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=45,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


SNIPPETS = snippets(README.read_text())


@pytest.mark.parametrize("place", range(len(SNIPPETS)))
def test_snippet_runs_and_prints_what_it_says(place: int, tmp_path: Path) -> None:
    code, output = SNIPPETS[place]
    result = run(code, tmp_path)
    assert result.stderr == ""
    assert result.returncode == 0
    if output:
        assert result.stdout.split() == output.split()  # a page wraps long lines


def test_there_are_three_snippets_and_an_error_message() -> None:
    assert len(SNIPPETS) >= 3
    assert any("Error" in code and output for code, output in SNIPPETS)


def test_files_it_refers_to_are_there() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", README.read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_a_failing_snippet_is_found(tmp_path: Path) -> None:
    page = "```python\nprint(1)\n```\n\n```text\n2\n```\n\n```python\nraise SystemExit(3)\n```\n"
    (first, output), (second, nothing) = snippets(page)
    assert (run(first, tmp_path).stdout, output, nothing) == ("1\n", "2\n", "")
    assert run(second, tmp_path).returncode == 3
