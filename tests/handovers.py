"""What the tests of the handover share: generations in this process, and bare peers that speak the protocol by hand."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fdshare import Channel, ClosedError, PeerClosedError, connect
from fdshare.handover import Handover, HandoverSocket, RetiredError, protocol
from fdshare.handover.spoken import OF_SUCCESSORS

SOON = 20.0
"""Seconds that nothing here takes."""


def listen(handover: Handover, name: str = "http", port: int = 0, **options: Any) -> HandoverSocket:
    """Listen on the loopback interface, with a limit to every wait."""
    sock = handover.listen(name, "127.0.0.1", port, **options)
    sock.settimeout(SOON)
    return sock


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port for a server that is about to start, and for its successors: nobody else is given it meanwhile.

    A port that was merely free a moment ago may be another test's by then.  What is bound here and never listens keeps it from
    those who ask for any port, and lets a listener with SO_REUSEADDR have it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield port_of(holder)


@contextlib.contextmanager
def first(path: Path, **options: Any) -> Iterator[tuple[Handover, HandoverSocket]]:
    """A first generation that serves, and its socket."""
    with Handover(path, **options) as handover:
        sock = listen(handover)
        handover.ready()
        yield handover, sock


@contextlib.contextmanager
def answering(sock: HandoverSocket, word: bytes) -> Iterator[None]:
    """Accept in a thread, and send ``word`` to each client, until the socket accepts no more."""

    def accept() -> None:
        while True:
            try:
                connection, _ = sock.accept()
            except (RetiredError, ClosedError, OSError):
                return
            with connection:
                connection.sendall(word)

    thread = threading.Thread(target=accept)
    thread.start()
    try:
        yield
    finally:
        thread.join(SOON)
        assert not thread.is_alive()


def ask(port: int) -> bytes:
    """Be a client: connect, and return what the server says."""
    with socket.create_connection(("127.0.0.1", port), SOON) as sock:
        return sock.makefile("rb").read()


class Bare:
    """A successor that says what the test wants."""

    def __init__(self, path: Path) -> None:
        self.channel: Channel = connect(path, codec=OF_SUCCESSORS)
        self.fields: dict[str, Any] = {}

    def say(self, kind: str, **fields: Any) -> None:
        protocol.send(self.channel, kind, **fields)

    def hear(self, *kinds: str) -> dict[str, Any]:
        """Return what the predecessor says, which must be of one of these kinds; its handles are closed at the end."""
        self.kind, fields = protocol.receive(self.channel, *kinds, timeout=SOON)
        self.fields.update(fields)
        return fields

    def take(self) -> None:
        """Get as far as the offer."""
        self.say("take", versions=[1], pid=1)
        self.hear("offer")

    def get_ready(self) -> None:
        """Get as far as being told to go."""
        self.take()
        self.say("ready", kept=[0], final=[], adopt=False)
        self.hear("go")

    def ended(self) -> bool:
        """Whether the predecessor has ended the connection."""
        try:
            protocol.receive(self.channel, timeout=SOON)
        except PeerClosedError:
            return True
        return False

    def __enter__(self) -> Bare:
        return self

    def __exit__(self, *exc_info: object) -> None:
        protocol.close_handles(self.fields)
        self.channel.close()
