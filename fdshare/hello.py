"""The hello: the first bytes each way on a named connection, as bytes in and bytes out; no I/O.

Who connects sends it at once.  Who accepted sends its own, before anything else, unless it has seen the other's and that is the
same, byte for byte: then silence says so.  Each end checks the other's before the first message that it takes.

The layout is the same in every version of the protocol; numbers are little-endian::

    offset size field
         0    8 magic          "fdshare" and a zero byte
         8    1 kind           1 HELLO, 2 REFUSED (the sender closes at once; the text says why)
         9    1 lowest         version of the protocol that the sender speaks
        10    1 highest        likewise
        11    1 text size      bytes, up to 255
        12    4 descriptors    most that the sender takes in one message
        16    4 packet         largest payload in a packet that it takes, bytes; 64 KiB at least
        20    4 zero           to be ignored
        24    8 size           largest message that it takes, bytes: payload, or segment
        32      text           UTF-8: the codec's name, or the reason of a refusal

On SEQPACKET a hello is one packet; on STREAM it stands before the first frame.  It brings no descriptors.
"""

from __future__ import annotations

import struct
from typing import Any, Protocol

import attrs

from fdshare import wire
from fdshare.errors import AccessDeniedError, ProtocolError

__all__ = ["MAX_HELLO", "Greeting", "Hello", "Takes", "is_hello", "missing", "pack_refusal", "unpack"]

MAGIC = b"fdshare\0"
"""Begins like no packet: the types of those are below 4, and a bare pickle begins with 0x80."""

LOWEST = HIGHEST = 1
"""The versions of the protocol that this implementation speaks."""

HELLO, REFUSED = 1, 2

_LAYOUT = struct.Struct("<8sBBBBIIIQ")
HELLO_SIZE = _LAYOUT.size
"""Bytes before the text; no more than a packet's header, so that a stream's parser can go on where there is no hello."""

MAX_TEXT = 255
"""Bytes of a codec's name or a refusal's reason: what one byte counts."""

MAX_HELLO = HELLO_SIZE + MAX_TEXT


class Greeting(Protocol):
    """What is still expected before the first message of a named connection; see greeting.py."""

    @property
    def failure(self) -> OSError | None:
        """Why it has not come, and never will; known only once it was looked for."""

    def take(self, transport: Any) -> bool:
        """Take it if it has come; whether it has."""

    def farewell(self, transport: Any) -> OSError | None:
        """Return why the peer has closed, if it said so."""

    def leave(self, transport: Any) -> None:
        """Prepare for this side to close."""


class Takes(Protocol):
    """What the peer takes, where that is less than this side may send."""

    def few(self, descriptors: int, size: int) -> bool:
        """Whether so many descriptors and bytes of payload, no more than every peer takes in a packet, are taken."""

    def check(self, header: bytes, size: int) -> None:
        """Raise MessageTooLargeError, or EMSGSIZE where the payload must go into a segment."""


@attrs.frozen
class Hello:
    """What one end says of itself; ``data`` is what it sends.

    Raises:
        ValueError: the codec's name is longer than 255 bytes.
    """

    codec: str
    descriptors: int = wire.MAX_DESCRIPTORS
    packet: int = wire.MAX_INLINE
    size: int = wire.MAX_SEGMENT
    lowest: int = LOWEST
    highest: int = HIGHEST
    data: bytes = attrs.field(
        init=False, eq=False, repr=False, default=attrs.Factory(lambda hello: _pack(hello), takes_self=True)
    )


def _pack(hello: Hello) -> bytes:
    text = hello.codec.encode()
    if len(text) > MAX_TEXT:
        raise ValueError(f"a codec's name of {len(text)} bytes; MAX_TEXT is {MAX_TEXT}")
    numbers = (hello.descriptors, hello.packet, 0, hello.size)
    return _LAYOUT.pack(MAGIC, HELLO, hello.lowest, hello.highest, len(text), *numbers) + text


def pack_refusal(reason: str) -> bytes:
    """Return what a peer gets that is not admitted; a long reason is cut."""
    text = reason.encode()[:MAX_TEXT].decode(errors="ignore").encode()
    return _LAYOUT.pack(MAGIC, REFUSED, LOWEST, HIGHEST, len(text), 0, 0, 0, 0) + text


def is_hello(data: bytes) -> bool:
    """Whether what begins with ``data`` (of any length) may be a hello."""
    return data[: len(MAGIC)] == MAGIC[: len(data)]


def missing(data: bytes) -> int:
    """Return how many bytes to read, at least, after ``data`` from a stream, to have the whole hello; 0 where it is whole."""
    size = HELLO_SIZE if len(data) < HELLO_SIZE else HELLO_SIZE + data[_TEXT_SIZE_AT]
    return size - len(data)


_TEXT_SIZE_AT = 11


def unpack(data: bytes, ours: Hello) -> Hello:
    """Read the other side's hello and hold it against ours.

    Raises:
        ProtocolError: it is none, or its version or codec is another.
        AccessDeniedError: it is a refusal.
    """
    if not is_hello(data) or missing(data):
        raise ProtocolError(
            f"the peer did not say hello: it begins with {data[:8].hex()} (is it fdshare's connect, or its Listener?)"
        )
    _, kind, lowest, highest, _, descriptors, packet, _, size = _LAYOUT.unpack_from(data)
    try:
        text = data[HELLO_SIZE:].decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("the text of the peer's hello is not UTF-8") from error
    text = "".join(c if c.isprintable() else "?" for c in text)  # it goes to terminals and logs
    if kind == REFUSED:
        raise AccessDeniedError(f"the peer refused this connection: {text}")
    if kind != HELLO:
        raise ProtocolError(f"the peer's hello is of an unknown kind ({kind})")
    if lowest > ours.highest or highest < ours.lowest:
        raise ProtocolError(
            f"the peer speaks versions {lowest} to {highest} of the protocol, this side {ours.lowest} to {ours.highest}: "
            "update the older one"
        )
    if text != ours.codec:
        raise ProtocolError(
            f"the peer's codec is {text!r}, this side's {ours.codec!r}: give both ends the same codec"
        )
    if packet < wire.ALWAYS_INLINE:
        raise ProtocolError(
            f"the peer takes packets of {packet} bytes; {wire.ALWAYS_INLINE} are the least that the protocol allows"
        )
    return Hello(text, descriptors, packet, size, lowest, highest)
