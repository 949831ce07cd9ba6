"""The packet header and the stream parser, as bytes in and bytes out; no I/O.

A message is one packet.  On SEQPACKET the kernel keeps packets apart:

* a packet that begins with byte 0x80 *is* a pickle (protocol 2 and later begin with it): a small message
  without descriptors has no header at all;
* any other packet begins with a header of 40 bytes, little-endian::

    offset size field
         0    1 type           1 MESSAGE, 2 BYTES (send_bytes), 3 NOTICE
         1    1 flags          1 SEGMENT    the last descriptor is a memory segment
                               2 BUNDLE     the only descriptor is a socket that holds the message's, in batches
                               4 IN_SEGMENT the payload is at the start of the segment, not in the packet
                               8 FILE       the segment is a pipe or an unlinked file (no seals: copy, never map)
                              16 LEASED     the segment will be written again once no descriptor and no mapping of it
                                            is left; sealed against shrinking only, for peers that trust each other
         2    2 zero
         4    4 descriptors    of the message itself, without the segment
         8    4 buffers        out-of-band buffers, in the segment
        12    4 zero
        16    8 payload size   bytes, the buffer table included
        24    8 segment size   bytes, 0 without one
        32    8 nonce          tells two packets with equal content apart (only with descriptors)

  then the payload, unless IN_SEGMENT.  A payload begins with one 8-byte entry for each buffer: its size, and bit 63 set where
  it is read-only.  In the segment the payload (where IN_SEGMENT) and then each buffer in turn begin at the next multiple of
  ``ALIGNMENT`` bytes.

A NOTICE is a header alone, with the flags and the count of the packet to come, and
  precedes each packet that carries descriptors: "look for room before you take the next
packet".  It is only a hint: with several readers another one may take that packet, and it is complete without it.

On STREAM each message is a frame: header, payload, and one byte that is 1 where the sender finished and 0 where it gave
up half-way (a timeout): the receiver drops the frame.  Descriptors come with the first byte *after* the header, so the
header tells of them before they are taken.  There are no notices and no header-less packets.
"""

from __future__ import annotations

import functools
import itertools
import os
import struct
from typing import Any, NamedTuple

from fdshare.errors import MessageTooLargeError, ProtocolError

__all__ = ["HEADER_SIZE", "Header", "StreamParser", "align", "pack", "pack_table", "unpack", "unpack_table"]

MESSAGE, BYTES, NOTICE = 1, 2, 3
SEGMENT, BUNDLE, IN_SEGMENT, FILE, LEASED = 1, 2, 4, 8, 16
_ALL_FLAGS = SEGMENT | BUNDLE | IN_SEGMENT | FILE | LEASED

PICKLE_MARK = 0x80
"""First byte of a packet that is a bare pickle; every type byte is below it."""

_LAYOUT = struct.Struct("<BBHIIIQQQ")
HEADER_SIZE = _LAYOUT.size

MAX_INLINE = 120 * 1024
"""Largest payload in a packet, bytes; larger ones go to a segment.  Measured: up to here a copy through the socket takes
20 us where a segment takes 100, and a receive buffer of this size still costs a small message nothing: malloc maps afresh what
is 128 KiB or more.  The default SO_SNDBUF of Linux (212,992) is a packet's hard limit."""

ALWAYS_INLINE = 64 * 1024
"""Payloads up to this size, bytes, wait for room in the socket; a larger one goes inline into an empty queue only, so that it
neither blocks a sender whose receiver is busy nor fills the queue for those behind it."""

MAX_FDS_PER_PACKET = 253
"""SCM_MAX_FD of Linux: a sendmsg with more is EINVAL."""

MAX_DESCRIPTORS = 128 * MAX_FDS_PER_PACKET
"""Most descriptors of one message: 128 batches fit into the default send buffer of a bundle."""

MAX_BUFFERS = 1 << 20
"""Most out-of-band buffers of one message: their table takes 8 MiB."""

MAX_SEGMENT = 1 << 44
"""Largest segment, bytes (16 TiB): nothing larger can be mapped beside others in a 47-bit address space."""

ALIGNMENT = 64
"""Alignment of small buffers in a segment, bytes: a cache line, enough for every SIMD load."""

PAGE = 4096
"""Alignment of buffers of a page and more, bytes."""

PACKET_SIZE = HEADER_SIZE + MAX_INLINE
"""Most bytes of one packet."""

