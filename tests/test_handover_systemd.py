"""The handover under a service manager: a datagram socket that is told, and a parent that hands sockets over as systemd does."""

from __future__ import annotations

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from handovers import SOON, ask, first, listen, port_of
from helpers import wait_until

from fdshare import FdHandle, recv_fds
from fdshare.handover import Handover, HandoverRevokedError, notify, systemd
from fdshare.handover import handover as handover_module

ROOT = Path(__file__).resolve().parent.parent


class Manager:
    """What systemd is to a service: takes its datagrams in a thread, keeps its descriptors, and passes barriers."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(os.fspath(path))
        self.heard: queue.Queue[list[str]] = queue.Queue()
        self.at_barrier = threading.Event()
        self.pass_barriers = threading.Event()
        self.pass_barriers.set()
        self.store: list[tuple[str, FdHandle]] = []
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()

    def listen(self) -> None:
        while True:
            data, handles = recv_fds(self.sock, 4096, 10)
            if not data:
                return
            lines = data.decode().split("\n")
            fields = dict(line.split("=", 1) for line in lines)
            if "BARRIER" in fields:
                self.at_barrier.set()
                self.pass_barriers.wait(SOON)
                for handle in handles:
                    handle.close()
                continue
            if "FDSTOREREMOVE" in fields:
                self.forget(fields["FDNAME"])
            self.store += [(fields["FDNAME"], handle) for handle in handles]
            self.heard.put(lines)

    def forget(self, wanted: str) -> None:
        for name, handle in self.store:
            if name == wanted:
                handle.close()
        self.store = [pair for pair in self.store if pair[0] != wanted]

    def told(self) -> list[str]:
        """Return the lines of the next datagram that is no barrier."""
        return self.heard.get(timeout=SOON)

    def nothing_more(self) -> bool:
        """Whether nothing has come; what was sent by somebody who has gone on since is here."""
        return self.heard.empty()

    def close(self) -> None:
        self.pass_barriers.set()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
            end.sendto(b"", self.sock.getsockname())
        self.thread.join(SOON)
        self.sock.close()
        for _, handle in self.store:
            handle.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(tmp_path / "notify"))
    yield made
    made.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


ME = [f"MAINPID={os.getpid()}", "READY=1"]


def test_what_is_told_in_a_life_and_a_handover(path: Path, manager: Manager) -> None:
    with Handover(path) as old:
        listen(old)
        listen(old, "admin")
        old.ready()
        assert [manager.told() for _ in range(3)] == [
            ME,
            ["FDSTORE=1", "FDNAME=http"],
            ["FDSTORE=1", "FDNAME=admin"],
        ]
        assert [name for name, _ in manager.store] == ["http", "admin"]
        with Handover(path) as new:
            lines = manager.told()
            assert lines[0] == "RELOADING=1"
            found = re.fullmatch(r"MONOTONIC_USEC=(\d+)", lines[1])
            assert found
            assert 0 <= time.monotonic() - int(found[1]) / 1e6 < SOON
            listen(new)
            listen(new, "metrics")
            new.ready()
            assert old.retired.wait(SOON)
            heard = [manager.told() for _ in range(4)]
            assert sorted(heard) == sorted(
                [ME, ME, ["FDSTOREREMOVE=1", "FDNAME=admin"], ["FDSTORE=1", "FDNAME=metrics"]]
            )
            assert [name for name, _ in manager.store] == ["http", "metrics"]
        assert manager.told() == ["STOPPING=1"]
    assert systemd.barrier()
    assert manager.nothing_more()  # the old one is nobody's main process any more


def test_the_old_one_is_not_retired_before_the_manager_knows(path: Path, manager: Manager) -> None:
    """If it ended before, systemd would take that for the end of the service."""
    manager.pass_barriers.clear()
    with first(path) as (old, _), Handover(path) as new:
        listen(new)
        new.ready()
        assert manager.at_barrier.wait(SOON)
        assert not old.retired.is_set()
        assert new.predecessor == os.getpid()
        manager.pass_barriers.set()
        assert old.retired.wait(SOON)


def test_a_manager_that_hangs_does_not_stop_a_handover(
    path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "PATIENCE", 0.05)
    manager.pass_barriers.clear()
    with first(path) as (old, _), Handover(path) as new:
        listen(new)
        new.ready()
        assert old.retired.wait(SOON)


def test_a_manager_that_is_not_there_does_not_stop_a_handover(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(tmp_path / "nobody"))
    assert not notify("STATUS=here")
    assert not systemd.barrier()
    with first(path) as (old, _), Handover(path) as new:
        new.ready()
        assert old.retired.wait(SOON)


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_an_address_that_is_no_socket_of_this_kind(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not systemd.notifying()
    assert not notify("READY=1")
    assert systemd.barrier()


def test_an_abstract_address(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"fdshare-notify-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        assert notify("STATUS=first", "STATUS=second")
        assert sock.recv(100) == b"STATUS=first\nSTATUS=second"


def test_a_reload_that_fails_ends(path: Path, manager: Manager) -> None:
    with first(path, successor_timeout=0.05) as (_, _), Handover(path) as new:
        listen(new)
        assert [manager.told()[0] for _ in range(4)] == [ME[0], "FDSTORE=1", "RELOADING=1", "READY=1"]
        with pytest.raises(HandoverRevokedError):
            new.ready()


# sockets from outside -----------------------------------------------------------------------------------------------------

SERVER = """
import os, socket, sys
from fdshare.handover import Handover
with Handover(sys.argv[1]) as handover:
    sock = handover.listen("http", "127.0.0.1", int(sys.argv[2]))
    extra = handover.inherited("extra")
    handover.ready()
    if extra is not None:
        extra.close()
    left = sorted(set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2})
    assert not any(name.startswith("LISTEN_") for name in os.environ)
    print("serves", handover.generation, extra is not None, flush=True)
    while True:
        try:
            connection, _ = sock.accept()
        except OSError:
            break
        with connection:
            connection.sendall(b"%d" % os.getpid())
