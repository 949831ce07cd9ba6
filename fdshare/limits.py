"""What a peer that is not trusted may send: checked on a packet's header, before memory or descriptors are spent on it.

A codec with an attribute ``limits`` puts them on its channels.  What the peer can only do on purpose closes the channel; what
an honest peer with other limits might do as well costs it that message.

============================================== ===========================================
the header says                                what ``check`` raises
============================================== ===========================================
buffers beside the payload                     ProtocolError
a segment that is not sealed, where there are  ProtocolError
memory files, or that is not the payload alone
a bundle for what fits into a packet           ProtocolError
more than ``max_bytes``                        DecodeError: the message is dropped
more than ``max_fds`` descriptors              DecodeError: the message is dropped
============================================== ===========================================
"""

from __future__ import annotations

from typing import NamedTuple

from fdshare import memory, wire
from fdshare.errors import DecodeError, ProtocolError

__all__ = ["Limits"]


class Limits(NamedTuple):
    """Bounds on what arrives: bytes of a message, and descriptors beside its own segment."""

    max_bytes: int
    max_fds: int
    none: bool = False
    """Whether no descriptor at all may come, a segment's neither: then a message is what fits into any packet."""

    @property
    def size(self) -> int:
        """Most bytes of a message that a peer can send: ``max_bytes``, unless more than a packet takes a segment."""
        return min(self.max_bytes, wire.ALWAYS_INLINE) if self.none else self.max_bytes

    @property
    def carried(self) -> int:
        """Most descriptors that an honest packet brings: a bundle is one, a segment is one more."""
        if self.none:
            return 0
        # Beyond ALWAYS_INLINE a payload may come in a segment.
        return min(self.max_fds + (self.max_bytes > wire.ALWAYS_INLINE), wire.MAX_FDS_PER_PACKET)

    def check(self, header: wire.Header) -> None:
        """Refuse what is over a bound, or not of this kind of channel.

        Raises:
            ProtocolError: the peer breaks the rules; the channel must be closed.
            DecodeError: over a bound; the message must be dropped.
        """
        flags = header.flags
        if header.buffers or (flags & wire.BUNDLE and header.total <= wire.MAX_FDS_PER_PACKET):
            raise ProtocolError("buffers, or a needless bundle, on a channel without pickles")
        if flags & wire.SEGMENT:
            if not flags & wire.IN_SEGMENT or header.payload_size != header.segment_size:
                raise ProtocolError("a segment that is not the payload, on a channel without pickles")
            if memory.HAVE_MEMFD and flags & ~(wire.SEGMENT | wire.IN_SEGMENT | wire.BUNDLE):
                raise ProtocolError(
                    "a segment that is not sealed, on a channel without pickles: it could still change"
                )
        if header.payload_size > self.max_bytes:
            raise DecodeError(
                f"a message of {header.payload_size} bytes arrived; max_bytes is {self.max_bytes}"
            )
        if header.descriptors > self.max_fds or header.carried > self.carried:
            raise DecodeError(
                f"a message of {header.total} descriptors arrived; {self.max_fds} are allowed beside a segment (recv_fds)"
            )
