"""The new generation's side: finding a predecessor, taking its offer, asking for its state, and the commit.

=============== ======================================= ==================================================================
state           meaning                                 goes to
=============== ======================================= ==================================================================
CONNECTING      no predecessor has answered yet         ALONE, where there is none; OFFERED
OFFERED         its sockets are here, it serves         READY, when this process says so; ALONE, where it died or closed;
                                                        FAILED, where it revoked
READY           it has been told, and stops accepting   SERVING, with the packet that says so; ALONE; FAILED
SERVING, ALONE  this process serves                     -
FAILED          this process must not serve             -
=============== ======================================= ==================================================================
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from typing import Any

import attrs

from fdshare import socketfile
from fdshare.addresses import Address, listening_socket
from fdshare.channel import Channel
from fdshare.credentials import Policy
from fdshare.endpoint import connect
from fdshare.errors import ClosedError, DecodeError, PeerClosedError, ProtocolError
from fdshare.handle import FdHandle, own
from fdshare.handover import protocol
from fdshare.handover.binding import BACKLOG, Spec, identity_of, is_control
from fdshare.handover.errors import HandoverBusyError, HandoverError, HandoverRevokedError
from fdshare.handover.spoken import OF_SUCCESSORS, Message

__all__ = ["Control", "Offer", "Predecessor", "find"]

GO_SECONDS = 60.0
"""How long a predecessor may take to stop accepting: its hooks, which end an event loop's servers, and the final states.
That takes milliseconds; beyond this it hangs, and keeps what it has."""

RETRY_SECONDS = 0.01
"""Pause before another look for who serves, where the one that was asked had just been succeeded."""


@attrs.define
class Control:
    """The control socket of this process: bound by it, or taken over."""

    handle: FdHandle
    path: str
    identity: socketfile.Identity | None

    def remove_file(self) -> None:
        """Remove its file, if it is still the same one; of an abstract name there is none.

        Raises:
            OSError: it may not be removed.
        """
        if self.identity is not None:
            socketfile.remove(self.path, self.identity)


@attrs.define
class Offer:
    """What a predecessor gave: its listeners by name, which belong to the offer until they are taken."""

    pid: int
    """0 where the kernel has no number for it here."""
    generation: int
    listeners: dict[str, tuple[Spec, FdHandle]]
    names: list[str] = attrs.field(init=False, factory=list)
    """Of all of them, in their order."""

    def __attrs_post_init__(self) -> None:
        self.names = list(self.listeners)

    def close(self) -> None:
        """Close what nobody has taken."""
        listeners, self.listeners = self.listeners, {}
        for _, handle in listeners.values():
            handle.close()


class Predecessor:
    """The connection to the process that served before.

    Args:
        channel: it belongs to this object now.
        offer: what it gave.
    """

    def __init__(self, channel: Channel, offer: Offer) -> None:
        self.channel = channel
        self.offer = offer
        self.alive = True
        """False once it was found dead, or closed, before the commit."""
        self._asked = 0

    def ask_state(self, name: str, timeout: float | None) -> Any:
        """Return its state of that name.

        Raises:
            KeyError: it has none, or could not tell it: the text says why.
            PeerClosedError: it has gone; this process is alone.
            HandoverRevokedError, TimeoutError, DecodeError, ProtocolError: no state.
        """
        self._asked += 1
        protocol.take_pickles(self.channel, True)
        try:
            protocol.send(self.channel, "state", name=name, number=self._asked)
            kind, fields = self._receive(timeout=timeout)
        except PeerClosedError:
            self._look_for_revocation()
            raise
        if kind == "no_value":
            raise KeyError(f"the predecessor has no state {name!r}: {fields.get('text')}")
        return protocol.load(fields.get("value"))

    def _receive(self, *expected: str, timeout: float | None) -> Message:
        """Receive a message of these kinds, or where there are none the answer to the last question; skip late answers.

        Raises:
            HandoverRevokedError: the predecessor serves on.
            PeerClosedError, TimeoutError, DecodeError, ProtocolError: as protocol.receive.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            kind, fields = protocol.receive(
                self.channel, *expected, "value", "no_value", "revoked", timeout=left
            )
            if kind == "revoked":
                raise HandoverRevokedError(str(fields.get("text")))
            if kind in expected or (not expected and fields.get("number") == self._asked):
                return kind, fields
            protocol.close_handles(fields)

    def commit(self, kept: list[str], final: list[str], adopt: bool) -> dict[str, Any]:
        """Say ready, wait until it has stopped, and say that this process serves; return the final states.

        After the return this process serves, with the predecessor retired or dead (``alive`` tells).

        Raises:
            HandoverRevokedError: the predecessor serves on.
            TimeoutError, DecodeError, ProtocolError: likewise; it was left.
        """
        states: dict[str, Any] = {}
        try:
            if final or adopt:
                protocol.take_pickles(self.channel, True)
            places = [place for place, name in enumerate(self.offer.names) if name in set(kept)]
            protocol.send(self.channel, "ready", kept=places, final=final, adopt=adopt)
            _, fields = self._receive("go", timeout=GO_SECONDS)
            if final:
                states = self._final_states(final, fields)
            protocol.send(self.channel, "serving")
        except PeerClosedError:
            self._look_for_revocation()
        except BaseException:
            self.channel.close()  # so that it finds out at once, and resumes
            raise
        return states

    def _final_states(self, final: list[str], fields: dict[str, Any]) -> dict[str, Any]:
        states = protocol.load(fields.get("states"))
        if not isinstance(states, dict):
            raise ProtocolError("the predecessor has sent final states that are none")
        return {name: states[name] for name in final if name in states}

    def _look_for_revocation(self) -> None:
        """Tell a predecessor that has gone from one that has revoked, and shut its side.

        Raises:
            HandoverRevokedError: it has revoked.
            TimeoutError: it shut its side and says nothing.
        """
        while True:
            try:
                message: Message = self.channel.recv(timeout=protocol.ANSWER_SECONDS)
            except (PeerClosedError, ClosedError):
                self.alive = False
                return
            except (DecodeError, ProtocolError):
                continue
            protocol.close_handles(message)
            if message[0] == "revoked":
                raise HandoverRevokedError(str(message[1].get("text")))


