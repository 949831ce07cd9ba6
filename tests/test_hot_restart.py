"""Real servers under load by wrk, restarted ten times in a row: no request fails, and no connection is reset.

Two loads run at the same time: one whose clients keep their connections, and one that connects for each request.  A
generation that crashes while it starts comes before every second restart.  ``make soak`` has more of all: more
restarts, settings and load, each with and without crashes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from handovers import SOON, reserved_port
from helpers import wait_until

ROOT = Path(__file__).resolve().parent.parent
ASYNCIO = "hot_restart_asyncio.py"
UVICORN = "hot_restart_uvicorn.py"
GUNICORN = "hot_restart_gunicorn.py"
RESTARTS = 10
CONNECTIONS = 6
PAUSE = 5
"""Milliseconds between the requests of a connection: so that the load, of two thousand a second, leaves the processors to the
generations that start."""

LOAD_SECONDS = 600
"""Longest load; it is told to end when the last restart is done."""

needs_wrk = pytest.mark.skipif(
    shutil.which("wrk") is None, reason="no wrk here (Debian: apt-get install wrk)"
)


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


class Server:
    """A generation of an example, as a program."""

    def __init__(self, example: str, *arguments: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / example), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(),
            text=True,
        )
        self.output: list[str] = []

    def wait_for(self, words: str) -> None:
        """Read what it says until ``words`` occur."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line)
            if words in line:
                return
        raise AssertionError(f"it ended without a word of {words!r}:\n{''.join(self.output)}")

    def ended(self) -> int:
        """Wait for its end; return its exit status."""
        output, _ = self.process.communicate(timeout=40)
        self.output.append(output)
        return self.process.returncode

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with self.process:
            pass


class Load:
    """wrk against a port, until it is told to end."""

    def __init__(self, port: int, *options: str, pause: int = PAUSE) -> None:
        script = ROOT / "tests" / "load.lua"
        command = [
            "wrk",
            "-t1",
            f"-c{CONNECTIONS}",
            f"-d{LOAD_SECONDS}",
            "--timeout",
            "20",
            f"-s{script}",
            *options,
        ]
        self.process = subprocess.Popen(
            [*command, f"http://127.0.0.1:{port}/"],
            stdout=subprocess.PIPE,
            env={**os.environ, "WRK_DELAY": str(pause)},
            text=True,
        )

    def result(self) -> dict[str, int]:
        """End it, and return its counts."""
        self.process.send_signal(signal.SIGINT)
        output, _ = self.process.communicate(timeout=SOON)
        lines = [line for line in output.splitlines() if line.startswith("load ")]
        assert lines, output
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", lines[0])}

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with self.process:
            pass


@contextlib.contextmanager
def generations(example: str, control: Path, serves: str, *options: object) -> Iterator[tuple[int, Server]]:
    """Run a first generation; yield its port, and itself."""
    with (
        reserved_port() as port,
        Server(example, "--port", port, "--control", control, *options) as server,
    ):
        server.wait_for(serves)
        yield port, server


def restart_under_load(
    example: str,
    control: Path,
    serves: str,
    restarts: int,
    *options: object,
    crash_status: int | None,
    pause: int = PAUSE,
) -> list[dict[str, int]]:
    """Restart an example under both loads, also while older generations still drain; return what the loads counted."""
    with contextlib.ExitStack() as stack:
        port, server = stack.enter_context(generations(example, control, serves, *options))
        arguments = ["--port", port, "--control", control, *options]
        kept = stack.enter_context(Load(port, pause=pause))
        anew = stack.enter_context(Load(port, "-H", "Connection: close", pause=pause))
        old = []
        for number in range(restarts):
            if crash_status is not None and number % 2 == 0:
                crashed = stack.enter_context(Server(example, *arguments, "--crash"))
                assert crashed.ended() == crash_status, "".join(crashed.output)
            successor = stack.enter_context(Server(example, *arguments, "--greeting", number))
            successor.wait_for(serves)
            old.append(server)
            server = successor
        assert [generation.ended() for generation in old] == [0] * restarts
        counts = [kept.result(), anew.result()]
        server.process.send_signal(signal.SIGTERM)
        server.ended()
    return counts


def check(name: str, counts: list[dict[str, int]], restarts: int) -> None:
    for how, count in zip(("keep-alive", "a connection each"), counts, strict=True):
        slowest = count.pop("slowest_us") / 1000
        requests = count.pop("requests")
        what = f"{name}, {restarts} restarts, {how}"
        print(f"{what}: {requests} requests, the slowest {slowest:.1f} ms, failed: {count}")  # noqa: T201 -- for -rP
        assert requests > restarts
        assert count == dict.fromkeys(("connect", "read", "write", "status", "timeout"), 0)


@needs_wrk
def test_asyncio_server_through_ten_restarts(tmp_path: Path) -> None:
    counts = restart_under_load(ASYNCIO, tmp_path / "control", " serves http", RESTARTS, crash_status=1)
    check("asyncio", counts, RESTARTS)


@needs_wrk
def test_uvicorn_through_ten_restarts(tmp_path: Path) -> None:
    options = ("--http", "h11", "--loop", "asyncio")
    counts = restart_under_load(
        UVICORN, tmp_path / "control", " serves at", RESTARTS, *options, crash_status=3
    )
    check("uvicorn", counts, RESTARTS)


@needs_wrk
def test_gunicorn_through_ten_restarts(tmp_path: Path) -> None:
    pytest.importorskip("gunicorn")
    options = ("--workers", "1")
    counts = restart_under_load(
        GUNICORN, tmp_path / "control", "Booting worker", RESTARTS, *options, crash_status=1
    )
    check("gunicorn", counts, RESTARTS)


@pytest.mark.soak
@needs_wrk
@pytest.mark.parametrize("crashes", [False, True])
@pytest.mark.parametrize(
    ("example", "serves", "options", "status"),
    [
        (ASYNCIO, " serves http", (), 1),
        (UVICORN, " serves at", ("--http", "h11", "--loop", "asyncio"), 3),
        (UVICORN, " serves at", ("--http", "httptools", "--loop", "uvloop"), 3),
        (GUNICORN, "Booting worker", ("--worker-class", "gthread"), 1),
        (GUNICORN, "Booting worker", ("--worker-class", "sync"), 1),
    ],
)
def test_fifty_restarts(
    tmp_path: Path, example: str, serves: str, options: tuple[str, ...], status: int, crashes: bool
) -> None:
    if "uvloop" in options:
        pytest.importorskip("uvloop")
        pytest.importorskip("httptools")
    control = tmp_path / "control"
    counts = restart_under_load(
        example, control, serves, 50, *options, crash_status=status if crashes else None, pause=0
    )
    check(" ".join((example, *options)), counts, 50)


def connections_to(port: int) -> int:
    """Return how many connections a server on ``port`` has."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(local.endswith(f":{port:04X}") and state == "01" for _, local, _, state, *_ in lines)


@needs_wrk
def test_the_load_notices_what_is_lost(tmp_path: Path) -> None:
    """A server that is killed and started again fails requests, and is counted."""
    control = tmp_path / "control"
    with generations(ASYNCIO, control, " serves http") as (port, server), Load(port) as load:
        wait_until(lambda: connections_to(port) >= CONNECTIONS)
        server.process.kill()
        server.ended()
        with Server(ASYNCIO, "--port", port, "--control", control) as again:
            again.wait_for(" serves http")
            count = load.result()
    assert sum(count[name] for name in ("connect", "read", "write", "timeout")) > 0
