"""The sockets of one generation by name: taken from the predecessor, inherited from the service manager, or bound here."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from typing import Any, Protocol

import attrs

from fdshare.handle import FdHandle
from fdshare.handover import protocol, systemd
from fdshare.handover.binding import Spec, check_name
from fdshare.handover.errors import HandoverError
from fdshare.handover.gate import Gate
from fdshare.handover.gated import HandoverSocket, gated
from fdshare.handover.succession import Offer

__all__ = ["Listeners", "remove_file"]

logger = logging.getLogger("fdshare.handover")


@attrs.frozen
class _Held:
    sock: HandoverSocket
    spec: Spec
    origin: str
    """"taken", "inherited" or "bound"."""

    @property
    def is_open(self) -> bool:
        """Whether the program has not closed it."""
        return self.sock.fileno() >= 0


class Listeners:
    """What this process listens on, behind one gate.

    Args:
        gate: stands before each of them.
        offer: what the predecessor gave, if there is one.
        inherited: what the service manager started this process with.
    """

    def __init__(self, gate: Gate, offer: Offer | None, inherited: list[tuple[str, FdHandle]]) -> None:
        self._gate = gate
        self._offer = offer
        self._inherited = inherited
        self._held: dict[str, _Held] = {}

    def __iter__(self) -> Any:
        return iter(self._held)

    def add(self, name: str, spec: Spec) -> HandoverSocket:
        """Return a socket for ``spec``, called ``name``.

        Raises:
            ValueError: a bad name, or one too many.
            HandoverError: what the service manager gave cannot serve.
            OSError: as bind(2).
        """
        check_name(name)
        if name in self._held:
            raise ValueError(f"there is a listener called {name!r} already")
        if len(self._held) >= protocol.MAX_LISTENERS:
            raise ValueError(f"one server has at most {protocol.MAX_LISTENERS} listeners (MAX_LISTENERS)")
        handle, spec, origin = self._find(name, spec)
        with handle:
            sock = gated(handle, self._gate, name, spec.shown_path)
        self._held[name] = _Held(sock, spec, origin)
        return sock

    def _find(self, name: str, spec: Spec) -> tuple[FdHandle, Spec, str]:
        offered = self._offer.listeners if self._offer is not None else {}
        if name in offered and spec.fits(offered[name][1], offered[name][0]):
            theirs, handle = offered.pop(name)
            return handle, attrs.evolve(spec, identity=theirs.identity, given=theirs.given), "taken"
        inherited = self._find_inherited(name, spec)
        if inherited is not None:
            return inherited, attrs.evolve(spec, given=True), "inherited"
        try:
            return *spec.bind(), "bound"
        except OSError as error:
            if self._inherited:
                names = ", ".join(sorted({repr(label) for label, _ in self._inherited}))
                error.add_note(
                    f"The service manager hands over {names}, and nothing called {name!r}: "
                    "FileDescriptorName= in the unit of the socket says what it is called."
                )
            raise

    def _find_inherited(self, name: str, spec: Spec) -> FdHandle | None:
        """Take what the service manager calls ``name``, at whatever address; of several what is most like ``spec``.

        Raises:
            HandoverError: there is something, and it cannot serve.
        """
        places = [place for place, (label, _) in enumerate(self._inherited) if label == name]
        if not places:
            return None
        misfits = {place: spec.misfit(self._inherited[place][1]) for place in places}
        usable = [place for place in places if misfits[place] is None]
        if not usable:
            raise HandoverError(
                f"what the service manager hands over as {name!r} is {misfits[places[0]]}: "
                "correct its unit, or what is listened for; inherited() takes anything"
            )
        best = max(usable, key=lambda place: spec.likeness(self._inherited[place][1]))
        return self._inherited.pop(best)[1]

    def take_inherited(self, name: str) -> FdHandle | None:
        """Take what the service manager calls ``name``; None where there is nothing of that name (any more)."""
        for place, (label, handle) in enumerate(self._inherited):
            if label == name:
                del self._inherited[place]
                return handle
        return None

    def taken(self) -> list[str]:
        """Return the names of those that are the predecessor's own."""
        return [name for name, held in self._held.items() if held.origin == "taken"]

    def to_offer(self) -> dict[str, tuple[dict[str, Any], FdHandle]]:
        """Return what a successor is given: duplicates, the caller's.

        Raises:
            OSError: no descriptor left.
        """
        handles: dict[str, tuple[dict[str, Any], FdHandle]] = {}
        try:
            for name, held in self._held.items():
                if held.is_open:
                    handles[name] = held.spec.to_wire(), FdHandle.dup(held.sock)
        except BaseException:
            protocol.close_handles(handles)
            raise
        return handles

    def warn_of_unwanted(self) -> None:
        """Say which sockets of the service manager nobody has asked for: whoever connects there would wonder."""
        for label, handle in self._inherited:
            held = self._held.get(label)
            if held is None or not held.is_open or not _is_same(handle, held.sock):
                logger.warning("the service manager's %r is not used, and closed: %r", label, handle)

    def close_unwanted(self) -> list[str]:
        """Close what was offered or inherited, and nobody asked for; return the names that are used no more, or anew."""
        names = [name for name, _ in self._inherited if name not in self._held]
        while self._inherited:
            self._inherited.pop()[1].close()
        if self._offer is not None:
            names += self._offer.listeners
            self._offer.close()
        return names

    def tell_service_manager(self, unwanted: list[str]) -> None:
        """Let it forget what is wanted no more, and keep what was bound here."""
        if not systemd.notifying():
            return
        for name in unwanted:
            systemd.notify("FDSTOREREMOVE=1", f"FDNAME={name}")
        for name, held in self._held.items():
            if held.origin == "bound" and held.is_open:
                systemd.notify("FDSTORE=1", f"FDNAME={name}", fds=[held.sock])

    def remove_files(self, kept: Collection[str] = ()) -> None:
        """Remove the files of AF_UNIX sockets, but for those of the names in ``kept``."""
        for name, held in self._held.items():
            if name not in kept:
                remove_file(held.spec)

    def close(self) -> None:
        """Close all of them."""
        self.close_unwanted()
        for held in self._held.values():
            held.sock.close()


def _is_same(handle: FdHandle, sock: HandoverSocket) -> bool:
    return os.path.samestat(os.fstat(handle.fileno()), os.fstat(sock.fileno()))


class _HasFile(Protocol):
    def remove_file(self) -> None: ...


def remove_file(thing: _HasFile) -> None:
    """Remove the file of a socket; where that is not allowed, it stays behind."""
    try:
        thing.remove_file()
    except OSError as error:  # as after a change of user; the next listener replaces it
        logger.warning("the file of a socket stays behind: %s", error)
