"""The ways of macOS, FreeBSD and a Linux whose sandbox forbids much, taken on this Linux: by names removed, calls refused, and
kernels' answers given by hand.  None of it replaces a run there."""

from __future__ import annotations

import errno
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import compose, limit_for, verify, wait_until

import fdshare
from fdshare import Channel, ChannelSet, FdLimitError, credentials, memory, rights, sync, system
from fdshare.errors import DescriptorsLostError
from fdshare.pool import deaths, manager
from fdshare.testing import ChannelConformance, checked_child

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = ROOT / "tests" / "elsewhere"

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="takes away what only Linux has")


def run(arguments: list[str], **variables: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


# --- names removed -------------------------------------------------------------------------------------------------------

EVERYTHING = """
import sys, fdshare
from fdshare import demo, memory, system
from fdshare.leaks import leak_check
LEAVES

def negate(number):
    return -number

def main():
    with leak_check(closed=True):
        account = demo.serve_http(4)
    assert not account.problems(), account
    a, b = fdshare.Pipe()
    with a, b, fdshare.Queue() as queue, open(__import__("os").devnull) as file:
        a.send({"file": file, "large": bytes(3 << 20), "lock": fdshare.Lock(), "event": fdshare.Event()})
        received = b.recv()
        assert len(received["large"]) == 3 << 20
        received["event"].set()
        with received["lock"]:
            pass
        received["file"].close()
        queue.put(file)
        queue.get().close()
        print(a.transport)
    with fdshare.ProcessPoolExecutor(1) as pool:
        assert list(pool.map(negate, range(20))) == [-n for n in range(20)]

if __name__ == "__main__":
    main()
"""


@on_linux
def test_everything_without_the_names_of_linux(tmp_path: Path) -> None:
    """The demo's first scene, a message of every kind, a queue and a pool, as Python on macOS would run them."""
    program = tmp_path / "program.py"
    program.write_text(
        EVERYTHING.replace(
            "LEAVES", "assert sys.platform == 'darwin' and not system.HAVE_MEMFD, sys.platform"
        )
    )
    path = os.pathsep.join(filter(None, (str(ELSEWHERE), str(ROOT), os.environ.get("PYTHONPATH"))))
    assert run([str(program)], PYTHONPATH=path) == "stream\n"


# --- calls refused ---------------------------------------------------------------------------------------------------------

REFUSE = """
import ctypes, errno, os, platform, struct
# memfd_create, pidfd_open, pidfd_send_signal, eventfd2, epoll_create1
calls = {"x86_64": (319, 434, 424, 290, 291), "aarch64": (279, 434, 424, 19, 20)}[platform.machine()]
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # of linux/bpf_common.h: word at an offset, jump if equal, return
program = [(LOAD, 0, 0, 0), *((EQUAL, len(calls) - n, 0, call) for n, call in enumerate(calls))]
program += [(RETURN, 0, 0, 0x7FFF0000), (RETURN, 0, 0, 0x00050000 | errno.EPERM)]  # allow; fail with EPERM
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
libc = ctypes.CDLL(None, use_errno=True)
filter = struct.pack("HP", len(program), ctypes.addressof(code))
assert not libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
assert not libc.prctl(22, 2, filter, 0, 0), os.strerror(ctypes.get_errno())  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
os.execv(sys.executable, [sys.executable, PROGRAM])
"""


@on_linux
@pytest.mark.skipif(
    os.uname().machine not in ("x86_64", "aarch64") or sys.maxsize < 2**32,
    reason="system calls have other numbers here",
)
def test_everything_under_a_filter_of_system_calls(tmp_path: Path) -> None:
    """The same where the names are there and the kernel says EPERM, as in a container or a sandbox."""
    program = tmp_path / "program.py"
    program.write_text(
        EVERYTHING.replace(
            "LEAVES",
            "assert not (memory.HAVE_MEMFD or system.HAVE_EVENTFD or system.HAVE_PIDFD or system.HAVE_EPOLL)",
        )
    )
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    assert run(["-c", f"import sys; PROGRAM = {str(program)!r}\n{REFUSE}"], PYTHONPATH=path) == "seqpacket\n"


# --- kernels that answer otherwise ---------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rights, "PEEK_INSTALLS", False)
    monkeypatch.setattr(system, "HAVE_EVENTFD", False)
    monkeypatch.setattr(sync, "HAVE_EVENTFD", False)
    monkeypatch.setattr(memory, "HAVE_MEMFD", False)
    monkeypatch.setattr(memory, "HAVE_PIPE_SIZE", False)


@pytest.mark.usefixtures("elsewhere")
class TestElsewhere(ChannelConformance):
    """The suite over frames, without what only Linux gives."""

    places = ("same_process",)

    def make_pair(self) -> tuple[Channel, Channel]:
        return fdshare.Pipe(transport="stream")


def _receive_without_room(kind: str) -> None:
    import resource

    rights.PEEK_INSTALLS = False
    a, b = fdshare.Pipe(transport="stream")
    with a, b:
        message, handles = compose(7, kind)
        a.send(message)
        for handle in handles:
            handle.close()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit_for(0), hard))
        for _ in range(2):
            with pytest.raises(FdLimitError):
                b.recv(timeout=5)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert verify(b.recv(timeout=5)) == 7


