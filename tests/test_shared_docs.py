"""The code on the page about shared memory runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "shared.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 4


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(code: str) -> None:
    for name, shown in (("pandas", "pandas"), ("torch", "PyTorch")):
        if re.search(rf"^import .*\b{name}\b", code, re.MULTILINE) and find_spec(name) is None:
            pytest.skip(f"{shown} is not installed")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=PAGE.parent.parent)
