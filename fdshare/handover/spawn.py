"""Starting the next generation from the one that serves, as for a reload."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterable

__all__ = ["start"]

logger = logging.getLogger("fdshare.handover")


def start(command: Iterable[str] | None) -> subprocess.Popen[bytes]:
    """Start ``command``, or this program again; its end is waited for in a thread, and logged where it failed.

    Raises:
        OSError: it cannot be started.
    """
    arguments = [sys.executable, *sys.orig_argv[1:]] if command is None else list(command)
    # What systemd has handed to this process is not for its child, which asks its predecessor.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    process = subprocess.Popen(arguments, env=environment, stdin=subprocess.DEVNULL)

    def wait() -> None:
        code = process.wait()
        if code:
            logger.warning("the successor, process %d, ended with %d", process.pid, code)

    threading.Thread(target=wait, name="fdshare handover successor", daemon=True).start()
    return process
