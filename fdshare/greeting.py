"""A connection that expects the other side's hello before the first message.

A transport asks its ``greeting`` before it takes a packet; the greeting goes away with the hello, so what follows
costs nothing more::

    EXPECTING --hello fits--> gone
        |  |
        |  +--another packet, where someone else may have taken the hello (fork, a channel that travelled)--> gone
        +--refusal, other version, other codec, no hello--> FAILED: each call raises that error
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import attrs

from fdshare import hello as hellos
from fdshare import reducers, rights, wire
from fdshare.channel import Channel, rebuild_channel, reduce_channel
from fdshare.codec import Codec
from fdshare.errors import AccessDeniedError, MessageTooLargeError, ProtocolError
from fdshare.hello import Hello
from fdshare.transport import Transport

__all__ = ["Greeting", "greet", "hello_of", "look_for_hello", "refuse"]

FAREWELL_SECONDS = 0.2
"""How long a failed send waits for another thread that is reading, to say why the peer has closed; that one reads for a tick."""

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_count_fork)


@attrs.define(eq=False)
class Greeting:
    """What a transport still expects before the first message."""

    ours: Hello
    plain: bool
    """What the transport's ``plain`` will be: until then, nothing may be taken in passing."""
    shared: bool = False
    """Whether another process may have taken the hello."""
    begun: bytes = b""
    """The part of it that has come; on a stream."""
    failure: OSError | None = None
    _forks: int = attrs.field(factory=lambda: _forks)

    def take(self, transport: Transport) -> bool:
        """Take the hello if it has come; False where it has not.

        Raises:
            ProtocolError, AccessDeniedError: and the same at each later call.
            PeerClosedError: the connection broke before any hello.
        """
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args)
        stream = transport.name == "stream"
        while True:
            arrived = transport._fetch(hellos.missing(self.begun) if stream else wire.PACKET_SIZE)
            if arrived is None:
                return False
            data = self.begun + arrived[0]
            if not arrived[0] or (not hellos.is_hello(data) and (self.shared or self._forks != _forks)):
                # The end, or a message: that is for the transport to look at.
                transport.greeting, transport.plain = None, self.plain
                return True
            try:
                if arrived[1]:
                    raise ProtocolError("descriptors come with the peer's hello")
                if stream and hellos.is_hello(data) and hellos.missing(data):
                    self.begun, transport.arrived = data, None
                    continue
                theirs = hellos.unpack(data, self.ours)
            except (ProtocolError, AccessDeniedError) as error:
                arrived.close()
                self.failure = error
                raise
            takes = _Takes(theirs) if _takes_less(theirs) else None
            # No interrupt can come between these.
            transport.greeting, transport.takes, transport.plain, transport.arrived = (
                None,
                takes,
                self.plain,
                None,
            )
            return True

    def farewell(self, transport: Transport) -> OSError | None:
        """Return why the peer has closed, if it said so."""
        # Whoever sends on a stream holds the other lock, which close takes second: waiting for ever could be a deadlock.
        if not transport._reading.acquire(timeout=FAREWELL_SECONDS):
            return None
        try:
            self.take(transport)
        except (ProtocolError, AccessDeniedError) as why:
            return why
        except OSError:
            pass
        finally:
            transport._reading.release()
        return None

    def leave(self, transport: Transport) -> None:
        """Before the transport closes: what is left unread would reset the connection before the peer reads what was sent."""
        if transport.arrived is None:
            try:
                transport.sock.recv(hellos.MAX_HELLO, rights.NOW)
            except OSError:
                pass


def _takes_less(theirs: Hello) -> bool:
    """Whether the peer takes less than this side may send."""
    most = Hello("")
    return theirs.descriptors < most.descriptors or theirs.packet < most.packet or theirs.size < most.size


