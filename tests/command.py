"""Runs the ``fdshare`` command as a real process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-W", "error", "-m", "fdshare"]
TIMEOUT = 45.0
"""Seconds for one run of the command; most need a quarter of one."""


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``fdshare ARGUMENTS`` to its end."""
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "cwd": ROOT}
    if "stdout" in options:
        given |= {"stderr": subprocess.PIPE}
        del given["capture_output"]
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
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


AS_NOBODY = """
import email.parser, multiprocessing.connection, multiprocessing.popen_fork, os, sys  # loaded while the files can still be read
import fdshare.command.doctor, fdshare.command.exchange, fdshare.command.ls
fdshare.connect
from fdshare.cli import main
os.setgroups([])
os.setregid(65534, 65534)
os.setreuid(65534, 65534)
sys.exit(main(sys.argv[1:]))
"""


def run_as_nobody(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``fdshare ARGUMENTS``, started by root, as the user nobody."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", AS_NOBODY, *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        **options,
    )
