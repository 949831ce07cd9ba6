"""Between the parts that a codec makes and takes, and a packet with its segment."""

from __future__ import annotations

from typing import Any, NamedTuple

from fdshare import memory, wire
from fdshare.codec import Incoming, Outgoing
from fdshare.handle import FdHandle, HandleList

__all__ = ["Plan", "open_packet", "plan"]

_FLAG = {"sealed": 0, "leased": wire.LEASED, "copied": wire.FILE}


class Plan(NamedTuple):
    """How a message will be laid out; no memory was spent yet."""

    header: wire.Header
    payload: list[Any]
    """Bytes-like pieces of what goes into the packet itself."""
    parts: list[Any] | None
    """Bytes-like pieces of the segment; None without one."""

    def write_segment(self, user: object, *, piped: bool = True) -> tuple[wire.Header, FdHandle]:
        """Write the segment; return the header that says what it is, and its handle.

        Args:
            user, piped: as for ``memory.write_segment``.

        Raises:
            NoSpaceError, FdLimitError
        """
        assert self.parts is not None
        segment, form = memory.write_segment(self.parts, user, piped=piped)
        try:
            return self.header._replace(flags=self.header.flags | _FLAG[form]), segment
        except BaseException:  # an interrupt
            segment.close()
            raise


def plan(out: Outgoing, type: int, inline: int, nonce: int) -> Plan:
    """Lay a message out: buffers go into a segment, and so does a payload of more than ``inline`` bytes.

    The header has no BUNDLE flag yet.

    Raises:
        MessageTooLargeError: over a named bound.
    """
    payload, buffers = out.payload, out.buffers
    if buffers:
        payload = [wire.pack_table(buffers), *payload]
    size = sum(map(len, payload))
    flags, segment_size, parts = 0, 0, None
    if size > inline:
        flags = wire.SEGMENT | wire.IN_SEGMENT
        parts, segment_size = wire.lay_out(payload, size, buffers)
        payload = []
    elif buffers:
        flags = wire.SEGMENT
        parts, segment_size = wire.lay_out([], 0, buffers)
    header = wire.Header(type, flags, len(out.fds), len(buffers), size, segment_size, nonce)
    wire.pack(*header)  # all bounds are checked before memory is spent
    return Plan(header, payload, parts)


def _form(flags: int, trusted: bool) -> memory.Form:
    if not trusted:
        return "regular" if flags & wire.FILE else "checked"
    if flags & wire.FILE:
        return "copied"
    return "leased" if flags & wire.LEASED else "sealed"


def open_packet(
    header: wire.Header | None, payload: Any, handles: HandleList, *, trusted: bool = True
) -> Incoming:
    """Put a packet and its segment together; close its descriptors where that fails.

    Args:
        trusted: whether the sender is; False copies its segment, for a mapping would put pages that a sparse file lacks on our
            account, for as long as the sender keeps it.
    """
    if header is None or not header.flags & wire.SEGMENT:
        return Incoming(payload, handles)
    try:
        view = memory.map_segment(handles[-1], header.segment_size, _form(header.flags, trusted))
        del handles[-1]
        if header.flags & wire.IN_SEGMENT:
            payload = view[: header.payload_size]
        buffers = [
            view[offset : offset + size].toreadonly() if readonly else view[offset : offset + size]
            for offset, size, readonly in wire.unpack_table(header, payload)
        ]
    except BaseException:
        handles.close()
        raise
    return Incoming(payload[8 * header.buffers :], handles, buffers)