def find(address: Address, allow: Policy, timeout: float | None) -> tuple[Control, Predecessor | None]:
    """Take a predecessor's offer, or bind the control socket where there is none.

    Args:
        timeout: seconds to wait for a predecessor's answers; None waits for ever.

    Raises:
        HandoverBusyError: another successor is being initialised, or the predecessor is not ready itself.
        HandoverRevokedError: it could not make an offer: the text says why.
        HandoverError: it speaks no version of the protocol that this process does.
        TimeoutError: it does not answer.
        AccessDeniedError: it is of another user, or admits none of ours.
        OSError: the control socket can be neither reached nor made.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            channel = connect(address, timeout=left, allow=allow, codec=OF_SUCCESSORS)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            control = _bind_control(address)
            if control is not None:
                return control, None
            channel = None
            reason: OSError = error
        if channel is not None:
            try:
                protocol.hold_to(channel, allow)
                protocol.take_pickles(channel, False)
                found = _ask(channel, address, left)
            except BaseException:
                channel.close()
                raise
            if not isinstance(found, str):
                return found
            channel.close()
            reason = HandoverError(found)
        if deadline is not None and time.monotonic() >= deadline:
            raise TimeoutError(f"nobody serves at {os.fsdecode(address)!r}, and yet it is taken") from reason
        time.sleep(RETRY_SECONDS)


def _bind_control(address: Address) -> Control | None:
    """Return a new control socket; None where somebody else was faster."""
    try:
        sock, identity = listening_socket(address, backlog=BACKLOG, descriptors=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return None
    return Control(own(sock.detach), _path(address), identity)


def _ask(channel: Channel, address: Address, timeout: float | None) -> tuple[Control, Predecessor] | str:
    """Return what the process at the other end offers; text where it has gone, and somebody else may serve."""
    try:
        protocol.send(channel, "take", versions=list(protocol.VERSIONS), pid=os.getpid(), timeout=timeout)
        kind, fields = protocol.receive(channel, "offer", "refused", "revoked", timeout=timeout)
    except PeerClosedError as error:
        return str(error)
    except (ProtocolError, DecodeError) as error:  # another release, or no handover at all
        raise HandoverError(
            f"who serves at {os.fsdecode(address)!r} does not speak as this process: {error}"
        ) from error
    if kind == "offer":
        return _read_offer(channel, address, fields)
    text = str(fields.get("text"))
    if kind == "revoked":
        raise HandoverRevokedError(text)
    if fields.get("why") == "busy":
        raise HandoverBusyError(text)
    if fields.get("why") == "gone":
        return text
    raise HandoverError(text)


def _read_offer(channel: Channel, address: Address, fields: dict[str, Any]) -> tuple[Control, Predecessor]:
    with contextlib.ExitStack() as stack:
        stack.callback(protocol.close_handles, fields)
        listeners, control = fields.get("listeners"), fields.get("control")
        pid, generation = protocol.sender(channel), fields.get("generation")
        identity = identity_of(fields.get("identity"))
        if not (
            isinstance(listeners, dict)
            and len(listeners) <= protocol.MAX_LISTENERS
            and isinstance(control, FdHandle)
            and is_control(control)
            and isinstance(generation, int)
        ):
            raise ProtocolError("the predecessor's offer is not one")
        found: dict[str, tuple[Spec, FdHandle]] = {}
        for name, pair in listeners.items():
            if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], FdHandle)):
                raise ProtocolError("the predecessor's offer has a listener that is none")
            found[name] = Spec.of_wire(pair[0]), pair[1]
        offer = Offer(pid, generation, found)
        stack.pop_all()
    return Control(control, _path(address), identity), Predecessor(channel, offer)


def _path(address: Address) -> str:
    path = os.fsdecode(address)
    return path if path[:1] == "\0" else os.path.abspath(path)
