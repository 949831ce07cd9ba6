"""``fdshare ls``: what it tells of descriptors that a real process holds, and what it does where it cannot."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from command import COMMAND, ROOT, run, run_as_nobody

from fdshare import cli
from fdshare.command import ls
from fdshare.command.descriptors import Descriptor, by_fstat, by_proc, by_psutil
from fdshare.command.sockets import Socket, read_sockets

if not os.path.isdir("/proc/self/fd"):
    pytest.skip("no /proc here", allow_module_level=True)

HOLDER = """
import fcntl, json, os, select, signal, socket, struct, sys, tempfile, time
path, folder = sys.argv[1:]
kept = {}
kept["reader"] = open(path, "rb", buffering=0); kept["reader"].seek(3)
kept["appender"] = open(path, "ab")
kept["deleted"] = tempfile.NamedTemporaryFile(dir=folder)
os.unlink(kept["deleted"].name); kept["deleted"].delete = False
kept["locked"] = open(path); fcntl.flock(kept["locked"], fcntl.LOCK_EX)
kept["path"] = os.open(folder, os.O_PATH | os.O_DIRECTORY)
kept["directory"] = os.open(folder, os.O_RDONLY)
kept["pipe_r"], kept["pipe_w"] = os.pipe2(os.O_NONBLOCK)
kept["memfd"] = os.memfd_create("frame", os.MFD_ALLOW_SEALING); os.write(kept["memfd"], bytes(5000))
fcntl.fcntl(kept["memfd"], fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
kept["unsealed"] = os.memfd_create("open", os.MFD_ALLOW_SEALING)
kept["eventfd"] = os.eventfd(0x1f)
kept["pidfd"] = os.pidfd_open(os.getppid())
kept["epoll"] = select.epoll(); kept["epoll"].register(kept["eventfd"])
kept["a"], kept["b"] = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
socket.send_fds(kept["a"], [b"12345"], [0, 1, 2])
kept["unix"] = socket.socket(socket.AF_UNIX); kept["unix"].bind(folder + "/named"); kept["unix"].listen()
kept["abstract"] = socket.socket(socket.AF_UNIX); kept["abstract"].bind(f"\\0fdshare-test-{os.getpid()}")
kept["tcp"] = socket.create_server(("127.0.0.1", 0))
kept["client"] = socket.create_connection(kept["tcp"].getsockname())
kept["server"], _ = kept["tcp"].accept()
kept["udp"] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); kept["udp"].bind(("127.0.0.1", 0))
kept["tcp6"] = None
try:
    kept["tcp6"] = socket.create_server(("::1", 0), family=socket.AF_INET6)
except OSError:
    del kept["tcp6"]
