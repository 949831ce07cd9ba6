"""A connection passes from one Channel object to another, with all that has arrived or was begun; a channel that never waits."""

from __future__ import annotations

from typing import Any, TypeVar

from fdshare import recycle
from fdshare.channel import Channel
from fdshare.handle import own, to_socket
from fdshare.transport import Transport

__all__ = ["Blocked", "Unwaiting", "pass_on"]

ChannelT = TypeVar("ChannelT", bound=Channel)


class Blocked(Exception):
    """Nothing was done, for want of room in the socket; or, where ``events`` is POLLHUP, until some time has passed."""

    def __init__(self, events: int) -> None:
        super().__init__(events)
        self.events = events


def _blocked(events: int, deadline: float | None) -> int:
    raise Blocked(events)


class Unwaiting(Channel):
    """A channel whose transport raises :class:`Blocked` where it would wait; its owner waits, and closes it."""

    def __del__(self, finalizing: Any = None) -> None:
        """Leave the warning to the owner."""


def pass_on(channel: Channel, cls: type[ChannelT]) -> ChannelT:
    """Close ``channel`` to whoever uses it, threads that are blocked in it included, and return a new one that goes on.

    Raises:
        ClosedError: it is closed.
    """
    old = channel._transport
    transport = _renewed(old)
    if issubclass(cls, Unwaiting):
        vars(transport)["wait"] = _blocked
    new = cls.__new__(cls)
    vars(new).update({name: transport if value is old else value for name, value in vars(channel).items()})
    new._send_bare = None if channel._send_bare is None else transport.sock.send
    return new


def _renewed(old: Transport) -> Transport:
    old.check_open()
    old.closed = True
    for waker in tuple(old._wakers):
        waker.wake()
    with old._reading, old._writing:  # now nobody is in the middle of anything
        new = old.__class__.__new__(old.__class__)
        state: dict[str, Any] = vars(new)
        state.update(vars(old))
        state.pop("wait", None)
        new.sock = to_socket(own(old.sock.detach))
        new.closed = False
        state.pop("_reading", None)
        state.pop("input", None)
        state.pop("_writing", None)
        new._wakers = set()
        new._read_with(new._control)
        if "in_flight" in state:
            new.in_flight._transport = new
        if "untaken" in state:
            new.untaken._transport = new
        old.arrived, old.plain = None, False
    recycle.leave(old)
    return new
