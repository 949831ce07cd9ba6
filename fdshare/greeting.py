"""A connection that expects the other side's hello before the first message.

A transport asks its ``greeting`` before it takes a packet the slow way, and it goes away with the hello, so what
follows costs nothing more::

    EXPECTING --a hello that fits--> gone
        |  |
        |  +--a message--> gone: silence was the answer to our hello, or another process (a fork, one to which the
        |                  channel travelled) has taken the hello; not where a hello must come (strict)
        +--a refusal, another version or codec, no hello--> FAILED: each call raises that error
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any, ClassVar

import attrs

from fdshare import hello as hellos
from fdshare import reducers, rights, wire
from fdshare.channel import Channel, rebuild_channel, reduce_channel
from fdshare.codec import Codec
from fdshare.credentials import peer_credentials
from fdshare.disposal import dispose, forks, holds_descriptors
from fdshare.errors import AccessDeniedError, MessageTooLargeError, ProtocolError
from fdshare.hello import Hello
from fdshare.inflight import DEFAULT_MAX_INFLIGHT
from fdshare.transport import Transport

__all__ = [
    "PICKLE_ANSWER",
    "Answer",
    "Bounds",
    "Greeting",
    "expect_hello",
    "hello_of",
    "refuse",
    "say_hello",
    "takes_descriptors",
]

FAREWELL_SECONDS = 0.2
"""How long a failed send waits for another thread that is reading, to say why the peer has closed; that one reads for a tick."""


@attrs.define(eq=False)
class Greeting:
    """What a transport still expects before the first message."""

    ours: Hello
    strict: bool
    """Whether a hello must come; else a message may come in its place."""
    begun: bytes = b""
    """The part of it that has come."""
    failure: OSError | None = None
    _plain: bool = False
    _forks: int = attrs.field(factory=forks)

    def stand_before(self, transport: Transport) -> None:
        """Let the transport ask this greeting first."""
        if self.strict:  # nothing may be taken in passing
            self._plain, transport.plain = transport.plain, False
        transport.greeting = self

    def share(self, transport: Transport) -> None:
        """Know that another process may take the hello."""
        if self.strict:
            self.strict, transport.plain = False, self._plain

    def take(self, transport: Transport) -> bool:
        """Take the hello if it has come; False where it has not.

        Raises:
            ProtocolError, AccessDeniedError: and the same at each later call.
            PeerClosedError: the connection broke before any hello.
        """
        if self.failure is not None:
            raise type(self.failure)(*self.failure.args)
        if self._forks != forks():
            self.share(transport)
        if not self.strict and not transport.plain and transport.bare:
            transport.greeting = None  # a packet was announced in the meantime
            return True
        stream = transport.name == "stream"
        while not self.begun or (stream and hellos.is_hello(self.begun) and hellos.missing(self.begun)):
            arrived = transport._fetch(hellos.missing(self.begun) if stream else wire.PACKET_SIZE)
            if arrived is None:
                return False
            data = self.begun + arrived[0]
            if not arrived[0] or not (self.strict or hellos.is_hello(data)):
                self._end(transport)  # the end, or a message: the transport will look at it
                return True
            if arrived[1]:
                rights.drop(arrived)
                raise self._failed(ProtocolError("descriptors come with the peer's hello"))
            self.begun, transport.arrived = data, None
        try:
            theirs = hellos.unpack(self.begun, self.ours)
        except (ProtocolError, AccessDeniedError) as error:
            raise self._failed(error) from None
        if _takes_less(theirs):
            transport.takes = _Takes(theirs)
        self._end(transport)
        return True

    def _failed(self, error: OSError) -> OSError:
        self.failure = error
        return error

    def _end(self, transport: Transport) -> None:
        if self.strict:
            transport.plain = self._plain
        transport.greeting = None

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
        """Before the transport closes: a hello left unread would reset the connection before the peer reads what was sent."""
        if self.strict and transport.arrived is None:
            if transport.limits is not None and holds_descriptors(transport.sock):
                return  # reading would close them
            try:
                transport.sock.recv(hellos.MAX_HELLO, rights.NOW)
            except OSError:
                pass


@attrs.frozen(eq=False)
class Answer:
    """What is expected once hello was said, and may never come: one for any number of connections."""

    ours: Hello
    failure: ClassVar[None] = None

    def begin(self, transport: Transport) -> Greeting:
        """Begin to expect it on one of them."""
        transport.greeting = greeting = Greeting(self.ours, False)
        return greeting

    def take(self, transport: Transport) -> bool:
        """As :meth:`Greeting.take`."""
        return self.begin(transport).take(transport)

    def farewell(self, transport: Transport) -> OSError | None:
        """As :meth:`Greeting.farewell`."""
        return self.begin(transport).farewell(transport)

    def leave(self, transport: Transport) -> None:
        """There is nothing to do."""


def _takes_less(theirs: Hello) -> bool:
    """Whether the peer takes less than this side may send."""
    return theirs.descriptors < _MOST.descriptors or theirs.packet < _MOST.packet or theirs.size < _MOST.size


_MOST = Hello("")


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


@attrs.frozen
class Bounds:
    """What may be sent on a channel and not yet be taken, as for ``Channel``; of strangers never without a bound."""

    inflight: int = DEFAULT_MAX_INFLIGHT
    untaken: int | None = None

    def meet(self, channel: Channel) -> None:
        """Hold a channel to them that was made just now, on a connection which nobody else has."""
        channel._transport.max_untaken = self.untaken
        channel._transport.forks_when_alone = forks()


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
        size=min(limits.size, wire.MAX_SEGMENT),
    )


def takes_descriptors(codec: Codec | None) -> bool:
    """Whether a message of this codec may bring any, in a segment's place too."""
    limits = getattr(codec, "limits", None)
    return limits is None or bool(limits.carried)


