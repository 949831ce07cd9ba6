"""A transport that expects the other side's hello before the first message.

It is the transport of a named connection until the hello was taken; then it turns into the plain one (or, for a peer that
takes less than this side may send, into one with limits), so that what follows costs nothing more::

    EXPECTING --hello fits--> SeqpacketTransport, StreamTransport
        |  |
        |  +--another packet, where someone else may have taken the hello (fork, a channel that travelled)--> the same
        +--refusal, other version, other codec, no hello--> FAILED: each call raises that error
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import Any, ClassVar

from fdshare import hello as hellos
from fdshare import reducers, rights, wire
from fdshare.channel import Channel, rebuild_channel, reduce_channel
from fdshare.codec import Codec, Outgoing
from fdshare.errors import AccessDeniedError, MessageTooLargeError, PeerClosedError, ProtocolError
from fdshare.hello import Hello
from fdshare.transport import Packet, Transport
from fdshare.transports import SeqpacketTransport, StreamTransport

__all__ = ["expect_hello", "greet", "hello_of", "refuse"]

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_count_fork)


class _Expecting(Transport):
    """What stands before a transport's methods until the hello was taken."""

    _ours: Hello
    _shared: bool  # whether another process may have taken the hello
    _forks: int
    _plain_later: bool
    _failure: OSError | None
    _begun: bytes  # of a stream
    _then: ClassVar[type[Transport]]
    _then_limited: ClassVar[type[Transport]]
    peer_takes: Hello

    def expect(self, ours: Hello, shared: bool) -> None:
        self._ours, self._shared, self._forks = ours, shared, _forks
        self._plain_later, self.plain = self.plain, False
        self._failure, self._begun = None, b""

    def take_hello(self) -> bool:
        """Take the hello if it has come; False where it has not; True where this is a plain transport now.

        Raises:
            ProtocolError, AccessDeniedError: and the same at each later call.
            PeerClosedError: the connection broke before any hello.
        """
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)
        while True:
            try:
                arrived = self._fetch(self._missing())
            except PeerClosedError:
                # SEQPACKET tells of a reset once, before it gives what the peer had sent and closed behind.
                arrived = self._fetch(self._missing())
            if arrived is None:
                return False
            data = self._begun + arrived[0]
            theirs = None
            if arrived[0] and (hellos.is_hello(data) or not (self._shared or self._forks != _forks)):
                try:
                    if arrived[1]:
                        raise ProtocolError("descriptors come with the peer's hello")
                    if hellos.is_hello(data) and self._is_cut(data):
                        self._begun, self.arrived = data, None
                        continue
                    theirs = hellos.unpack(data, self._ours)
                except (ProtocolError, AccessDeniedError) as error:
                    arrived.close()
                    self._failure = error
                    raise
            if theirs is None:  # the end, or a message: that is for the next step to look at
                self.__class__, self.plain = self._then, self._plain_later  # type: ignore[assignment]  # it is meant
                return True
            self.peer_takes = theirs
            # No interrupt can come between these.
            self.__class__, self.plain, self.arrived = (
                self._then_limited if _takes_less(theirs) else self._then,  # type: ignore[assignment]  # likewise
                self._plain_later,
                None,
            )
            return True

    def _missing(self) -> int:
        """Return how many bytes to ask for."""
        raise NotImplementedError

    def _is_cut(self, data: bytes) -> bool:
        """Whether more of the hello may follow."""
        raise NotImplementedError

    def _receive_now(self) -> Packet | None:
        return self._receive_now() if self.take_hello() else None  # of another class now

    def has_message(self) -> bool:
        with self._reading:
            self.check_open()
            try:
                if not self.take_hello():
                    return False
            except OSError:
                return True  # a receive will tell
            if self.arrived is not None:
                return True
        try:
            self.sock.recv(1, rights.NOW | rights.PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return self.has_message()  # of another class now

    def _send_error(self, error: OSError, fds: Sequence[int]) -> Exception:
        found = super()._send_error(error, fds)
        if isinstance(found, PeerClosedError):
            try:  # it may have said why
                with self._reading:
                    self.take_hello()
            except (ProtocolError, AccessDeniedError) as why:
                return why
            except OSError:
                pass
        return found

    def _after_fork(self) -> None:
        self._shared = True
        super()._after_fork()

    def _close(self) -> None:
        if self.arrived is None:
            try:  # what is left unread would reset the connection before the peer has read what we sent
                self.sock.recv(hellos.MAX_HELLO, rights.NOW)
            except OSError:
                pass
        super()._close()


def _takes_less(theirs: Hello) -> bool:
    return (
        theirs.descriptors < wire.MAX_DESCRIPTORS
        or theirs.packet < wire.MAX_INLINE
        or theirs.segment < wire.MAX_SEGMENT
    )


class _Limited(Transport):
    """What stands before a transport's methods for a peer that takes less than this side may send."""

    peer_takes: Hello

    def send(self, header: bytes, payload: Sequence[Any], fds: Sequence[int], deadline: float | None) -> None:
        if header:
            packet = wire.unpack(header)
            if packet.descriptors > self.peer_takes.descriptors:
                raise MessageTooLargeError(
                    f"{packet.descriptors} descriptors in one message; the peer takes {self.peer_takes.descriptors}"
                )
            if packet.segment_size > self.peer_takes.segment:
                raise MessageTooLargeError(
                    f"a segment of {packet.segment_size} bytes; the peer takes {self.peer_takes.segment}"
                )
        if sum(map(len, payload)) > self.peer_takes.packet:
            raise OSError(errno.EMSGSIZE, "the peer takes smaller packets")  # so the channel makes a segment
        super().send(header, payload, fds, deadline)


class _LimitedSeqpacket(_Limited, SeqpacketTransport):
    def send_few(self, out: Outgoing) -> bool:
        return len(out.fds) <= self.peer_takes.descriptors and super().send_few(out)


class _LimitedStream(_Limited, StreamTransport):
    pass


class _ExpectingSeqpacket(_Expecting, SeqpacketTransport):
    _then = SeqpacketTransport
    _then_limited = _LimitedSeqpacket

    def _missing(self) -> int:
        return wire.PACKET_SIZE

    def _is_cut(self, data: bytes) -> bool:
        return False


class _ExpectingStream(_Expecting, StreamTransport):
    _then = StreamTransport
    _then_limited = _LimitedStream

    def _missing(self) -> int:
        return hellos.missing(self._begun)

    def _is_cut(self, data: bytes) -> bool:
        return hellos.missing(data) > 0


_EXPECTING: dict[type[Transport], type[Transport]] = {
    SeqpacketTransport: _ExpectingSeqpacket,
    StreamTransport: _ExpectingStream,
}


def hello_of(codec: Codec | None) -> Hello:
    """Return what this side says of itself; a codec may take fewer descriptors (its ``max_descriptors``)."""
    if codec is None:
        return _PICKLE_HELLO
    return Hello(
        codec.name, min(getattr(codec, "max_descriptors", wire.MAX_DESCRIPTORS), wire.MAX_DESCRIPTORS)
    )


_PICKLE_HELLO = Hello("pickle")


def expect_hello(channel: Channel, ours: Hello, *, shared: bool = False) -> None:
    """Let a new channel expect the other side's hello before its first message.

    Args:
        ours: what the other side's is held against.
        shared: whether another process may have taken it already.
    """
    transport = channel._transport
    transport.__class__ = _EXPECTING[type(transport)]
    assert isinstance(transport, _Expecting)
    transport.expect(ours, shared)


def greet(channel: Channel, ours: Hello, data: bytes) -> None:
    """Say hello on a new connection, without waiting, and let the channel expect the other side's.

    Args:
        data: ``hello.pack(ours)``; the caller keeps it for many connections.

    Raises:
        OSError: not even a few bytes can be sent; a peer that has gone is no error, it may have sent something before.
    """
    expect_hello(channel, ours)
    try:
        channel._transport.sock.send(data, rights.SEND_NOW)
    except (BrokenPipeError, ConnectionResetError):
        pass


def look_for_hello(channel: Channel) -> None:
    """Take the other side's hello if it has come; whatever is wrong with it, a receive will tell."""
    transport = channel._transport
    if isinstance(transport, _Expecting):
        try:
            transport.take_hello()
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
    rebuild, arguments = reduce_channel(channel, context)
    transport = channel._transport
    if not isinstance(transport, _Expecting):
        return rebuild, arguments
    transport._shared = True
    return rebuild_greeted, ((transport._ours, transport._begun, transport._failure), *arguments)


def rebuild_greeted(state: tuple[Hello, bytes, OSError | None], *arguments: Any) -> Channel:
    channel = rebuild_channel(*arguments)
    ours, begun, failure = state
    expect_hello(channel, ours, shared=True)
    transport = channel._transport
    assert isinstance(transport, _Expecting)
    transport._begun, transport._failure = begun, failure
    return channel


reducers.known[Channel] = reduce_greeted
reducers.resolved.pop(Channel, None)
