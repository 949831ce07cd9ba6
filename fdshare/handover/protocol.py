"""What the two generations say to each other: named messages over a channel, of plain values, so that versions can differ.

The successor connects to the predecessor's control socket, and then::

    successor                                predecessor
    take  versions, pid             -->
                                    <--      offer  version, pid, generation, control, identity, listeners, states
                                    <--  or  refused  why, text
    state  name, number             -->                              any number of times
                                    <--      value  number, value   or   no_value  number, text
    (initialises)
    ready  kept, final, adopt       -->
                                             accepts no more; the hooks of on_stop
                                    <--      go  states
    serving                         -->                              the commit point: this one packet
                                             retires
                                    <--      connection  obj, data   any number of times
                                    <--      (end: it has drained)

    at any time before the commit   <--      revoked  text

Whether the handover took place is decided by the packet ``serving`` alone, which is either in the predecessor's queue or not, and
both sides can tell: the successor by what its send returned, the predecessor by what it finds, also after it has shut its side
against further packets (:func:`shut`).  What the death of either side does at each step:

================================ ============================================= ==================================================
the last that was said           the successor dies                            the predecessor dies
================================ ============================================= ==================================================
nothing, take                    it serves on                                  the successor binds anew
offer, state, value              it serves on                                  the successor has all sockets: it serves when ready
ready                            it serves on                                  the successor serves
go                               it resumes                                    the successor serves
serving                          nobody serves; what connects is queued where  the successor serves
                                 systemd holds the sockets, as after any crash
================================ ============================================= ==================================================

An end without ``revoked`` is the other side's death, or its ``close``.
"""

from __future__ import annotations

import socket
from typing import Any

from fdshare.channel import Channel
from fdshare.errors import PeerClosedError, ProtocolError
from fdshare.handle import FdHandle

__all__ = ["MAX_LISTENERS", "VERSIONS", "Message", "receive", "send", "shut"]

VERSIONS = (1,)
"""Those that this implementation speaks; the predecessor picks the highest that both do."""

MAX_LISTENERS = 4096
"""Most listeners of one server: each is a descriptor in one message, and a server with more would be one by mistake."""

ANSWER_SECONDS = 10.0
"""How long the other side may take over what costs it nothing.  It needs less than a millisecond, unless the machine swaps."""

Message = tuple[str, dict[str, Any]]


def send(channel: Channel, kind: str, *, timeout: float | None = ANSWER_SECONDS, **fields: Any) -> None:
    """Send one message.

    Raises:
        PeerClosedError: the other side has gone.
        TimeoutError: it takes nothing; nothing was sent.
        NotSendableError: something in the fields cannot travel.
    """
    channel.send((kind, fields), timeout=timeout)


def receive(channel: Channel, *expected: str, timeout: float | None = ANSWER_SECONDS) -> Message:
    """Receive one message of the expected kinds.

    Raises:
        PeerClosedError: the other side has gone.
        TimeoutError: it said nothing.
        ProtocolError: it said something else.
        DecodeError: what it said cannot be rebuilt here.
    """
    message = channel.recv(timeout=timeout)
    if (
        not isinstance(message, tuple)
        or len(message) != 2
        or message[0] not in expected
        or not isinstance(message[1], dict)
    ):
        close_handles(message)
        said = message[0] if isinstance(message, tuple) and message else message
        raise ProtocolError(f"the other side said {str(said)[:80]!r}; expected was {' or '.join(expected)}")
    return message


def close_handles(value: object) -> None:
    """Close the handles in a message that nobody will look at."""
    if isinstance(value, FdHandle | Channel | socket.socket):
        value.close()
    elif isinstance(value, dict):
        for part in value.values():
            close_handles(part)
    elif isinstance(value, list | tuple):
        for part in value:
            close_handles(part)


def shut(channel: Channel) -> Message | None:
    """Let nothing more in, and return what had come before; None where there is nothing (more).

    From here on the other side's sends fail, by one lock of the kernel: what is not in the queue now never will be.
    """
    try:
        channel._transport.sock.shutdown(socket.SHUT_RD)
    except OSError:  # it has gone
        pass
    try:
        message = channel.recv(timeout=0)
    except (PeerClosedError, TimeoutError):
        return None
    return message if isinstance(message, tuple) and len(message) == 2 else None