_READ_ONLY = 1 << 63


class Header(NamedTuple):
    """What a packet's header says; the field order is the wire's."""

    type: int
    flags: int
    descriptors: int
    buffers: int
    payload_size: int
    segment_size: int
    nonce: int

    @property
    def inline_size(self) -> int:
        """Bytes of payload that follow the header in the packet."""
        return 0 if self.flags & IN_SEGMENT else self.payload_size

    @property
    def total(self) -> int:
        """Descriptors of the message, the segment's included."""
        return self.descriptors + (self.flags & SEGMENT)

    @property
    def carried(self) -> int:
        """Descriptors that travel with the packet itself."""
        return 1 if self.flags & BUNDLE else self.total


def pack(
    type: int,
    flags: int = 0,
    descriptors: int = 0,
    buffers: int = 0,
    payload_size: int = 0,
    segment_size: int = 0,
    nonce: int = 0,
) -> bytes:
    """Return the header as bytes.

    Raises:
        MessageTooLargeError: a count is over its named bound.
    """
    if descriptors > MAX_DESCRIPTORS:
        raise MessageTooLargeError(
            f"{descriptors} descriptors in one message; MAX_DESCRIPTORS is {MAX_DESCRIPTORS}"
        )
    if buffers > MAX_BUFFERS:
        raise MessageTooLargeError(f"{buffers} buffers in one message; MAX_BUFFERS is {MAX_BUFFERS}")
    if segment_size > MAX_SEGMENT:
        raise MessageTooLargeError(f"a segment of {segment_size} bytes; MAX_SEGMENT is {MAX_SEGMENT}")
    return _LAYOUT.pack(type, flags, 0, descriptors, buffers, 0, payload_size, segment_size, nonce)


_LARGEST_NONCE = (1 << 64) - 1
_counter: itertools.count[int]


def _begin_nonces() -> None:
    """Begin somewhere: processes that share an end may have equal numbers, each in its own PID namespace."""
    global _counter
    _counter = itertools.count(int.from_bytes(os.urandom(8), "little"))


_begin_nonces()
os.register_at_fork(after_in_child=_begin_nonces)


def nonce() -> int:
    """Return a number that no other packet on this machine has: a count from a random number of this process on."""
    return next(_counter) & _LARGEST_NONCE


def notice_of(header: bytes) -> bytes:
    """Return the notice that precedes the packet with this header: its flags and descriptors, and no sizes."""
    return _NOTICE + header[1:8] + _NO_SIZES


_NOTICE = bytes([NOTICE])
_NO_SIZES = bytes(HEADER_SIZE - 8)


def unpack(data: bytes | memoryview) -> Header:
    """Read and check a header at the start of ``data``.

    Raises:
        ProtocolError: it is short, unknown, inconsistent, or over a bound.
    """
    if len(data) < HEADER_SIZE:
        raise ProtocolError(f"a packet of {len(data)} bytes is shorter than its header ({HEADER_SIZE})")
    type, flags, zero, descriptors, buffers, zero2, payload, segment, nonce = _LAYOUT.unpack_from(data)
    if type not in (MESSAGE, BYTES, NOTICE) or zero or zero2 or flags & ~_ALL_FLAGS:
        raise ProtocolError(f"not a packet of this protocol: it begins with {bytes(data[:4]).hex()}")
    if descriptors > MAX_DESCRIPTORS or buffers > MAX_BUFFERS or segment > MAX_SEGMENT:
        raise ProtocolError(
            f"over a bound: {descriptors} descriptors, {buffers} buffers, a segment of {segment} bytes"
        )
    header = Header(type, flags, descriptors, buffers, payload, segment, nonce)
    if not flags & SEGMENT:
        if segment or buffers or flags & (IN_SEGMENT | FILE | LEASED):
            raise ProtocolError("a packet speaks of a segment that it does not have")
    elif flags & IN_SEGMENT and payload > segment:
        raise ProtocolError(f"a payload of {payload} bytes in a segment of {segment}")
    elif flags & FILE and flags & LEASED:
        raise ProtocolError("a segment is a file or leased, not both")
    if header.inline_size > MAX_INLINE:
        raise ProtocolError(f"an inline payload of {payload} bytes; MAX_INLINE is {MAX_INLINE}")
    if header.carried > MAX_FDS_PER_PACKET:
        raise ProtocolError(
            f"{header.carried} descriptors without a bundle; at most {MAX_FDS_PER_PACKET} fit"
        )
    if 8 * buffers > payload:
        raise ProtocolError(f"a table of {buffers} buffers in a payload of {payload} bytes")
    return header


