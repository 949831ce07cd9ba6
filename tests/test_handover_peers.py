"""The handover's protocol against peers that are not what they should be, and the last step of it against bad timing."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from handovers import SOON, Bare, answering, ask, first, port_of
from helpers import requires_seqpacket, running, wait_until

from fdshare import (
    AccessDeniedError,
    FdHandle,
    Listener,
    MessageTooLargeError,
    PeerClosedError,
    Pipe,
    ProtocolError,
    any_user,
    users,
)
from fdshare.handover import Handover, HandoverError, HandoverSocket, door, protocol
from fdshare.handover.spoken import OF_SUCCESSORS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


# peers that are not what they should be ------------------------------------------------------------------------------


@pytest.fixture
def served(path: Path) -> Iterator[tuple[Handover, HandoverSocket]]:
    with first(path) as (handover, sock), answering(sock, b"old"):
        yield handover, sock
        assert ask(port_of(sock)) == b"old"
        assert not handover.retired.is_set()
        handover.close()


@pytest.mark.parametrize(
    "text",
    [
        b'["ready",{}]',
        b'["take",3]',
        b'"take"',
        b"17",
        b"null",
        b'["serving",{}]',
        b'["take",{"versions":[1]},3]',
        b"[" * 60_000,
        b'["take",{"versions":{"$fd":0}}]',
        pickle.dumps(("take", {"versions": [1]})),
    ],
)
def test_who_does_not_ask_is_turned_away(
    path: Path, served: tuple[Handover, HandoverSocket], text: bytes
) -> None:
    with Bare(path) as bare:
        bare.channel.send_bytes(struct.pack("<II", len(text), 0) + text)
        assert bare.ended()


def test_no_descriptor_is_let_in(path: Path, served: object) -> None:
    """By the kernel, where it can, or else by what the hello says."""
    with Bare(path) as bare, FdHandle.dup(0) as handle:
        bare.take()
        with pytest.raises((AccessDeniedError, MessageTooLargeError)):
            bare.say("state", name=handle, number=1)


def test_a_program_that_is_no_handover_is_not_succeeded(path: Path) -> None:
    def serve() -> None:
        with listener.accept(SOON) as channel, pytest.raises(ProtocolError):
            channel.recv(timeout=SOON)

    with Listener(path) as listener, running(serve), pytest.raises(HandoverError, match="does not speak"):
        Handover(path)


@requires_seqpacket
def test_bytes_that_are_no_message(path: Path, served: tuple[Handover, HandoverSocket]) -> None:
    for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\0" * 64, os.urandom(200)):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(os.fspath(path))
            sock.settimeout(SOON)
            sock.send(junk)
            while sock.recv(1 << 16):
                pass


@pytest.mark.parametrize("versions", [[], [99], "1", None])
def test_another_version_is_refused(
    path: Path, served: tuple[Handover, HandoverSocket], versions: object
) -> None:
    with Bare(path) as bare:
        bare.say("take", versions=versions, pid=1)
        assert "versions" in bare.hear("refused")["text"]


def test_a_newer_successor_finds_the_common_version(path: Path, served: object) -> None:
    with Bare(path) as bare:
        bare.say("take", versions=[1, 2, 3], pid=1, something="new")
        assert bare.hear("offer")["version"] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"kept": "http", "final": []},
        {"kept": [1], "final": []},
        {"kept": [-1], "final": []},
        {"kept": [True], "final": []},
        {"kept": ["http"], "final": []},
        {"kept": [], "final": [["x"]]},
    ],
)
def test_ready_said_in_another_way(path: Path, served: object, fields: dict[str, object]) -> None:
    with Bare(path) as bare:
        bare.take()
        bare.say("ready", **fields)
        bare.hear("revoked")
        assert bare.ended()


def test_silent_peers_are_dropped_and_delay_nobody(
    path: Path, served: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "ASK_SECONDS", 0.2)
    silent = [Bare(path) for _ in range(100)]
    with Handover(path) as new:
        assert new.generation == 1
    for bare in silent:
        with bare:
            assert bare.ended()


def test_of_a_crowd_the_oldest_go(path: Path, served: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MAX_PEERS", 3)
    crowd = [Bare(path) for _ in range(5)]
    for bare in crowd[:2]:
        with bare:
            assert bare.ended()
    with Handover(path) as new:  # and so another one
        assert new.generation == 1
        for bare in crowd[3:]:
            with bare:
                bare.say("take", versions=[1])
                assert "succeeding" in bare.hear("refused")["text"]
        with crowd[2]:
            assert crowd[2].ended()


# the commit ----------------------------------------------------------------------------------------------------------


def test_a_successor_that_stops_at_the_last_step_is_resumed_from(
    path: Path, served: tuple[Handover, HandoverSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "START_SECONDS", 0.05)
    resumed = threading.Event()
    served[0].on_stop(lambda: None, resumed.set)
    with Bare(path) as bare:
        bare.get_ready()
        assert resumed.wait(SOON)
        with pytest.raises(PeerClosedError):  # too late, and it can tell
            bare.say("serving")
        assert "resumes" in bare.hear("revoked")["text"]


def test_a_successor_that_was_just_faster_serves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its word is in the queue when the predecessor's patience ends: it counts."""
    send = protocol.send

    def say_serving_first(channel: object, kind: str, **fields: object) -> None:
        if kind == "revoked":
            bare.say("serving")
        send(channel, kind, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(door, "START_SECONDS", 0.01)
    with first(path) as (old, _), Bare(path) as bare:
        bare.get_ready()
        monkeypatch.setattr(door.protocol, "send", say_serving_first)
        monkeypatch.setattr(Bare, "say", lambda self, kind: send(self.channel, kind))
        assert old.retired.wait(SOON)


def test_who_comes_while_the_outcome_is_open_waits_for_it(path: Path, served: object) -> None:
    def come() -> None:
        with Handover(path, timeout=SOON) as third:
            assert third.generation == 1

    with Bare(path) as bare:
        bare.get_ready()
        with Bare(path) as asking:
            asking.say("take", versions=[1])
            assert asking.hear("refused")["why"] == "gone"
        with running(come):
            bare.channel.close()  # and the predecessor resumes


@requires_seqpacket
def test_nothing_comes_in_once_it_is_shut() -> None:
    for transport in ("seqpacket", "stream"):
        here, there = Pipe(transport=transport, codec=OF_SUCCESSORS)
        with here, there:
            protocol.send(there, "serving")
            assert protocol.shut(here) == ("serving", {})
            with pytest.raises(PeerClosedError):
                protocol.send(there, "serving")
            assert protocol.shut(here) is None


def test_a_successor_that_reads_nothing_cannot_serve_later(
    path: Path, served: tuple[Handover, HandoverSocket], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the revocation fits into its queue: its end must not look like the predecessor's death."""
    monkeypatch.setattr(door, "OUTLAST_TICK", 0.01)
    monkeypatch.setattr(door, "TELL_SECONDS", 0.3)
    old = served[0]
    old.offer("much", lambda: bytes(100_000))

    def shut_out() -> bool:
        try:
            protocol.send(bare.channel, "ready", timeout=0.01)
        except TimeoutError:
            return False
        except PeerClosedError:
            return True
        return False

    with Bare(path) as bare:
        bare.take()
        asked = 0
        try:
            while True:
                protocol.send(bare.channel, "state", name="much", number=0, timeout=0.2)
                asked += 1
        except (TimeoutError, PeerClosedError):
            pass
        assert asked > 1
        wait_until(shut_out, 30)  # others may succeed a moment before this one is shut out
        assert old._door is not None
        assert old._door.state is door.DoorState.IDLE
        kinds = set()
        with pytest.raises(TimeoutError):  # and no end
            while True:
                kinds.add(protocol.receive(bare.channel, "value", timeout=0.2)[0])
        assert kinds == {"value"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda offer: {"listeners": {**offer["listeners"], "bad": ("spec", FdHandle.dup(0))}}, "describes"),
        (lambda offer: {"listeners": {"bad": ({"family": 2}, FdHandle.dup(0))}}, "describes a listener"),
        (lambda offer: {"listeners": {"bad": [{}, 1]}}, "listener that is none"),
        (lambda offer: {"listeners": [FdHandle.dup(0)]}, "is not one"),
        (lambda offer: {"control": FdHandle.dup(0)}, "is not one"),
        (lambda offer: {"control": FdHandle.dup(offer["listeners"]["http"][1])}, "is not one"),
        (lambda offer: {"control": None}, "is not one"),
        (lambda offer: {"identity": "file"}, "is the file 'file'"),
        (lambda offer: {"generation": "1"}, "is not one"),
    ],
)
def test_handles_are_owned_whatever_happens(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], dict[str, Any]], words: str
) -> None:
    """An offer that makes no sense is closed, not leaked."""
    with contextlib.ExitStack() as stack, first(path) as (old, _):
        what_to_offer = old._serving.what_to_offer

        def nonsense() -> dict[str, object]:
            offer = dict(what_to_offer())
            changed = change(offer)
            stack.callback(protocol.close_handles, offer)  # what was replaced, too
            return {**offer, **changed}

        monkeypatch.setattr(old._serving, "what_to_offer", nonsense)
        with pytest.raises(OSError, match=words):
            Handover(path)
        monkeypatch.undo()
        wait_until(lambda: old._door is not None and old._door.state is door.DoorState.IDLE)
        with Handover(path) as new:
            new.ready()


