"""The example and its unit under a real systemd: a user manager in a cgroup and a mount namespace of its own.

Asked for with ``make soak``; needs root, Debian's systemd and cgroups that may be written.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from handovers import SOON, reserved_port
from helpers import wait_until

ROOT = Path(__file__).resolve().parent.parent
SYSTEMD = "/lib/systemd/systemd"

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="a systemd of one's own needs root"),
    pytest.mark.skipif(
        not Path(SYSTEMD).exists(), reason="no systemd here (Debian: apt-get install systemd)"
    ),
]

# A user manager asks whether the system was booted with systemd: there it was, as far as this one can see.
START = """
set -e
for top in /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup; do
  if [ -w $top/cgroup.procs ]; then mkdir -p $top/$NAME; echo $$ > $top/$NAME/cgroup.procs; fi
done
exec unshare --mount --propagation private sh -c '
  mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && exec "$SYSTEMD" --user --unit=idle.target'
"""


class Manager:
    """A systemd --user."""

    def __init__(self, home: Path) -> None:
        self.name = f"fdshare-{os.getpid()}"
        self.units = home / "config" / "systemd" / "user"
        self.units.mkdir(parents=True)
        self.runtime = home / "run"
        self.runtime.mkdir(mode=0o700)
        (self.units / "idle.target").write_text("[Unit]\nDescription=idle\n")
        self.environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": os.fspath(self.runtime),
            "XDG_CONFIG_HOME": os.fspath(home / "config"),
            "HOME": os.fspath(home),
            "NAME": self.name,
            "SYSTEMD": SYSTEMD,
        }
        self.process = subprocess.Popen(["sh", "-c", START], env=self.environment, start_new_session=True)

    def ctl(self, *arguments: str) -> str:
        """Run systemctl."""
        command = ["systemctl", "--user", *arguments]
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def show(self, unit: str) -> dict[str, str]:
        """Return what it knows about a unit."""
        lines = self.ctl(
            "show", unit, "-p", "MainPID,ActiveState,NRestarts,NFileDescriptorStore,Result"
        ).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(SOON)
        for top in ("systemd", "unified", "."):
            for directory, _, _ in os.walk(f"/sys/fs/cgroup/{top}/{self.name}", topdown=False):
                with suppress(OSError):
                    os.rmdir(directory)


@pytest.fixture
def manager() -> Iterator[Manager]:
    home = Path(tempfile.mkdtemp(prefix="fds"))  # its sockets have short paths
    made = Manager(home)
    try:
        with suppress(AssertionError):
            wait_until(
                lambda: (made.runtime / "systemd" / "private").exists() or made.process.poll() is not None, 10
            )
        if not (made.runtime / "systemd" / "private").exists():
            pytest.skip("no systemd can be started here")
        yield made
    finally:
        made.close()
        shutil.rmtree(home)


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=SOON) as answer:
        return str(answer.read().decode())


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


def unit(port: int) -> str:
    """The unit of the guide, for this checkout."""
    text = (ROOT / "examples" / "hot_restart.service").read_text()
    command = f"{sys.executable} {ROOT}/examples/hot_restart_asyncio.py --port {port} --control ${{RUNTIME_DIRECTORY}}/control"
    text = re.sub(
        r"^ExecStart=.*(?:\\\n.*)*$", f"ExecStart={command}\nEnvironment=PYTHONPATH={ROOT}", text, flags=re.M
    )
    return re.sub(r"^(User|DynamicUser|ProtectSystem|WantedBy|After)=.*\n", "", text, flags=re.M)


def test_reload_crash_and_stop(manager: Manager, port: int) -> None:
    (manager.units / "app.service").write_text(unit(port))
    manager.ctl("start", "app.service")
    pids = [manager.show("app")["MainPID"]]
    assert ask(port) == f"hello from {pids[0]}\n"

    for _ in range(3):  # the main process is another one each time, and the service was never down
        manager.ctl("reload", "app")
        wait_until(lambda: manager.show("app")["MainPID"] not in pids)
        pids.append(manager.show("app")["MainPID"])
        assert ask(port) == f"hello from {pids[-1]}\n"
    told = manager.show("app")
    assert (told["ActiveState"], told["NRestarts"], told["NFileDescriptorStore"]) == ("active", "0", "1")

    os.kill(int(pids[-1]), signal.SIGKILL)  # whoever connects now waits for the next one
    answer = ask(port)
    assert answer not in {f"hello from {pid}\n" for pid in pids}
    told = manager.show("app")
    assert answer == f"hello from {told['MainPID']}\n"
    assert told["NRestarts"] == "1"

    manager.ctl("stop", "app")
    told = manager.show("app")
    assert (told["ActiveState"], told["Result"]) == ("inactive", "success")


def test_socket_activation(manager: Manager, port: int) -> None:
    (manager.units / "app.service").write_text(unit(1))  # the unit of the socket says where
    socket_unit = (ROOT / "examples" / "hot_restart.socket").read_text()
    socket_unit = re.sub(r"^ListenStream=.*$", f"ListenStream=127.0.0.1:{port}", socket_unit, flags=re.M)
    (manager.units / "app.socket").write_text(socket_unit)
    manager.ctl("start", "app.socket")
    first = ask(port)
    assert first == f"hello from {manager.show('app')['MainPID']}\n"
    manager.ctl("reload", "app")
    wait_until(lambda: ask(port) != first)
    manager.ctl("restart", "app")
    assert ask(port) == f"hello from {manager.show('app')['MainPID']}\n"
    assert manager.show("app")["NFileDescriptorStore"] == "0"  # the socket's unit has it
    manager.ctl("stop", "app.socket", "app.service")


def test_the_units_are_what_systemd_understands() -> None:
    units = [str(ROOT / "examples" / f"hot_restart.{kind}") for kind in ("service", "socket")]
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
