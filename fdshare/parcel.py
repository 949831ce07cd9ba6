"""``Parcel``: an encoded message that owns its descriptors, so it can wait, be sent, be taken back unread, and be sent again.

A channel's ``send`` borrows what it sends and its ``recv`` decodes at once.  A pool needs more time between the steps: a task is
encoded before ``submit`` returns, may wait for a worker, may be taken out of a dead worker's inbox undecoded, and an
error while decoding belongs to one task.  Each message carries a tag of 64 bits that is readable without decoding: the
last eight bytes of a bare pickle (unpickling stops before them), the nonce in the header of anything else.
"""

from __future__ import annotations

import pickle
import select
from collections.abc import Callable
from typing import Any

import attrs

from fdshare import packets, rights, wire
from fdshare.channel import Channel
from fdshare.codec import Incoming, Outgoing, PickleCodec, raise_undecodable
from fdshare.errors import FdLimitError
from fdshare.handle import FdHandle, HandleList, Handles
from fdshare.transport import Transport
from fdshare.transports import SeqpacketTransport, StreamTransport

__all__ = [
    "Message",
    "Parcel",
    "has_arrived",
    "open_message",
    "receive_bare_now",
    "receive_now",
    "seal",
    "send",
    "send_now",
    "send_outgoing",
    "tag_of",
]

_CODEC = PickleCodec()
_SEND_NOW = rights.SEND_NOW
_TAG_SIZE = 8
_loads = pickle.loads


@attrs.define(eq=False)
class Parcel:
    """A message with a header: what its pickle refers to travels beside it."""

    header: wire.Header
    payload: list[Any]
    """Bytes-like pieces of what is in the packet itself."""
    handles: HandleList
    """Its descriptors, the segment's last, or a bundle of them where the header says so; closed with the parcel."""

    def close(self) -> None:
        """Close what it owns: nobody will send or open it."""
        self.handles.close()


Message = bytes | Parcel


def seal(
    message: bytes | Outgoing,
    tag: int,
    user: object = None,
    admit: Callable[[int], object] | None = None,
    *,
    again: bool = False,
) -> Message:
    """Give an encoded message its tag and descriptors of its own; what it borrowed is left to the caller.

    Args:
        message: as ``codec.encode`` made it; of an Outgoing nothing is closed or consumed.
        tag: below 2**64.
        user: on whose behalf segments may be recycled, see ``recycle.lease``; None where they may not.
        admit: for an Outgoing, called with the bytes that it will take before they are spent; may wait, and raise.
        again: whether it may have to be sent again after somebody has received it.

    Raises:
        FdLimitError, OSError: no descriptor left.
        NoSpaceError, MessageTooLargeError: as for ``Channel.send``.
        BaseException: what ``admit`` raised.
    """
    if isinstance(message, bytes):
        return message + tag.to_bytes(_TAG_SIZE, "little")
    header, payload, parts = plan = packets.plan(message, wire.MESSAGE, wire.MAX_INLINE, tag)
    if admit is not None:
        admit(header.segment_size or header.payload_size)
    if parts is None and not message.fds:
        return b"".join([*payload, tag.to_bytes(_TAG_SIZE, "little")])
    handles: HandleList = Handles()
    segments: HandleList = Handles()
    try:
        if parts is not None:
            header, segment = plan.write_segment(user)
            segments.append(segment)
        bundle = rights.keep_in_flight(message.fds, [segment.fileno() for segment in segments], again=again)
        if bundle is None:
            handles.extend(map(FdHandle.dup, message.fds))
            handles += segments
        else:
            handles.append(bundle)
            header = header._replace(flags=header.flags | wire.BUNDLE)
            segments.close()
        segments.release()
    except BaseException:
        handles.close()
        segments.close()
        raise
    # A large buffer in the pickle is still the caller's memory, who may change it while the parcel waits.
    return Parcel(header, [piece if type(piece) is bytes else bytes(piece) for piece in payload], handles)


def tag_of(message: Message) -> int:
    """Return the tag that ``seal`` was given."""
    if isinstance(message, bytes):
        return int.from_bytes(message[-_TAG_SIZE:], "little")
    return message.header.nonce


def send(channel: Channel, message: Message, deadline: float | None = None) -> None:
    """Send a message, which stays usable: close a parcel that is not to be sent again.

    Args:
        deadline: of time.monotonic(), in seconds; None waits for room for ever.

    Raises:
        TimeoutError, PeerClosedError, ClosedError, FdLimitError, AccessDeniedError: nothing was sent.
    """
    transport = channel._transport
    if isinstance(message, bytes):
        if channel._send_bare is not None:
            try:
                channel._send_bare(message, _SEND_NOW)
                return
            except OSError:
                pass  # full, closed, gone: the way through the transport waits or tells
        if transport.bare:
            transport.send(b"", (message,), (), deadline)
            return
        size = len(message) - _TAG_SIZE
        header = wire.pack(wire.MESSAGE, payload_size=size, nonce=tag_of(message))
        transport.send(header, (memoryview(message)[:size],), (), deadline)
        return
    fds = [handle.fileno() for handle in message.handles]
    if message.header.flags & wire.BUNDLE:
        transport.send(wire.pack(*message.header), message.payload, fds, deadline)
    else:
        channel._with_bundle(message.header, message.payload, fds, deadline)