@attrs.frozen
class _Takes:
    """What a peer takes that takes less than others."""

    hello: Hello

    def few(self, descriptors: int, size: int) -> bool:
        """Whether a message in one packet is taken.

        Args:
            descriptors: of the message.
            size: of the payload, bytes; at most ``wire.ALWAYS_INLINE``.
        """
        return descriptors <= self.hello.descriptors and size <= self.hello.size

    def check(self, header: bytes, size: int) -> None:
        """Look at a packet that is about to be sent.

        Args:
            header: packed; empty for a bare pickle.
            size: of the payload in the packet, bytes.

        Raises:
            MessageTooLargeError: the peer would refuse it.
            OSError: EMSGSIZE: the payload must go into a segment.
        """
        takes, packet = self.hello, wire.unpack(header) if header else None
        if packet is not None and packet.descriptors > takes.descriptors:
            raise MessageTooLargeError(
                f"{packet.descriptors} descriptors in one message; the peer takes {takes.descriptors}"
            )
        largest = size if packet is None else max(packet.payload_size, packet.segment_size)
        if largest > takes.size:
            raise MessageTooLargeError(f"a message of {largest} bytes; the peer takes {takes.size}")
        if size > takes.packet:
            raise OSError(errno.EMSGSIZE, "the peer takes smaller packets")


def hello_of(codec: Codec | None) -> Hello:
    """Return what this side says of itself; a codec with ``limits`` takes fewer descriptors and smaller messages than others."""
    if codec is None:
        return _PICKLE
    limits = getattr(codec, "limits", None)
    if limits is None:
        return Hello(codec.name)
    return Hello(
        codec.name,
        descriptors=min(limits.max_fds, wire.MAX_DESCRIPTORS),
        size=min(limits.max_bytes, wire.MAX_SEGMENT),
    )


_PICKLE = Hello("pickle")


def _expect(channel: Channel, greeting: Greeting) -> None:
    transport = channel._transport
    transport.greeting, transport.plain = greeting, False


def greet(channel: Channel, ours: Hello, data: bytes) -> None:
    """Say hello on a new connection, without waiting, and let the channel expect the other side's.

    Args:
        data: ``hello.pack(ours)``, which the caller keeps for many connections.

    Raises:
        OSError: not even a few bytes can be sent.  A peer that has gone is no error: it may have sent something before.
    """
    _expect(channel, Greeting(ours, channel._transport.plain))
    try:
        channel._transport.sock.send(data, rights.SEND_NOW)
    except (BrokenPipeError, ConnectionResetError):
        pass


def look_for_hello(channel: Channel) -> None:
    """Take the other side's hello if it has come; whatever is wrong with it, a receive will tell."""
    transport = channel._transport
    if transport.greeting is not None:
        try:
            transport.greeting.take(transport)
        except OSError:
            pass


def refuse(sock: socket.socket, reason: str) -> None:
    """Tell the peer of a new connection that it is not admitted, and close."""
    with sock:
        try:
            sock.send(hellos.pack_refusal(reason), rights.SEND_NOW)
            sock.recv(
                hellos.MAX_HELLO, rights.NOW
            )  # unread it would reset the connection before the peer reads
        except OSError:
            pass


# --- how a channel travels before its hello was taken ------------------------------------------------------------------


def reduce_greeted(channel: Channel, context: reducers.Context) -> reducers.Reduced:
    reduced = reduce_channel(channel, context)
    greeting = channel._transport.greeting
    if not isinstance(greeting, Greeting):
        return reduced
    greeting.shared = True
    return rebuild_greeted, (greeting.ours, greeting.begun, greeting.failure, *reduced[1])


def rebuild_greeted(ours: Hello, begun: bytes, failure: OSError | None, *arguments: Any) -> Channel:
    channel = rebuild_channel(*arguments)
    _expect(channel, Greeting(ours, channel._transport.plain, True, begun, failure))
    return channel


reducers.known[Channel] = reduce_greeted
reducers.resolved.pop(Channel, None)
