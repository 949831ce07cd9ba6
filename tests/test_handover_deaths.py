"""kill -9 at each step of a handover, on each side: what is left serves, what waits is answered, and others can succeed."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from handovers import SOON, answering, ask, listen, reserved_port
from helpers import wait_until

from fdshare import Channel, FdHandle, Pipe
from fdshare.handover import Handover, HandoverError, HandoverRevokedError, door, protocol
from fdshare.testing import Child

STEPS_OF_THE_SUCCESSOR = (
    "before take",
    "after take",
    "with offer",
    "before ready",
    "after ready",
    "with go",
    "before serving",
)
STEPS_OF_THE_PREDECESSOR = (
    "with take",
    "before offer",
    "after offer",
    "with ready",
    "before go",
    "after go",
    "with serving",
)


class Generation:
    """A forked process that is one generation, and can be made to die at one step of the protocol.

    It serves with its word until a successor does, or ``end`` is called.  A lazy one accepts nothing.
    """

    def __init__(
        self, path: Path, port: int, word: bytes, dies: str = "", by: int = signal.SIGKILL, lazy: bool = False
    ) -> None:
        self.news, news = os.pipe()
        end, self.leash = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(self.news)
                os.close(self.leash)
                if dies:
                    die_at(dies, by)
                status = generation(path, port, word, news, end, lazy)
            except BaseException:  # noqa: BLE001 -- it must not run on as a second copy of the test
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(news)
        os.close(end)

    def heard(self) -> bytes:
        """Return the next word that it says: b"initialising", b"ready", b"retired" or b"failed"; b"" where it has died."""
        said = b""
        while select.select([self.news], [], [], SOON)[0]:
            character = os.read(self.news, 1)
            if character in (b"", b" "):
                return said
            said += character
        raise AssertionError(f"nothing was heard of process {self.pid} after {said!r}")

    def end(self) -> int:
        """Let it end, and return how it did."""
        if self.pid:
            os.close(self.leash)
            os.close(self.news)
            pid, self.pid = self.pid, 0
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return 0

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if exc_info[0] is not None and self.pid:
            self.kill()
        self.end()


def die_at(step: str, by: int) -> None:
    """Let this process be killed before or after it sends a message, or with one just received."""
    when, kind = step.split()
    send, receive = protocol.send, protocol.receive

    def dying_send(channel: Any, said: str, **fields: Any) -> None:
        if (when, kind) == ("before", said):
            os.kill(os.getpid(), by)
        send(channel, said, **fields)
        if (when, kind) == ("after", said):
            os.kill(os.getpid(), by)

    def dying_receive(channel: Any, *expected: str, **options: Any) -> Any:
        message = receive(channel, *expected, **options)
        if (when, kind) == ("with", message[0]):
            os.kill(os.getpid(), by)
        return message

    protocol.send, protocol.receive = dying_send, dying_receive


def generation(path: Path, port: int, word: bytes, news: int, end: int, lazy: bool) -> int:
    """Be one; return the exit status."""
    with Handover(path) as handover:
        sock = listen(handover, port=port)
        os.write(news, b"initialising ")
        try:
            handover.ready()
        except HandoverError:
            os.write(news, b"failed ")
            return 3
        os.write(news, b"ready ")
        watched = [end, handover.retired.fileno(), *([] if lazy else [sock.fileno()])]
        sock.setblocking(False)
        while True:
            ready, _, _ = select.select(watched, [], [])
            if end in ready:
                return 0
            if handover.retired.is_set():
                os.write(news, b"retired ")
                return 0
            try:
                connection, _ = sock.accept()
            except BlockingIOError:
                continue
            with connection:
                connection.sendall(word)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


@pytest.fixture
def port() -> Iterator[int]:
    with reserved_port() as port:
        yield port


Start = Callable[..., Generation]


@pytest.fixture
def start(path: Path, port: int) -> Iterator[Start]:
    with ExitStack() as stack:

        def begin(word: bytes, **options: Any) -> Generation:
            return stack.enter_context(Generation(path, port, word, **options))

        yield begin


@pytest.mark.parametrize("step", STEPS_OF_THE_SUCCESSOR)
def test_a_successor_that_is_killed_harms_nothing(start: Start, port: int, step: str) -> None:
    old = start(b"old")
    assert [old.heard(), old.heard()] == [b"initialising", b"ready"]
    killed = start(b"killed", dies=step)
    assert killed.heard() in (b"initialising", b"")
    assert killed.end() == -signal.SIGKILL
    assert [ask(port) for _ in range(3)] == [b"old"] * 3
    new = start(b"new")
    assert [new.heard(), new.heard()] == [b"initialising", b"ready"]
    assert old.heard() == b"retired"
    assert old.end() == 0
    assert ask(port) == b"new"


def test_a_successor_that_is_killed_once_it_serves_is_succeeded_by_the_next_start(
    start: Start, port: int
) -> None:
    """The packet ``serving`` is the commit point: the old one retires, whatever becomes of the new one."""
    old = start(b"old")
    assert [old.heard(), old.heard()] == [b"initialising", b"ready"]
    killed = start(b"killed", dies="after serving")
    assert [killed.heard(), killed.heard()] == [b"initialising", b""]
    assert old.heard() == b"retired"
    assert old.end() == 0
    with pytest.raises(ConnectionRefusedError):
        ask(port)
    new = start(b"new")
    assert [new.heard(), new.heard()] == [b"initialising", b"ready"]
    assert ask(port) == b"new"


@pytest.mark.parametrize("step", STEPS_OF_THE_PREDECESSOR)
def test_the_successor_of_one_that_is_killed_serves(start: Start, port: int, step: str) -> None:
    killed = start(b"killed", dies=step, lazy=True)
    assert [killed.heard(), killed.heard()] == [b"initialising", b"ready"]
    with socket.create_connection(("127.0.0.1", port), SOON) as queued:
        new = start(b"new")
        assert [new.heard(), new.heard()] == [b"initialising", b"ready"]
        assert killed.heard() == b""
        assert killed.end() == -signal.SIGKILL
        if step in (
            "with take",
            "before offer",
        ):  # nobody else had the socket: that is the kernel's end of it
            with pytest.raises(ConnectionError):
                queued.recv(1)
                raise ConnectionResetError("an end is as good")
        else:
            assert queued.makefile("rb").read() == b"new"
    assert ask(port) == b"new"
    third = start(b"third")
    assert [third.heard(), third.heard()] == [b"initialising", b"ready"]
    assert new.heard() == b"retired"
    assert ask(port) == b"third"


def test_both_are_killed_and_the_next_start_begins_anew(start: Start, port: int, path: Path) -> None:
    old = start(b"old", dies="after go")
    assert [old.heard(), old.heard()] == [b"initialising", b"ready"]
    new = start(b"new", dies="before serving")
    assert [new.heard(), new.heard()] == [b"initialising", b""]
    assert {old.end(), new.end()} == {-signal.SIGKILL}
    assert path.exists()
    third = start(b"third")
    assert [third.heard(), third.heard()] == [b"initialising", b"ready"]
    assert ask(port) == b"third"


def test_who_comes_while_the_predecessor_is_dead_waits_for_the_successor(path: Path, start: Start) -> None:
    """The successor has the control socket too, so that nobody begins a second line."""
    old = start(b"old")
    assert [old.heard(), old.heard()] == [b"initialising", b"ready"]
    with Handover(path) as new:
        old.kill()
        assert old.end() == -signal.SIGKILL
        third = start(b"third")
        new.ready()
        assert third.heard() == b"initialising"
        assert third.heard() == b"ready"
        assert new.retired.wait(SOON)


def test_a_predecessor_that_is_stopped_does_not_answer(path: Path, start: Start, port: int) -> None:
    old = start(b"old")
    assert [old.heard(), old.heard()] == [b"initialising", b"ready"]
    os.kill(old.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            Handover(path, timeout=0.1)
    finally:
        os.kill(old.pid, signal.SIGCONT)
    assert ask(port) == b"old"
    with Handover(path) as new:
        listen(new, port=port)
        new.ready()


@pytest.mark.parametrize("step", ["before ready", "before serving"])
def test_a_successor_that_is_stopped_for_long_learns_that_it_must_not_serve(
    path: Path, port: int, monkeypatch: pytest.MonkeyPatch, start: Start, step: str
) -> None:
    monkeypatch.setattr(door, "START_SECONDS", 0.1)
    with Handover(path, successor_timeout=0.1) as old:
        sock = listen(old, port=port)
        old.ready()
        stopped = start(b"stopped", dies=step, by=signal.SIGSTOP)
        assert stopped.heard() == b"initialising"
        wait_until(lambda: old._door is not None and old._door.state is door.DoorState.IDLE)
        os.kill(stopped.pid, signal.SIGCONT)
        assert stopped.heard() == b"failed"
        assert not old.retired.is_set()
        with answering(sock, b"old"):
            assert ask(port) == b"old"
            old.close()


def serve_at_the_limit(path: Path, channel: Channel, room: int) -> None:
    """Be a generation that has room for no more than so many descriptors, until told otherwise."""
    with Handover(path) as handover:
        listen(handover)
        handover.ready()
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with FdHandle.dup(0) as next_one:
            lowest = next_one.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + room, before[1]))
        channel.send("ready")
        channel.recv()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        channel.send("again")
        assert handover.retired.wait(SOON)


@pytest.mark.parametrize("room", range(8))
def test_a_predecessor_at_its_limit_of_descriptors_serves_on(path: Path, room: int) -> None:
    ours, theirs = Pipe()
    with ours, Child(serve_at_the_limit, path, theirs, room, method="fork", unwanted=(ours,)) as child:
        theirs.close()
        assert ours.recv(timeout=SOON) == "ready"
        try:
            Handover(path, timeout=0.3).close()
        except (TimeoutError, HandoverRevokedError) as error:  # no room for the peer, or none for the offer
            assert isinstance(error, TimeoutError) or "open files" in str(error)  # noqa: PT017
            assert room < 6
        ours.send("raise the limit")
        assert ours.recv(timeout=SOON) == "again"
        with Handover(path) as new:
            assert new.generation == 1
            listen(new)
            new.ready()
            child.result(SOON)