def send_outgoing(channel: Channel, message: Outgoing, tag: int, user: object = None) -> None:
    """Send an encoded message with its tag at once: what it borrows is lent, and nothing of it duplicated here.

    Args:
        tag, user: as for :func:`seal`.

    Raises:
        PeerClosedError, ClosedError, FdLimitError, AccessDeniedError, NoSpaceError, MessageTooLargeError: nothing was sent.
    """
    header, payload, parts = plan = packets.plan(message, wire.MESSAGE, wire.MAX_INLINE, tag)
    if parts is not None:
        header, segment = plan.write_segment(user)
        with segment:
            channel._with_bundle(header, payload, [*message.fds, segment.fileno()], None)
    elif message.fds:
        channel._with_bundle(header, payload, message.fds, None)
    else:
        send(channel, b"".join([*payload, tag.to_bytes(_TAG_SIZE, "little")]))


def send_now(channel: Channel, message: Message) -> bool:
    """Send a message as :func:`send` does, where that needs no waiting; return whether it did."""
    try:
        if type(message) is bytes and channel._send_bare is not None:
            channel._send_bare(message, _SEND_NOW)
        else:
            send(channel, message, 0.0)
    except (BlockingIOError, TimeoutError):
        return False
    return True


def _message_of(header: wire.Header | None, payload: Any, handles: HandleList, bundled: bool) -> Message:
    if header is None:
        return bytes(payload)
    if not bundled:
        header = header._replace(flags=header.flags & ~wire.BUNDLE)
    return Parcel(header, [payload], handles)


def receive_bare_now(channel: Channel) -> bytes | None:
    """Take the next message if it is a bare pickle; one thread at a time.

    Returns:
        the message; b"" while there is none; None where it takes :func:`receive_now` to tell.
    """
    transport = channel._transport
    if not transport.plain:
        return None
    if not transport.arrived:
        try:
            for transport.arrived in transport.arrivals_now:  # noqa: B020 -- see channel.py
                break
        except BlockingIOError:
            return b""
        except OSError:
            return None  # closed, gone
    data, ancillary, _, _ = transport.arrived
    if data and not ancillary and data[0] == wire.PICKLE_MARK:
        transport.arrived = None
        return data  # type: ignore[no-any-return]
    return None


def has_arrived(channel: Channel) -> bool:
    """Whether a message was taken from the kernel and by nobody from here: an interrupt came, or it is not a bare pickle."""
    return channel._transport.arrived is not None


def receive_now(channel: Channel, *, to_send_on: bool = False) -> Message | None:
    """Take the next message if there is one; one thread at a time.

    Args:
        to_send_on: leave its descriptors in their bundle, as they are not for this process.

    Raises:
        PeerClosedError, ClosedError
        FdLimitError: no room for its descriptors; it stays queued.
        DescriptorsLostError, ProtocolError: it is gone.
    """
    message = receive_bare_now(channel)
    if message:
        return message
    if message is not None:
        return None
    transport = channel._transport
    with transport._reading:
        transport.check_open()
        transport.keeps_bundles = to_send_on
        packet = transport._receive_now()
        if packet is not None:
            _forget_notices(transport)
    return None if packet is None else _message_of(*packet, to_send_on)


def _forget_notices(transport: Transport) -> None:
    """Each notice stands right before its packet here, so one that is left now is of a packet that was taken back."""
    if isinstance(transport, SeqpacketTransport) and transport._noticed:
        transport._noticed.clear()
        transport.plain = transport.bare


def next_tag(channel: Channel, error: OSError) -> int:
    """Return the tag of the message that :func:`receive_now` refused with ``error``; 0 where it is unknown."""
    if isinstance(error, FdLimitError):
        transport = channel._transport
        try:
            if isinstance(transport, StreamTransport):
                return 0 if transport._parser.header is None else transport._parser.header.nonce
            data = transport.sock.recv(wire.HEADER_SIZE, rights.NOW | rights.PEEK)
            header = wire.unpack(data)
        except OSError:
            return 0
        if header.total == error.needed:
            return header.nonce
    return 0


def discard(channel: Channel) -> tuple[int, FdLimitError] | None:
    """Drop the next message, whose descriptors do not fit into this process; return its tag and the error, None without one."""
    transport = channel._transport
    if isinstance(transport, StreamTransport):
        return _discard_frame(transport)
    try:
        data = transport.sock.recv(wire.PACKET_SIZE, rights.NOW)  # and the kernel closes its descriptors
    except BlockingIOError:
        return None
    header = wire.unpack(data)
    _forget_notices(transport)
    return header.nonce, rights.limit_error(header.total)


def _discard_frame(transport: StreamTransport) -> tuple[int, FdLimitError] | None:
    header = transport._parser.header
    if header is None:
        return None
    while transport._parser.header is header:
        try:
            data = transport.sock.recv(transport._parser.wanted, rights.NOW)  # likewise
        except BlockingIOError:
            transport.wait(select.POLLIN, None)  # it was begun: the rest comes, or the end
            continue
        if not data:
            return None
        transport._parser = transport._parser.fed(data)[0]
    return header.nonce, rights.limit_error(header.total)


def open_message(channel: Channel, message: Message) -> Any:
    """Decode a message, which is spent.

    Raises:
        DecodeError: it cannot be rebuilt here; its descriptors are closed.
    """
    if type(message) is bytes:
        try:
            return _loads(message)
        except Exception as error:  # noqa: BLE001 -- raised again
            raise_undecodable(error)
    assert isinstance(message, Parcel)
    payload = message.payload[0] if len(message.payload) == 1 else b"".join(message.payload)
    if message.header.flags & wire.SEGMENT:
        incoming = packets.open_packet(message.header, memoryview(payload), message.handles)
    else:
        incoming = Incoming(payload, message.handles)
    return _CODEC.decode(incoming)
