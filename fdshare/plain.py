"""``BytesCodec``: messages that are bytes and descriptors, for peers in other languages.

The payload is the bytes themselves; the descriptors are those of the packet, in their order.  Nothing is pickled, and nothing is
executed on arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fdshare import wire
from fdshare.codec import Incoming, Outgoing
from fdshare.errors import MessageTooLargeError, NotSendableError
from fdshare.handle import FdHandle, HasFileno, as_fd
from fdshare.limits import Limits

__all__ = ["BytesCodec"]

DEFAULT_MAX_BYTES = 16 << 20
"""Bytes of one message, unless told otherwise: larger things travel as a descriptor better."""


class BytesCodec:
    """A codec for bytes and descriptors, without pickle: what another language speaks with the least effort.

    ``send`` takes bytes, or a tuple of bytes and a sequence of descriptors (FdHandles, files, sockets, numbers), which are
    duplicated.  ``recv`` returns a tuple of bytes and a list of FdHandles.

    Args:
        max_bytes: most bytes of one message, sent or received.
        max_fds: most descriptors of one message, sent or received; with 0 none at all can come, and no message of more than
            64 KiB, as it would come in a segment, which is one.

    Raises:
        ValueError: a bound that makes no sense.
    """

    name = "bytes"

    def __init__(self, *, max_bytes: int = DEFAULT_MAX_BYTES, max_fds: int = wire.MAX_FDS_PER_PACKET) -> None:
        if not 0 < max_bytes <= wire.MAX_SEGMENT:
            raise ValueError(f"max_bytes is {max_bytes}: 1 to {wire.MAX_SEGMENT}")
        if not 0 <= max_fds <= wire.MAX_DESCRIPTORS:
            raise ValueError(f"max_fds is {max_fds}: 0 to {wire.MAX_DESCRIPTORS}")
        self.limits = Limits(max_bytes, max_fds, none=not max_fds)

    def encode(self, obj: Any) -> Outgoing:
        """Encode a message.

        Raises:
            NotSendableError: it is not bytes, nor bytes with descriptors.
            MessageTooLargeError: over a bound.
        """
        data, owners = obj if isinstance(obj, tuple) and len(obj) == 2 else (obj, ())
        if not isinstance(data, bytes | bytearray | memoryview) or not isinstance(owners, Sequence):
            raise NotSendableError(
                f"cannot send {type(obj).__name__}: BytesCodec takes bytes, or (bytes, [descriptors])",
                path="message",
                type_name=type(obj).__name__,
                reason="BytesCodec takes bytes, or (bytes, [descriptors])",
            )
        view = memoryview(data)
        view = view.cast("B") if view.contiguous else memoryview(bytes(view))
        if len(view) > self.limits.max_bytes:
            raise MessageTooLargeError(
                f"a message of {len(view)} bytes; max_bytes is {self.limits.max_bytes}"
            )
        if len(owners) > self.limits.max_fds:
            raise MessageTooLargeError(
                f"{len(owners)} descriptors in one message; max_fds is {self.limits.max_fds}"
            )
        return Outgoing([view], [_number(owner, i) for i, owner in enumerate(owners)], owners=[*owners])

    def decode(self, message: Incoming) -> tuple[bytes, list[FdHandle]]:
        """Return the bytes and the descriptors.

        Raises:
            nothing: what was over a bound was refused before.
        """
        handles = list(message.handles)
        message.handles.release()
        return bytes(message.payload), handles


def _number(owner: HasFileno | int, index: int) -> int:
    try:
        return as_fd(owner)
    except (TypeError, ValueError) as error:
        raise NotSendableError(
            f"cannot send message[1][{index}] ({type(owner).__name__}): {error}",
            path=f"message[1][{index}]",
            type_name=type(owner).__name__,
            reason=str(error),
        ) from error
