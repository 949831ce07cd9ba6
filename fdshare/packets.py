"""From a packet, its segment and its descriptors to the parts that a codec takes."""

from __future__ import annotations

from typing import Any

from fdshare import memory, wire
from fdshare.codec import Incoming
from fdshare.handle import HandleList

__all__ = ["open_packet"]


def open_packet(header: wire.Header | None, payload: Any, handles: HandleList) -> Incoming:
    """Put a packet and its segment together; close its descriptors where that fails."""
    if header is None or not header.flags & wire.SEGMENT:
        return Incoming(payload, handles)
    try:
        view = memory.map_segment(handles[-1], header.segment_size, sealed=not header.flags & wire.FILE)
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
