"""What the two generations say to each other: named messages over a channel, of plain values, so that versions can differ.

What is said, and that values are pickled only where a program has asked for them, is in ``spoken.py``.  Each side holds the user
who has sent each message, at that moment, against its policy (``vouched.py``): the connection's own credentials tell who began to
listen or connected, before it dropped its privileges perhaps.

The successor connects to the predecessor's control socket, and then::

    successor                                predecessor
    take  versions, pid             -->
                                    <--      offer  version, pid, generation, control, identity, listeners, states
                                    <--  or  refused  why, text
    state  name, number             -->                              any number of times
                                    <--      value  number, value   or   no_value  number, text
    (initialises)
    ready  kept, final, adopt       -->                              kept: places in the offer's listeners
                                             accepts no more; the hooks of on_stop
                                    <--      go  states
    serving                         -->                              the commit point: this one packet
                                             retires
                                    <--      connection  pair        any number of times, where it adopts
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
from fdshare.credentials import Policy
from fdshare.errors import AccessDeniedError, DecodeError, PeerClosedError, ProtocolError
from fdshare.handle import FdHandle
from fdshare.handover.spoken import PLAIN, Message, Pickled
from fdshare.vouched import vouched

__all__ = [
    "MAX_LISTENERS",
    "VERSIONS",
    "hold_to",
    "load",
    "receive",
    "send",
    "sender",
    "shut",
    "take_pickles",
]

VERSIONS = (1,)
"""Those that this implementation speaks; the predecessor picks the highest that both do."""

MAX_LISTENERS = 4096
"""Most listeners of one server: each is a descriptor in one message, and a server with more would be one by mistake."""

ANSWER_SECONDS = 10.0
"""How long the other side may take over what costs it nothing.  It needs less than a millisecond, unless the machine swaps."""


def hold_to(channel: Channel, allow: Policy) -> None:
    """Let every message from now on come from somebody whom ``allow`` admits; a new channel's, which nobody has read from.

    Raises:
        OSError: as setsockopt(2).
    """
    transport = channel._transport
    transport.sock = vouched(transport.sock, allow)
    transport._read_with(transport._control)


def take_pickles(channel: Channel, taken: bool) -> None:
    """Say whether values that are pickled, of any size, may come: not before somebody has asked for them."""
    channel._transport.limits = None if taken else PLAIN


def sender(channel: Channel) -> int:
    """Return the pid of who has sent the last message; where the system does not tell, of who has connected.

    0 where there is none: in another PID namespace, say.
    """
    last = getattr(channel._transport.sock, "sender", None)
    try:
        return int((last or channel.peer).pid)
    except OSError:  # it has gone
        return 0


def send(channel: Channel, kind: str, *, timeout: float | None = ANSWER_SECONDS, **fields: Any) -> None:
    """Send one message.

    Raises:
        PeerClosedError: the other side has gone.
        TimeoutError: it takes nothing; nothing was sent.
        NotSendableError: a value that is to be pickled cannot travel.
    """
    channel.send((kind, fields), timeout=timeout)


def receive(channel: Channel, *expected: str, timeout: float | None = ANSWER_SECONDS) -> Message:
    """Receive one message of the expected kinds.

    Raises:
        PeerClosedError: the other side has gone.
        TimeoutError: it said nothing.
        ProtocolError: it said something else.
        DecodeError: what it said is no message.
        AccessDeniedError: who said it is not who the policy admits.
    """
    message: Message = channel.recv(timeout=timeout)
    if message[0] not in expected:
        close_handles(message)
        raise ProtocolError(f"the other side said {message[0][:80]!r}; expected was {' or '.join(expected)}")
    return message


def close_handles(value: object) -> None:
    """Close the handles in a message that nobody will look at."""
    if isinstance(value, FdHandle | Pickled):
        value.close()
    elif isinstance(value, dict):
        for part in value.values():
            close_handles(part)
    elif isinstance(value, list | tuple):
        for part in value:
            close_handles(part)


def load(value: object) -> Any:
    """Unpickle a value that was asked for.

    Raises:
        ProtocolError: it is none.
        DecodeError: it cannot be rebuilt here.
    """
    if not isinstance(value, Pickled):
        close_handles(value)
        raise ProtocolError("the other side has not sent what it was asked for")
    return value.load()


def shut(channel: Channel) -> Message | None:
    """Let nothing more in, and return what had come before; None where there is nothing (more).

    From here on the other side's sends fail, by one lock of the kernel: what is not in the queue now never will be.
    """
    try:
        channel._transport.sock.shutdown(socket.SHUT_RD)
    except OSError:  # it has gone
        pass
    try:
        message: Message = channel.recv(timeout=0)
    except (PeerClosedError, TimeoutError, AccessDeniedError, ProtocolError, DecodeError):
        return None
    return message