kept["netlink"] = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
fds = {name: thing if isinstance(thing, int) else thing.fileno() for name, thing in kept.items()}
names = {name: kept[name].getsockname() for name in ("tcp", "client", "udp", *(["tcp6"] if "tcp6" in kept else []))}
print(json.dumps({"fds": fds, "names": names}), flush=True)
sys.stdin.read()
"""

FILE = b"0123456789"


@contextlib.contextmanager
def holder(folder: Path, **options: Any) -> Iterator[tuple[int, dict[str, int], dict[str, Any]]]:
    """Start a process with one descriptor of each kind: give its pid, the numbers by name, and addresses by name."""
    file = folder / "ten bytes"
    file.write_bytes(FILE)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield process.pid, told["fds"], told["names"]
        process.communicate("", timeout=20)  # it ends where its standard input does
    assert process.returncode == 0


def listed(*arguments: object, **options: Any) -> dict[int, dict[str, Any]]:
    result = run("ls", "--json", *arguments, **options)
    assert (result.returncode, result.stderr) == (0, "")
    return {one["fd"]: one for one in json.loads(result.stdout)["descriptors"]}


def test_every_kind(tmp_path: Path) -> None:
    with holder(tmp_path) as (pid, fds, names):
        one = listed(pid)
        table = run("ls", pid).stdout
    assert set(one) >= {0, 1, 2, *fds.values()}

    def told(name: str, *fields: str) -> tuple[Any, ...]:
        return tuple(one[fds[name]][field] for field in fields)

    path = str(tmp_path / "ten bytes")
    files = ("kind", "access", "offset", "size", "name")
    assert told("reader", *files) == ("file", "r", 3, 10, path)
    assert told("appender", *files) == ("file", "w", 10, 10, path)
    assert "append" in one[fds["appender"]]["flags"]
    assert told("deleted", "kind", "details") == ("file", {"deleted": True})
    assert not told("deleted", "name")[0].endswith("(deleted)")
    assert told("locked", "details") == ({"locked": "write"},)
    assert told("path", *files) == ("directory", "path", None, None, str(tmp_path))
    assert told("directory", *files) == ("directory", "r", None, None, str(tmp_path))
    assert told("reader", "flags") == (["cloexec"],)

    assert told("pipe_r", "kind", "access", "flags") == ("pipe", "r", ["nonblock"])
    command = Path(sys.executable).resolve().name[:15]
    for here, there in (("pipe_r", "pipe_w"), ("pipe_w", "pipe_r"), ("a", "b"), ("client", "server")):
        peers = one[fds[here]]["peers"]
        assert [(peer["pid"], peer["fd"]) for peer in peers] == [(pid, fds[there])]
        assert peers[0]["command"].startswith(command[:6])
    assert one[0]["kind"] == "pipe"
    assert [peer["pid"] for peer in one[0]["peers"]] == [os.getpid()]

    assert told("memfd", *files) == ("memfd", "rw", 5000, 5000, "frame")
    assert told("memfd", "details") == ({"seals": ["shrink", "grow"]},)
    assert told("unsealed", "details") == ({"seals": []},)
    assert told("eventfd", "kind", "details") == ("eventfd", {"count": 31})
    assert told("pidfd", "kind", "details") == ("pidfd", {"pid": os.getpid()})
    assert told("epoll", "kind", "details") == ("epoll", {"watches": [fds["eventfd"]]})

    def sock(name: str, *fields: str) -> tuple[Any, ...]:
        return tuple(one[fds[name]]["socket"][field] for field in fields)

    assert sock("b", "family", "type", "state") == ("unix", "seqpacket", "connected")
    assert told("b", "details") == ({"descriptors_waiting": 3},)
    assert sock("b", "unread")[0] >= 5
    assert sock("unix", "type", "state", "local") == ("stream", "listening", str(tmp_path / "named"))
    assert sock("abstract", "state", "local") == ("unconnected", f"@fdshare-test-{pid}")
    address = "127.0.0.1:{}".format
    assert sock("tcp", "family", "state", "local") == ("tcp", "listening", address(names["tcp"][1]))
    ends = ("family", "state", "local", "remote")
    client, server = address(names["client"][1]), address(names["tcp"][1])
    assert sock("client", *ends) == ("tcp", "connected", client, server)
    assert sock("server", *ends) == ("tcp", "connected", server, client)
    assert sock("udp", "family", "type", "local") == ("udp", "dgram", address(names["udp"][1]))
    if "tcp6" in fds:
        assert sock("tcp6", "state", "local") == ("listening", f"[::1]:{names['tcp6'][1]}")
    assert sock("netlink", "family") == ("netlink",)

    lines = {int(line.split()[0]): line for line in table.splitlines()[2:]}
    assert set(lines) == set(one)
    assert table.splitlines()[0].startswith(f"process {pid} (")
    assert lines[fds["reader"]].split() == [*f"{fds['reader']} file r 3 10 cloexec".split(), *path.split()]
    assert f"other end: pid {pid} (" in lines[fds["a"]]
    assert lines[fds["memfd"]].endswith("frame, sealed: shrink grow")
    assert "3 descriptors waiting" in lines[fds["b"]]
    assert f"tcp {client} -> {server}" in lines[fds["client"]]


def test_without_pid_it_lists_what_it_was_given() -> None:
    with open("/dev/zero", "rb") as given, socket.socket() as kept:
        fd = given.fileno()
        one = listed(pass_fds=[fd])
        assert one[fd]["name"] == "/dev/zero"
        assert set(one) == {0, 1, 2, fd}
        assert kept.fileno() not in one


def test_own_socket_whose_other_end_is_out_of_sight(tmp_path: Path) -> None:
    """The kernel tells who made the connection, though that process has ended since."""
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        code = "import os, socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(os.getpid())"
        pid = int(subprocess.run([sys.executable, "-c", code, path], capture_output=True, check=True).stdout)
        accepted, _ = listener.accept()
        with accepted:
            found = by_proc(os.getpid(), [accepted.fileno()])
    assert found[0].details == {"peer": {"pid": pid, "uid": os.getuid()}}
    assert f"pid {pid} of uid {os.getuid()}" in ls.describe(found[0])


def test_no_such_process() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(20)
    result = run("ls", process.pid)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"fdshare ls: there is no process {process.pid}\n"


def test_process_of_another_user() -> None:
    result = run_as_nobody("ls", os.getpid())
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1
    assert f"process {os.getpid()} (" in result.stderr
    assert "not ours to see" in result.stderr


@pytest.mark.parametrize("arguments", [["0"], ["-1"], ["x"], ["1", "2"], ["--bogus"]])
def test_wrong_call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ls", *arguments])
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_reader_that_stops_early() -> None:
    """``fdshare ls | head -1`` where the pipe is too small for what is left: silence, and SIGPIPE's code."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(os.devnull)).fileno() for _ in range(100)]
        process = stack.enter_context(
            subprocess.Popen(
                [*COMMAND, "ls", "--json"],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=files,
            )
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(20)) == (b"", 141)