@functools.lru_cache(maxsize=256)
def unpack_notice(data: bytes) -> Header:
    """Read a notice; the few that occur are remembered.

    Raises:
        ProtocolError: it is not one.
    """
    header = unpack(data)
    if header.type != NOTICE or len(data) != HEADER_SIZE:
        raise ProtocolError("a notice is a header alone")
    return header


def align(offset: int, size: int) -> int:
    """Return where a buffer of ``size`` bytes begins at or after ``offset``: at a page where it fills one."""
    unit = PAGE if size >= PAGE else ALIGNMENT
    return (offset + unit - 1) & -unit


_ZEROS = memoryview(bytes(PAGE))


def lay_out(parts: list[Any], size: int, buffers: list[memoryview]) -> tuple[list[Any], int]:
    """Return the pieces of a segment, ``parts`` of ``size`` bytes and the aligned buffers, and its size in bytes."""
    parts, offset = list(parts), size
    for buffer in buffers:
        begin = align(offset, buffer.nbytes)
        if begin > offset:
            parts.append(_ZEROS[: begin - offset])
        parts.append(buffer)
        offset = begin + buffer.nbytes
    return parts, offset


def pack_table(buffers: list[memoryview]) -> bytes:
    """Return the buffer table: size and read-only mark of each."""
    return struct.pack(f"<{len(buffers)}Q", *[b.nbytes | (_READ_ONLY if b.readonly else 0) for b in buffers])


def unpack_table(header: Header, payload: memoryview) -> list[tuple[int, int, bool]]:
    """Return (offset in the segment, size, read-only) of each buffer.

    Raises:
        ProtocolError: the table points past the segment.
    """
    if len(payload) < 8 * header.buffers:
        raise ProtocolError(f"a table of {header.buffers} buffers in a payload of {len(payload)} bytes")
    offset = header.payload_size if header.flags & IN_SEGMENT else 0
    table = []
    for entry in struct.unpack_from(f"<{header.buffers}Q", payload):
        size = entry & ~_READ_ONLY
        offset = align(offset, size)
        table.append((offset, size, bool(entry & _READ_ONLY)))
        offset += size
        if offset > header.segment_size:
            raise ProtocolError(f"buffers of {offset} bytes in a segment of {header.segment_size}")
    return table


class StreamParser:
    """Puts frames together from a byte stream, in pieces of any size; immutable, so that no step can be half done.

    The caller asks :attr:`wanted` how many bytes may be read without touching the next frame, and gives what it
    read to :meth:`fed`.  States: in the header (``header`` is None), in the rest (payload and final byte), and back.
    """

    __slots__ = ("_data", "header", "wanted")

    def __init__(self, header: Header | None = None, data: bytes = b"") -> None:
        self.header = header
        self._data = data
        self.wanted: int = (HEADER_SIZE if header is None else header.inline_size + 1) - len(data)
        """Bytes missing from the present part of the frame, at least 1."""

    @property
    def idle(self) -> bool:
        """Whether the stream stands between two frames."""
        return self.header is None and not self._data

    def fed(self, data: bytes) -> tuple[StreamParser, tuple[Header, memoryview | None] | None]:
        """Take the next bytes.

        Returns:
            the parser after them, and None while the frame is incomplete, else its header and its inline payload; the
            payload is None where the sender gave the frame up.

        Raises:
            ProtocolError: the bytes are not of this protocol.
        """
        if len(data) > self.wanted:
            raise ProtocolError(f"{len(data)} bytes where the frame lacks {self.wanted}")
        data = self._data + data
        if self.wanted > len(data) - len(self._data):
            return StreamParser(self.header, data), None
        if self.header is None:
            header = unpack(data)
            if header.type == NOTICE:
                raise ProtocolError("a notice on a stream")
            return StreamParser(header), None
        if data[-1] > 1:
            raise ProtocolError("a frame without its final byte")
        return StreamParser(), (self.header, memoryview(data)[:-1] if data[-1] else None)


def frame(header: bytes, payload: list[Any]) -> bytearray:
    """Return a whole frame; its last byte says "finished" and may be cleared as long as it was not sent."""
    return bytearray().join((header, *payload, b"\x01"))
