"""Runs the ``fdshare`` command as a real process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "fdshare"]
TIMEOUT = 45.0
"""Seconds for one run of the command; most need a quarter of one."""


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``fdshare ARGUMENTS`` to its end."""
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    if "stdout" in options:
        given |= {"stderr": subprocess.PIPE}
        del given["capture_output"]
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        timeout=TIMEOUT,
        check=False,
        **given | options,
    )


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start ``fdshare ARGUMENTS``; to be used as a context manager."""
    given: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    return subprocess.Popen([*COMMAND, *map(str, arguments)], cwd=ROOT, **given | options)