_PICKLE = Hello("pickle")
PICKLE_ANSWER = Answer(_PICKLE)


def say_hello(sock: socket.socket, ours: Hello) -> None:
    """Say hello on a new connection.

    Raises:
        OSError: not even a few bytes can be sent.  A peer that has gone is no error: it may have sent something before.
    """
    try:
        sock.send(ours.data, rights.SEND_NOW)
    except (BrokenPipeError, ConnectionResetError):
        pass


def expect_hello(
    sock: socket.socket, codec: Codec | None, ours: Hello, stream: bool, bounds: Bounds
) -> Channel:
    """Return a channel on a connection just accepted, and answer the other side's hello where it has come and is another.

    What is wrong with it, a receive will tell.

    Args:
        stream: whether the socket is one.
        bounds: of the channel.

    Raises:
        OSError: not even a few bytes can be sent.
    """
    # Of a stream no byte more than the hello may be taken; of a packet, one more shows that it is longer.
    size = len(ours.data) if stream else hellos.MAX_HELLO + 1
    receive = _recv if codec is None else rights.recv_warily
    try:
        begun = receive(sock, size)
    except BlockingIOError:
        os.sched_yield()  # it has connected just now, on this CPU perhaps, and is about to say hello
        try:
            begun = receive(sock, size)
        except BlockingIOError:
            begun = b""
    channel = Channel(sock, codec=codec, max_inflight=bounds.inflight, max_untaken=bounds.untaken)
    bounds.meet(channel)
    if begun != ours.data:
        if stream:  # a shorter hello names another codec: what was taken behind it will not be missed
            begun = begun[: len(begun) + min(0, hellos.missing(begun))]
        transport = channel._transport
        greeting = Greeting(ours, True, begun)
        greeting.stand_before(transport)
        say_hello(sock, ours)
        if begun:
            try:
                greeting.take(transport)
            except OSError:
                pass
    return channel


def _recv(sock: socket.socket, size: int) -> bytes:
    """Return what has come; nothing where the peer has gone.

    Raises:
        BlockingIOError: nothing has.
    """
    try:
        return sock.recv(size, rights.NOW)
    except BlockingIOError:
        raise
    except OSError:
        return b""


def refuse(sock: socket.socket) -> None:
    """Tell the peer of a new connection that it is not admitted, and close, without waiting for what it may have sent.

    It is told no more than the kernel tells about it: why, and who would be admitted, is nothing for strangers.
    """
    try:
        peer = peer_credentials(sock)
        sock.send(hellos.pack_refusal(f"uid {peer.uid} (pid {peer.pid}) is not admitted"), rights.SEND_NOW)
        sock.shutdown(socket.SHUT_RD)
        if not holds_descriptors(sock):
            sock.recv(hellos.MAX_HELLO, rights.NOW)  # left unread it would reset the connection
    except OSError:
        pass
    finally:
        dispose(sock, alone=True)


# --- how a channel travels before its hello was taken ------------------------------------------------------------------


def reduce_greeted(channel: Channel, context: reducers.Context) -> reducers.Reduced:
    reduced = reduce_channel(channel, context)
    transport = channel._transport
    greeting = transport.greeting
    if isinstance(greeting, Answer):
        greeting = greeting.begin(transport)
    if not isinstance(greeting, Greeting):
        return reduced
    greeting.share(transport)
    return rebuild_greeted, (greeting.ours, greeting.begun, greeting.failure, *reduced[1])


def rebuild_greeted(ours: Hello, begun: bytes, failure: OSError | None, *arguments: Any) -> Channel:
    channel = rebuild_channel(*arguments)
    Greeting(ours, False, begun, failure).stand_before(channel._transport)
    return channel


reducers.known[Channel] = reduce_greeted
reducers.resolved.pop(Channel, None)