"""

# What systemd does between fork and exec: descriptors from 3 on, and the pid that only the new process knows.
AS_SYSTEMD = """
import os, sys
names, *command = sys.argv[1:]
pairs = [pair.split("=") for pair in names.split(",")]
moved = [os.dup(int(number)) for _, number in pairs]
high = [os.dup2(fd, 200 + place) for place, fd in enumerate(moved)]
for place, fd in enumerate(high):
    os.dup2(fd, 3 + place)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(pairs)), LISTEN_FDNAMES=":".join(name for name, _ in pairs))
os.closerange(3 + len(pairs), 300)
os.execv(command[0], command)
"""


class Server:
    """A server that is a program, started as a service would be."""

    def __init__(self, path: Path, port: int, inherited: list[tuple[str, FdHandle]]) -> None:
        command = [sys.executable, "-c", SERVER, os.fspath(path), str(port)]
        if inherited:
            names = ",".join(f"{name}={handle.fileno()}" for name, handle in inherited)
            command = [sys.executable, "-c", AS_SYSTEMD, names, *command]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            pass_fds=[handle.fileno() for _, handle in inherited],
            text=True,
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline().split()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self.process:
            self.process.send_signal(signal.SIGKILL)


Start = Callable[..., Server]


@pytest.fixture
def start(path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(port: int, *inherited: tuple[str, FdHandle]) -> Server:
            return stack.enter_context(Server(path, port, list(inherited)))

        yield begin


def test_a_crashed_service_gets_its_sockets_back(path: Path, manager: Manager, start: Start) -> None:
    """The port is open all the time: who connects while nobody lives is served by the next start."""
    server = start(0)
    assert server.said[:2] == ["serves", "0"]
    assert manager.told() == [f"MAINPID={server.process.pid}", "READY=1"]
    assert manager.told() == ["FDSTORE=1", "FDNAME=http"]
    with manager.store[0][1].to_socket() as stored:
        port = port_of(stored)
        assert ask(port) == b"%d" % server.process.pid
        server.kill()
        with socket.create_connection(("127.0.0.1", port), SOON) as client, FdHandle.dup(stored) as handle:
            again = start(0, ("http", handle))
            assert manager.told() == [f"MAINPID={again.process.pid}", "READY=1"]
            assert client.makefile("rb").read() == b"%d" % again.process.pid
        manager.store.clear()
    assert ask(port) == b"%d" % again.process.pid
    assert systemd.barrier()
    assert manager.nothing_more()  # what the manager has it need not be given again


def test_socket_activation_by_name(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.create_server(("127.0.0.1", 0)) as other:
        with FdHandle.dup(sock) as http, FdHandle.dup(other) as unwanted, FdHandle.dup(0) as extra:
            server = start(1, ("unwanted", unwanted), ("http", http), ("extra", extra))
        assert server.said == ["serves", "0", "True"]
        port = port_of(sock)
        refused = port_of(other)
        sock.close()
        other.close()
        assert ask(port) == b"%d" % server.process.pid
        with pytest.raises(ConnectionRefusedError):  # nobody has it any more
            ask(refused)


def test_what_the_manager_keeps_for_nothing_is_given_up(
    path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart that wants other names than the crashed generation had."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        monkeypatch.setattr(handover_module, "listen_fds", lambda: [("gone", FdHandle.dup(sock))])
        with Handover(path) as handover:
            listen(handover)
            handover.ready()
            assert [manager.told() for _ in range(3)] == [
                ME,
                ["FDSTOREREMOVE=1", "FDNAME=gone"],
                ["FDSTORE=1", "FDNAME=http"],
            ]


# starting a successor ----------------------------------------------------------------------------------------------------

GENERATION = """
import os, signal, sys
from fdshare.handover import Handover
with Handover(sys.argv[1]) as handover:
    handover.listen("http", "127.0.0.1", 0)
    handover.ready()
    with open(sys.argv[2], "a") as log:
        log.write(f"{handover.generation} {os.getpid()} {os.getppid()}\\n")
    if handover.generation < 2:
        handover.start_successor()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
    handover.retired.wait(30)
"""


def test_a_successor_is_the_same_command_and_nobodys_child(path: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-c", GENERATION, os.fspath(path), os.fspath(log)]
    environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=SOON)
    wait_until(lambda: log.read_text().count("\n") == 3)
    rows = [list(map(int, line.split())) for line in log.read_text().splitlines()]
    assert [generation for generation, _, _ in rows] == [0, 1, 2]
    pids = {pid for _, pid, _ in rows}
    assert len(pids) == 3
    assert not pids & {parent for _, _, parent in rows}


def test_a_successor_that_cannot_be_started(path: Path) -> None:
    with first(path) as (handover, _), pytest.raises(OSError, match="cannot start '/nowhere'"):
        handover.start_successor(["/nowhere"])
