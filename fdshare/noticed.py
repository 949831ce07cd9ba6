"""What notices have told of packets to come, in no more room and time for being many or of many kinds.

Packets are told apart only as far as the look for room needs it::

    BUNDLE              one descriptor, and room for what is in it: a peek at the packet itself tells
    1, 2, 4, … 256      at most so many descriptors come with the packet

Beside other readers, and after sends that were given up, some never come.
"""

from __future__ import annotations

from fdshare import wire
from fdshare.errors import ProtocolError

__all__ = ["BUNDLE", "KINDS", "Noticed", "header_or_none", "needed"]

BUNDLE = 0
"""The kind of those that bring a bundle."""


KINDS = tuple(1 << (count - 1).bit_length() for count in range(wire.MAX_FDS_PER_PACKET + 1))
"""The kind of packets with so many descriptors, and no bundle."""


def _kind(header: wire.Header) -> int:
    return BUNDLE if header.flags & wire.BUNDLE else KINDS[header.carried]


class Noticed(dict[int, int]):
    """How many packets with descriptors are on their way, by kind."""

    __slots__ = ("to_map",)

    def __init__(self) -> None:
        self.to_map: wire.Header | None = None
        """A notice of a segment for which what maps it must still be loaded."""

    def add(self, notice: wire.Header) -> None:
        """Expect the packet that a notice tells of."""
        kind = _kind(notice)
        self[kind] = self.get(kind, 0) + 1
        if notice.flags & wire.SEGMENT:
            self.to_map = notice

    def forget(self, header: wire.Header) -> None:
        """The packet with this header has come; its notice may have gone to another reader."""
        kind = _kind(header)
        count = self.get(kind, 0)
        if count > 1:
            self[kind] = count - 1
        elif count:
            del self[kind]


def needed(header: wire.Header) -> int:
    """Return how many descriptors a process has open while it takes a packet, more than before."""
    return header.carried + header.total * bool(header.flags & wire.BUNDLE)


def header_or_none(data: bytes) -> wire.Header | None:
    """Return the header at the start of ``data``, None where there is none."""
    try:
        return wire.unpack(data)
    except ProtocolError:
        return None