# other users ---------------------------------------------------------------------------------------------------------

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed: run as root")


def as_nobody(function: Callable[[], None]) -> None:
    """Run ``function`` in a forked process of the user nobody; it is to raise nothing."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            function()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


@needs_root
def test_another_user_neither_succeeds_nor_is_succeeded() -> None:
    address = f"\0fdshare-users-{os.getpid()}"

    def refuse_the_server() -> None:
        with pytest.raises(AccessDeniedError):
            Handover(address)

    def be_refused() -> None:
        with pytest.raises(AccessDeniedError):
            Handover(address, allow=any_user)

    with Handover(address) as handover:
        handover.ready()
        as_nobody(refuse_the_server)
        as_nobody(be_refused)
        with Handover(address) as new:
            assert new.generation == 1


@needs_root
def test_another_user_succeeds_where_both_say_so() -> None:
    address = f"\0fdshare-users-{os.getpid()}"

    def succeed() -> None:
        with Handover(address, allow=any_user) as new:
            new.listen("http", "127.0.0.1", 0)
            new.ready()

    with Handover(address, allow=users(0, NOBODY)) as handover:
        handover.listen("http", "127.0.0.1", 0)
        handover.ready()
        as_nobody(succeed)
        assert handover.retired.wait(SOON)


@needs_root
def test_another_user_cannot_even_connect_to_a_path() -> None:
    def knock() -> None:
        with pytest.raises(PermissionError):
            Handover(path)

    with tempfile.TemporaryDirectory(prefix="fds") as directory:
        os.chmod(directory, 0o755)  # it is the socket's own mode that counts
        path = Path(directory) / "control"
        with Handover(path) as handover:
            handover.ready()
            as_nobody(knock)
