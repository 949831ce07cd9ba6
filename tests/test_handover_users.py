"""Generations whose user changes: what the kernel has noted of a connection is not who speaks on it now."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import attrs
import pytest
from handovers import SOON, Bare, ask, first, listen, port_of

from fdshare import AccessDeniedError, FdHandle, Listener, PeerClosedError, any_user, connect, users
from fdshare.handover import Handover, HandoverError, RetiredError, door, protocol, spoken
from fdshare.handover.spoken import Pickle

NOBODY = 65534
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed: run as root"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs credentials with each message"),
]
BOTH = users(0, NOBODY)


@pytest.fixture
def path() -> Iterator[Path]:
    """A control socket in a directory that others may enter."""
    with TemporaryDirectory(prefix="fds") as directory:
        os.chmod(directory, 0o755)
        yield Path(directory) / "control"


def drop() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


class Child:
    """A forked process that runs a function, which may tell and ask something on the way."""

    def __init__(self, function: Callable[[Child], object]) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.pid = os.fork()
        if self.pid == 0:
            signal.alarm(60)
            status = 1
            try:
                self.ours, self.theirs = self.theirs, self.ours
                self.theirs.close()
                function(self)
                status = 0
            except BaseException:  # noqa: BLE001 -- told, and then it ends
                traceback.print_exc()
            finally:
                os._exit(status)
        self.theirs.close()
        self.ours.settimeout(SOON)

    def tell(self, data: bytes = b"!") -> None:
        self.ours.sendall(data)

    def hear(self) -> bytes:
        data = self.ours.recv(1000)
        assert data, "the other one has ended"
        return data

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: object, *exc_info: object) -> None:
        if kind is not None:
            os.kill(self.pid, signal.SIGKILL)
        self.ours.close()
        _, status = os.waitpid(self.pid, 0)
        assert kind is not None or os.waitstatus_to_exitcode(status) == 0


def stay(child: Child) -> None:
    with contextlib.suppress(OSError, AssertionError):
        child.hear()


class Telling:
    """Leaves a file where it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


# the successor, of its predecessor -----------------------------------------------------------------------------------


def test_a_predecessor_that_has_become_another_user_is_not_believed(path: Path) -> None:
    def serve(child: Child) -> None:
        with Handover(path) as handover:
            listen(handover)
            handover.ready()
            drop()
            child.tell()
            stay(child)

    with Child(serve) as child:
        child.hear()
        with pytest.raises(AccessDeniedError):
            Handover(path)


@pytest.mark.parametrize("allow", [users(0), BOTH], ids=["root", "both"])
def test_no_pickle_of_a_predecessor_is_loaded_unasked(path: Path, allow: Any) -> None:
    """Not in place of its offer, from whomever; nor in place of a state, from one who is not admitted."""
    proof = path.parent / "proof"

    def attack(child: Child) -> None:
        with Handover(path, allow=allow) as handover:
            handover.ready()
            drop()
            handover._door._accept = lambda: None  # type: ignore[method-assign, union-attr]
            with socket.socket(fileno=os.dup(handover._control.handle.fileno())) as control:  # type: ignore[union-attr]
                control.setblocking(True)
                child.tell()
                with control.accept()[0] as connection, contextlib.suppress(BrokenPipeError):
                    for _ in range(3):
                        connection.send(pickle.dumps(Telling(proof)))
                    stay(child)

    with Child(attack) as child:
        child.hear()
        with pytest.raises(OSError, match=r"."):
            Handover(path, allow=allow, timeout=SOON)
        assert not proof.exists()


def test_who_has_changed_between_two_messages_is_not_believed(path: Path) -> None:
    proof = path.parent / "proof"

    def serve(child: Child) -> None:
        with Handover(path) as handover:
            handover.offer("state", lambda: Telling(proof))
            listen(handover)
            handover.ready()
            child.tell()
            child.hear()
            drop()
            child.tell()
            stay(child)

    with Child(serve) as child:
        child.hear()
        with Handover(path) as new:
            child.tell()
            child.hear()
            with pytest.raises(AccessDeniedError):
                new.state("state")
            with pytest.raises((AccessDeniedError, PeerClosedError)):
                new.ready(["state"])
        assert not proof.exists()


def test_states_that_nobody_asks_for_are_not_loaded(path: Path) -> None:
    proof = path.parent / "proof"

    def serve(child: Child) -> None:
        with Handover(path, allow=BOTH, adopt=True) as handover:
            handover.offer("state", lambda: Telling(proof))
            handover._serving.final_states = lambda names: Telling(proof)  # type: ignore[method-assign, assignment]
            listen(handover)
            handover.ready()
            drop()
            child.tell()
            handover.retired.wait(SOON)

    with Child(serve) as child:
        child.hear()
        with Handover(path, allow=BOTH) as new:
            listen(new)
            assert new.ready() == {}
        assert not proof.exists()