def test_full_disk() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        result = run("ls", stdout=full)
    assert (result.returncode, result.stderr) == (1, "fdshare ls: No space left on device\n")


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str) -> None:
    """Nothing that is opened later may become a standard stream; a closed standard output is an error."""
    result = subprocess.run(
        ["sh", "-c", f'"$@" {closed}', "sh", *COMMAND, "ls"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=45,
    )
    silent = ">&-" in closed.replace("2>&-", "")
    assert result.returncode == silent
    assert result.stderr == (
        "fdshare: the standard output is closed\n" if silent and "2>&-" not in closed else ""
    )
    if not silent:
        assert "/dev/null" in result.stdout


NASTY = "red\x1b[31m\nline\udcff\u202e"


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    with open(tmp_path / NASTY, "wb") as file:
        result = run("ls", pass_fds=[file.fileno()], env={**os.environ, "PYTHONIOENCODING": "ascii"})
        one = listed(pass_fds=[file.fileno()])[file.fileno()]
    assert result.returncode == 0
    assert r"red\x1b[31m\nline\udcff\u202e" in result.stdout
    assert "\x1b" not in result.stdout
    assert one["name"] == str(tmp_path / NASTY)


def test_socket_names_cannot_forge_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with ends of lines in it leaves the rest of /proc/net/unix readable."""
    monkeypatch.chdir(tmp_path)
    forged = "x\n0: 0 0 zz 0001 01 77\nshort\n"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as other:
        listener.bind(forged)
        listener.listen()
        other.bind("other")
        found = by_proc(os.getpid(), [listener.fileno(), other.fileno()])
    sockets = [one.socket for one in found]
    assert [sock and (sock.state, sock.local) for sock in sockets] == [
        ("listening", forged),
        ("unconnected", "other"),
    ]


def test_sockets_without_diagnostics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel's module for them is not there, names and states are."""
    import fdshare.command.sockets

    monkeypatch.setattr(fdshare.command.sockets, "_NETLINK_SOCK_DIAG", 31)  # no such protocol
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "a name"))
        listener.listen()
        near, far = socket.socketpair()
        with near, far:
            table = read_sockets(os.getpid())
            own, pair = (table[os.fstat(s.fileno()).st_ino] for s in (listener, near))
    assert own == Socket("unix", "stream", "listening", local=str(tmp_path / "a name"))
    assert pair == Socket("unix", "stream", "connected")


