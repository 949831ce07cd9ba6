"""The code on the page about asyncio runs as it stands, and drops nothing open."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "asyncio.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(code: str) -> None:
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=60, cwd=PAGE.parent.parent
    )
    assert (result.stderr, result.returncode) == ("", 0)