@pytest.mark.parametrize("kind", ["one_fd", "many_fds", "bundle", "large_and_fds"])
def test_a_message_without_room_stays_queued_where_peeks_tell_nothing(kind: str) -> None:
    checked_child(_receive_without_room, kind)


class Answers:
    """A socket that gives these answers, one a call; an error is raised."""

    def __init__(self, **answers: list[Any]) -> None:
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            answer = self._answers[name].pop(0)
            if isinstance(answer, OSError):
                raise answer
            return answer

        return call


def test_descriptors_dropped_with_an_error_are_lost_with_their_bytes() -> None:
    """unp_externalize of BSD has no room: EMSGSIZE, and the bytes are still there."""
    sock: Any = Answers(recvmsg=[OSError(errno.EMSGSIZE, "")], recv=[b"x"])
    with pytest.raises(DescriptorsLostError):
        rights.recv_fds(sock, 1, 1)
    assert sock._answers == {"recvmsg": [], "recv": []}


@pytest.mark.parametrize(
    ("platform", "more", "pid"),
    [
        ("darwin", [struct.pack("i", 4711)], 4711),
        ("darwin", [OSError(errno.ENOTCONN, "")], 0),
        ("freebsd14", [], 4711),
        ("freebsd12", [], 0),
    ],
)
def test_credentials_of_a_peer(
    monkeypatch: pytest.MonkeyPatch, platform: str, more: list[Any], pid: int
) -> None:
    """Of struct xucred, as the headers of macOS and FreeBSD lay it out."""
    xucred = struct.pack("=IIhxx16I", 0, 501, 3, 20, 12, 61, *[0] * 13)
    assert len(xucred) == 76
    if platform.startswith("freebsd"):
        xucred += struct.pack(
            "=4xi4x" if sys.maxsize > 2**32 else "=i", 4711 if platform == "freebsd14" else 0
        )
    monkeypatch.setattr(credentials, "_HAVE_PEERCRED", False)
    monkeypatch.setattr(credentials.sys, "platform", platform)
    peer = credentials.peer_credentials(Answers(getsockopt=[xucred, *more]))  # type: ignore[arg-type]
    monkeypatch.undo()
    assert (peer, peer.groups) == (credentials.PeerCredentials(pid, 501, 20), (12, 61))


def test_descriptors_are_counted_without_a_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on FreeBSD without fdescfs, whose /dev/fd lists three."""
    listed = {fd for fd in rights.open_numbers() if os.path.exists(f"/dev/fd/{fd}")}
    monkeypatch.setattr(rights, "_listing", lambda: None)
    monkeypatch.setattr(rights, "descriptor_limit", lambda: 4096)
    assert set(rights.open_numbers()) == {fd for fd in listed if fd < 4096}
    assert rights.open_descriptors() == len(rights.open_numbers())


# --- polls and pools ---------------------------------------------------------------------------------------------------------


def test_a_set_that_stands_on_poll_forgets_what_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", selectors.PollSelector)
    (a, b), (c, d) = fdshare.Pipe(), fdshare.Pipe()
    with a, b, c, d, ChannelSet([b, d]) as channels:
        b.close()
        assert channels.select(0) == []
        assert b not in channels
        c.send("still there")
        assert channels.select(20) == [d]


def test_a_death_that_a_grandchild_hides_is_found_without_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    import pool_tasks as tasks
    from test_pool_failures import TIMEOUT, Gate

    monkeypatch.setattr(system, "HAVE_PIDFD", False)
    monkeypatch.setattr(manager, "DEATH_TICK", 0.05)
    assert deaths.DEATH_TICK is None or sys.platform != "linux"
    context = multiprocessing.get_context("fork")
    with fdshare.ProcessPoolExecutor(1, mp_context=context) as executor, Gate() as gate:
        pid = executor.submit(tasks.fork_and_wait, *gate.arguments()).result(TIMEOUT)
        gate.wait()
        (worker,) = executor._processes
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: worker not in executor._processes)
        os.kill(pid, signal.SIGKILL)


def test_packets_are_refused_with_what_to_do_where_they_are_not_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system, "HAVE_SEQPACKET", False)
    with pytest.raises(OSError, match="use stream") as caught:
        fdshare.Pipe(transport="seqpacket")
    assert caught.value.errno == errno.EPROTONOSUPPORT
    a, b = fdshare.Pipe()
    with a, b:
        assert a.transport == b.transport == "stream"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Channel(ours) as channel, theirs:
        assert channel.transport == "stream"