# the predecessor, of its successor -----------------------------------------------------------------------------------


def test_a_successor_that_has_become_another_user_is_not_believed(path: Path) -> None:
    def succeed(child: Child) -> None:
        with Bare(path) as bare:
            drop()
            bare.say("take", versions=[1])
            assert bare.ended()

    with first(path) as (old, _):
        with Child(succeed):
            pass
        assert old._door is not None
        assert old._door.state is door.DoorState.IDLE


def test_nobody_gets_ready_who_has_become_another_user(path: Path) -> None:
    def succeed(child: Child) -> None:
        with Bare(path) as bare:
            bare.take()
            drop()
            bare.say("ready", kept=[0], final=[], adopt=False)
            bare.hear("revoked")

    with first(path) as (old, sock):
        with Child(succeed):
            pass
        assert not old.retired.is_set()
        with Handover(path) as new:
            listen(new)
            new.ready()
            with pytest.raises(RetiredError):
                sock.accept()


def test_a_pickle_from_a_successor_is_not_loaded(path: Path) -> None:
    proof = path.parent / "proof"
    with first(path) as (old, _), Bare(path) as bare:
        bare.channel.send_bytes(pickle.dumps(Telling(proof)))
        assert bare.ended()
        assert not proof.exists()
        assert not old.retired.is_set()


def test_nothing_large_is_taken_before_it_is_asked_for(path: Path) -> None:
    """A segment of terabytes, most of it a hole, would be copied."""

    def large(channel: Any, kind: str, **fields: Any) -> None:
        send(channel, kind, more=Pickle(bytes(spoken.MAX_TEXT + 1)) if kind == "offer" else None, **fields)

    send = protocol.send
    with first(path) as (old, _):
        assert old._door is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(door.protocol, "send", large)
            with pytest.raises(HandoverError, match=r"max_bytes|without pickles"):
                Handover(path)
        with Handover(path) as new:
            assert new.predecessor == os.getpid()


# who drops its privileges, and is restarted --------------------------------------------------------------------------


def test_generations_that_begin_as_root_and_drop_to_another_user(path: Path) -> None:
    """As docs/handover.md says it: with a policy that names both, and with states asked for after the drop."""

    def serve(number: int) -> Callable[[Child], None]:
        def run(child: Child) -> None:
            with Handover(path, allow=BOTH) as handover:
                sock = listen(handover)
                drop()
                handover.offer("count", lambda: number)
                assert handover.state("before", number - 1) == number - 1
                states = handover.ready(["count"])
                assert handover.generation == number
                assert states == ({"count": number - 1} if number else {})
                child.tell(b"%d %d" % (port_of(sock), os.geteuid()))
                with contextlib.suppress(RetiredError):
                    while True:
                        with sock.accept()[0] as connection:
                            connection.sendall(b"%d" % number)
                assert handover.retired.wait(SOON)

        return run

    with contextlib.ExitStack() as stack:
        for number in range(3):
            child = stack.enter_context(Child(serve(number)))
            port, uid = map(int, child.hear().split())
            assert uid == NOBODY
            assert ask(port) == b"%d" % number
        stack.enter_context(Handover(path, allow=BOTH)).ready()


def test_a_successor_without_privileges(path: Path) -> None:
    """Started by the dropped process itself, say: the control socket's file must be its user's."""

    def succeed(child: Child) -> None:
        drop()
        with Handover(path, allow=BOTH) as new:
            assert new.generation == 1
            sock = listen(new, port=port)
            new.ready()
            child.tell()
            with sock.accept()[0] as connection:
                connection.sendall(b"new")

    with Handover(path, allow=BOTH) as old:
        port = port_of(listen(old))
        os.chown(path, NOBODY, NOBODY)
        old.ready()
        with Child(succeed) as child:
            child.hear()
            assert ask(port) == b"new"


CONFINE = """
import os, sys, traceback

class Late:
    def find_spec(self, name, path=None, target=None):
        print("imported late:", name, file=sys.stderr)
        traceback.print_stack()
        os._exit(3)

path, empty = sys.argv[1:]

def confine():
    os.chroot(empty)
    os.chdir("/")
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
    sys.meta_path.insert(0, Late())
"""

