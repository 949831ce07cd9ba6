"""Starting the next generation from the one that serves, as for a reload.

Not as its child: the service manager must be told when it dies, and not a process that is about to end.  So a process between
the two starts it and ends, and the kernel gives it to the manager (or to init).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

from fdshare.handle import own_pipe

__all__ = ["start"]

BETWEEN = """
import os, sys
report = int(sys.argv[1])
os.set_inheritable(report, False)
os.write(report, b"%d" % os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ))
"""


def start(command: Iterable[str] | None) -> int:
    """Start ``command``, or this program again; return its pid.

    Raises:
        OSError: it cannot be started.
    """
    arguments = [sys.executable, *sys.orig_argv[1:]] if command is None else list(command)
    # What systemd has handed to this process is not for the next one, which asks its predecessor.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    reader, writer = own_pipe()
    with reader, writer:
        between = subprocess.run(
            [sys.executable, "-S", "-E", "-c", BETWEEN, str(writer.fileno()), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[writer.fileno()],
            check=False,
        )
        if between.returncode:
            raise OSError(f"cannot start {arguments[0]!r} as a successor")
        return int(os.read(reader.fileno(), 20))