def test_terminals() -> None:
    master, slave = pty.openpty()
    try:
        found = by_proc(os.getpid(), [master, slave])
        assert [one.kind for one in found] == ["tty", "tty"]
        assert found[1].name == os.ttyname(slave)
        assert found[0].details.get("master_of", os.ttyname(slave)) == os.ttyname(slave)
    finally:
        os.close(master)
        os.close(slave)


def test_many_holders_are_counted() -> None:
    with contextlib.ExitStack() as stack:
        near, far = (stack.enter_context(sock) for sock in socket.socketpair())
        for _ in range(5):
            stack.enter_context(far.dup())
        (found,) = by_proc(os.getpid(), [near.fileno()])
    assert len(found.peers) == 6
    assert ls.describe(found).endswith(" and 3 more")


# --- where there is no /proc ----------------------------------------------------------------------------------------------


def test_own_descriptors_by_fstat_agree_with_proc(tmp_path: Path) -> None:
    """The two sources tell the same, but for names and other ends."""
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        file = enter(tempfile.TemporaryFile())  # noqa: SIM115
        file.write(FILE)
        file.flush()
        server = enter(socket.create_server(("127.0.0.1", 0)))
        client = enter(socket.create_connection(server.getsockname()))
        unix = enter(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        unix.bind(str(tmp_path / "u"))
        abstract = enter(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        abstract.bind(f"\0fdshare-{os.getpid()}")
        near, far = (enter(sock) for sock in socket.socketpair())
        reader, writer = os.pipe2(os.O_NONBLOCK)
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        os.set_inheritable(writer, True)
        things = [file, server, client, unix, abstract, near, far]
        fds = sorted([thing.fileno() for thing in things] + [reader, writer])
        closed = os.dup(0)
        os.close(closed)
        by_stat, proc = by_fstat([*fds, closed]), by_proc(os.getpid(), fds)

    def bare(one: Descriptor) -> Descriptor:
        flags = tuple(flag for flag in one.flags if flag != "tmpfile")
        sock = one.socket and attrs.evolve(one.socket, peer=0, unread=None)
        return attrs.evolve(one, name="", details={}, peers=(), socket=sock, flags=flags)

    assert list(map(bare, by_stat)) == list(map(bare, proc))


def test_psutil_agrees_with_proc(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    with holder(tmp_path) as (pid, fds, _):
        found = {one.fd: one for one in by_psutil(pid)}
        proc = {one.fd: one for one in by_proc(pid)}
    for name in ("reader", "appender"):
        ours, theirs = proc[fds[name]], found[fds[name]]
        fields = ("kind", "access", "offset", "size", "name")
        assert [getattr(theirs, field) for field in fields] == [getattr(ours, field) for field in fields]
    for name in ("tcp", "client", "server", "udp", "unix"):
        here, there = proc[fds[name]].socket, found[fds[name]].socket
        assert here is not None
        assert there is not None
        assert (there.family, there.type, there.local) == (here.family, here.type, here.local)
        assert name == "unix" or (there.state, there.remote) == (here.state, here.remote)


def test_psutil_errors() -> None:
    pytest.importorskip("psutil")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait(20)
    with pytest.raises(ProcessLookupError, match=f"there is no process {process.pid}"):
        by_psutil(process.pid)


def test_without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(OSError, match="pip install psutil"):
        by_psutil(os.getpid())