THREADS = """
import threading
from fdshare import users
from fdshare.handover import Handover, RetiredError

with Handover(path, allow=users(0, 65534), adopt=True) as handover, open(os.devnull) as file:
    sock = handover.listen("http", "127.0.0.1", 0)
    confine()
    handover.offer("file", lambda: file)
    handover.offer("much", lambda: bytes(3 << 20))
    handover.offer("function", lambda: lambda x: x)
    handover.offer("lock", threading.Lock)
    handover.offer("failing", lambda: 1 // 0)
    handover.ready()
    os.write(1, b"%d" % sock.getsockname()[1])
    try:
        sock.accept()
    except RetiredError:
        handover.send_connection(file)
"""

ASYNCIO = """
import asyncio
from fdshare import users
from fdshare.handover import Handover
from fdshare.integrations.asyncio_server import Service

async def handle(reader, writer):
    read = reader.readexactly(5)
    assert await service.read_or_move(read, reader, writer, "http") is None

async def serve():
    global service
    with Handover(path, allow=users(0, 65534), adopt=True) as handover:
        service = Service(handover)
        sock = await service.start_server(handle, "http", "127.0.0.1", 0)
        confine()
        await service.serve(on_ready=lambda states: os.write(1, b"%d" % sock.getsockname()[1]))
        assert handover.retired.is_set()

asyncio.run(serve())
"""


@contextlib.contextmanager
def confined(code: str, path: Path, empty: Path) -> Iterator[int]:
    """A server that confines itself, and forbids itself to import anything; give its port, and see that it ends well."""
    command = [sys.executable, "-c", CONFINE + code, os.fspath(path), os.fspath(empty)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.read1())
            assert process.wait(SOON) == 0
        finally:
            process.kill()


def test_nothing_is_imported_by_an_event_loop_either(path: Path, tmp_path: Path) -> None:
    with (
        confined(ASYNCIO, path, tmp_path) as port,
        socket.create_connection(("127.0.0.1", port), SOON) as client,
    ):
        client.sendall(b"half")
        with Handover(path, allow=BOTH, adopt=True) as new:
            listen(new, port=port)
            new.ready()
            connection, data = new.connections().receive(SOON)
            connection.close()
            assert data["name"] == "http"


def test_nothing_is_imported_once_root_and_user_have_changed(path: Path, tmp_path: Path) -> None:
    with confined(THREADS, path, tmp_path) as port, Handover(path, allow=BOTH, adopt=True) as new:
        new.state("file").close()
        assert len(new.state("much")) == 3 << 20
        assert new.state("function")(5) == 5
        for name in ("lock", "failing", "none"):
            with pytest.raises(KeyError):
                new.state(name)
        listen(new, port=port)
        assert len(new.ready(["much"])["much"]) == 3 << 20
        new.connections().receive(SOON)[0].close()


def test_the_successor_is_who_said_that_it_serves(path: Path) -> None:
    """And not who connected: that one may have ended, and its pid be another's."""

    def succeed(child: Child) -> None:
        child.hear()
        bare.get_ready()
        bare.say("serving")
        child.hear()

    with first(path) as (old, _), Bare(path) as bare, Child(succeed) as child:
        assert old._door is not None
        child.tell()
        assert old.retired.wait(SOON)
        assert old._door._successor_pid == child.pid != os.getpid()
        child.tell()


def test_a_setuid_program_is_its_effective_user(path: Path) -> None:
    """For which the kernel tells the real one, unless it is told another."""

    def succeed(child: Child) -> None:
        os.setresuid(NOBODY, 0, 0)
        with Handover(path) as new:
            listen(new)
            child.tell()
            child.hear()
            new.ready()

    with first(path) as (old, _), Child(succeed) as child:
        child.hear()
        child.tell()
        assert old.retired.wait(SOON)


# named endpoints: what their pages say of this -----------------------------------------------------------------------


def test_a_listener_shows_who_has_called_listen(path: Path) -> None:
    """Root, for as long as it does not listen anew."""

    def serve(child: Child) -> None:
        with Listener(path, allow=any_user) as listener:
            drop()
            child.tell()
            child.hear()
            with FdHandle.dup(listener).to_socket() as sock:
                sock.listen()
            child.tell()
            stay(child)

    with Child(serve) as child:
        child.hear()
        with connect(path) as channel:
            assert channel.peer.uid == 0
        child.tell()
        child.hear()
        with pytest.raises(AccessDeniedError):
            connect(path)
        with connect(path, allow=users(NOBODY)) as channel:
            assert channel.peer == attrs.evolve(channel.peer, pid=child.pid, uid=NOBODY, gid=NOBODY)
