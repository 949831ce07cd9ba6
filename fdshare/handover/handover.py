"""``Handover``: the sockets of a server, from the process that serves to the one that succeeds it."""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import socket
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from fdshare import locks
from fdshare.addresses import Address, listen_fds
from fdshare.closing import Closing
from fdshare.credentials import Policy, same_user
from fdshare.endpoint import Listener
from fdshare.errors import ClosedError, PeerClosedError
from fdshare.handle import FdHandle, move
from fdshare.handover import protocol, spawn, systemd
from fdshare.handover.adoption import Connections
from fdshare.handover.binding import BACKLOG, Spec
from fdshare.handover.door import Door
from fdshare.handover.errors import HandoverError
from fdshare.handover.gate import Gate, GateState, Retired
from fdshare.handover.gated import HandoverSocket
from fdshare.handover.listeners import Listeners, remove_file
from fdshare.handover.serving import Serving
from fdshare.handover.spoken import OF_PREDECESSORS
from fdshare.handover.succession import Control, Predecessor, find
from fdshare.vouched import prepare

__all__ = ["Handover"]

logger = logging.getLogger("fdshare.handover")

ANSWER_SECONDS = protocol.ANSWER_SECONDS

PATIENCE_SECONDS = 600.0
"""How long a successor may initialise, unless told otherwise: longer than any start should take, and a hung one must not keep
others from succeeding for ever."""


class _Phase(enum.Enum):
    INITIALISING = "initialising"
    SERVING = "serving"
    FAILED = "failed"
    CLOSED = "closed"


_MISSING: Any = object()


def _prepare_for_confinement() -> None:
    """Import what is needed later: a process that is ready may have changed its root or user, and find no modules any more."""
    import cloudpickle  # noqa: F401 -- for states that pickle cannot take

    if "asyncio" in sys.modules:
        import concurrent.futures.thread  # noqa: F401 -- for asyncio.to_thread


class Handover(Closing):
    """One generation of a server: takes the sockets over from the one before, and hands them to the next.

    Whoever comes first at ``address`` binds its sockets.  A later process connects, receives every listening socket and what
    it asks for of the other's state, initialises as long as it needs, and calls ``ready``; only then the other one
    stops accepting.  Until then, whatever happens to the new process, the old one serves.

    A context manager.  A background thread answers successors; one end of a fork, the parent, keeps all of it.

    Args:
        address: the path of the control socket, the same for all generations; or an abstract name.
        allow: whom to succeed, and who may succeed: a policy over the other process's credentials, held against those of the
            connection, and on Linux against those of each message too: who has changed its user since is admitted as that one.
        timeout: seconds that a predecessor may take to answer; None waits for ever.
        successor_timeout: seconds that a successor may initialise before it is given up; None for ever.
        adopt: whether this process takes connections of its predecessor, see :meth:`connections`.

    Raises:
        HandoverBusyError: another successor is being initialised, or the other process is not ready itself.
        HandoverRevokedError: the other process could not make an offer: the text says why.
        HandoverError: it speaks another version of the protocol.
        TimeoutError: it does not answer.
        AccessDeniedError: it is another user's, or has become another user's.
        OSError: the control socket can be neither reached nor made.
    """

    def __init__(
        self,
        address: Address,
        *,
        allow: Policy = same_user,
        timeout: float | None = ANSWER_SECONDS,
        successor_timeout: float | None = PATIENCE_SECONDS,
        adopt: bool = False,
    ) -> None:
        _prepare_for_confinement()
        self.retired = Retired()
        """Waits until a successor serves: ``wait(timeout)``, ``await``, ``is_set()``; ``fileno()`` is readable then."""
        self._allow = allow
        self._patience = successor_timeout
        self._adopt = adopt
        self._phase = _Phase.INITIALISING
        self._lock = locks.make_lock()
        self._gate = Gate()
        self._door: Door | None = None
        self._predecessor: Predecessor | None = None
        self._control: Control | None = None
        self._listeners = Listeners(self._gate, None, [])
        try:
            inherited = listen_fds()
            self._listeners = Listeners(self._gate, None, inherited)
            self._control, self._predecessor = find(address, allow, timeout)
            if self._predecessor is not None:
                self._listeners = Listeners(self._gate, self._predecessor.offer, inherited)
            self._serving = Serving(self.generation, self._control, self._listeners, self._gate, self.retired)
            self._door = self._make_door()
            if self._predecessor is None:
                self._door.answer()
        except BaseException:
            self.close()
            raise
        _alive.add(self)

    # --- before it serves -----------------------------------------------------------------------------------------------

    @property
    def generation(self) -> int:
        """How many handovers have led to this process: 0 for the first."""
        return 0 if self._predecessor is None else self._predecessor.offer.generation + 1

    @property
    def predecessor(self) -> int | None:
        """The pid of the process before, by the kernel's word; None where this is the first, or where it has no number here."""
        return None if self._predecessor is None else self._predecessor.offer.pid or None

    def listen(
        self,
        name: str,
        host: str | None,
        port: int,
        *,
        type: int = socket.SOCK_STREAM,
        backlog: int = BACKLOG,
        reuse_port: bool = False,
    ) -> HandoverSocket:
        """Return a listening socket: the predecessor's, the service manager's, or a new one.

        The predecessor's is taken where its name and address are the same (port 0 fits the port it was given).
        What systemd started this process with (``LISTEN_FDS``) is taken by name alone: the unit says the address, of any family,
        as [::]:80 or a path; of several of one name, what is most like the address given here.

        Args:
            name: what it is called in all generations, and in systemd's unit (``FileDescriptorName=``).
            host: an address, or a name of one; None or "" for every IPv4 address, "::" for every IPv6 one.
            port: 0 for any free one.
            type: SOCK_STREAM, or SOCK_DGRAM for UDP.
            backlog: connections that wait to be accepted.
            reuse_port: set SO_REUSEPORT on a new one.

        Raises:
            ValueError: a bad name, type or port, or a name that was used before.
            HandoverError: this process is ready already, or what systemd calls so is a socket of another type, or none.
            OSError: as bind(2).
        """
        return self._listen(name, Spec.inet(host, port, type, backlog, reuse_port))

    def listen_unix(
        self,
        name: str,
        path: str | bytes | os.PathLike[Any],
        *,
        type: int = socket.SOCK_STREAM,
        backlog: int = BACKLOG,
        mode: int = 0o600,
    ) -> HandoverSocket:
        """Return a listening AF_UNIX socket; as :meth:`listen`.  A socket that is taken over keeps its file.

        Args:
            path: of any length.
            type: SOCK_STREAM, SOCK_SEQPACKET or SOCK_DGRAM.
            mode: permission bits of a new file.

        Raises:
            ValueError, HandoverError, OSError: as listen.
        """
        return self._listen(name, Spec.unix(path, type, backlog, mode))

    def _listen(self, name: str, spec: Spec) -> HandoverSocket:
        self._check_initialising("listen")
        return self._listeners.add(name, spec)

    def inherited(self, name: str) -> FdHandle | None:
        """Take a descriptor of that name that systemd started this process with, of any kind; None where there is none.

        What is taken neither by this nor by ``listen`` is closed by ``ready``.

        Raises:
            nothing.
        """
        return self._listeners.take_inherited(name)

    def state(self, name: str, default: Any = _MISSING, *, timeout: float | None = None) -> Any:
        """Ask the predecessor, which goes on serving, for what it offers under ``name``; what it answers is unpickled.

        Args:
            default: returned where there is no predecessor (any more), or no such state.
            timeout: seconds to wait; None waits for ever.

        Raises:
            KeyError: there is none, and no default; the text says why.
            TimeoutError, DecodeError: it did not answer, or the answer cannot be rebuilt here.
            HandoverRevokedError: it serves on, and this process must not.
            AccessDeniedError: it runs as another user by now, whom ``allow`` does not admit.
            HandoverError: this process is ready already; ``ready`` gives the final states.
        """
        self._check_initialising("state")
        try:
            if self._predecessor is None or not self._predecessor.alive:
                raise KeyError(f"there is no predecessor to ask for {name!r}")
            return self._predecessor.ask_state(name, timeout)
        except PeerClosedError as error:
            if default is _MISSING:
                raise KeyError(f"the predecessor has ended, and its {name!r} with it") from error
        except KeyError:
            if default is _MISSING:
                raise
        return default

    def offer(self, name: str, function: Callable[[], Any]) -> None:
        """Offer application state to a successor: whatever travels in a message.

        Args:
            name: what the successor asks for.
            function: returns it when asked, in a thread of the handover's; what it raises, the successor is told.

        Raises:
            TypeError: not callable.
        """
        if not callable(function):
            raise TypeError("offer(name, function): a function that returns the state")
        self._serving.states[name] = function

    def on_stop(self, stop: Callable[[], Any], resume: Callable[[], Any] | None = None) -> None:
        """Be told to stop accepting, by what accepts without the sockets' own methods (uvloop, child processes).

        Both are called in a thread of the handover's.

        Args:
            stop: returns once nothing is accepted any more; the successor begins to accept only then.  Where it raises, this
                process resumes.
            resume: undoes it, where the successor died after all.
        """
        self._serving.hooks.add(stop, resume)

    # --- ready ------------------------------------------------------------------------------------------------------------

    def ready(self, final: Iterable[str] = ()) -> dict[str, Any]:
        """Begin to serve: from the return on this process accepts, and its predecessor does not any more.

        Descriptors that were offered and not asked for are closed.  Where the predecessor has died meanwhile, this process serves
        in its place.  After an error it must not serve: close, and end.

        Args:
            final: states to be taken after the predecessor has stopped accepting, and before this process begins.

        Returns:
            the final states by name: those that the predecessor offers, and none of one that has died.

        Raises:
            HandoverRevokedError: the predecessor has taken its offer back (successor_timeout), or could not stop.
            TimeoutError: it does not answer; it serves on once it can.
            DecodeError: a final state cannot be rebuilt here; the predecessor serves on.
            AccessDeniedError: the predecessor runs as another user by now, whom ``allow`` does not admit.
            HandoverError: this process was ready before, or has failed.
        """
        self._check_initialising("ready")
        states: dict[str, Any] = {}
        assert self._door is not None
        if self._predecessor is not None:
            self._phase = _Phase.FAILED  # unless the next line succeeds
            states = self._predecessor.commit(self._listeners.taken(), list(final), self._adopt)
        self._phase = _Phase.SERVING
        self._gate.move(GateState.OPEN)
        self._listeners.warn_of_unwanted()
        unwanted = self._listeners.close_unwanted()  # before others succeed, who may want these addresses
        try:
            self._door.open()
        except RuntimeError as error:
            logger.error(
                "no thread is left to answer successors; this process serves all the same: %s", error
            )
        systemd.notify(*systemd.serving(os.getpid()))
        self._listeners.tell_service_manager(unwanted)
        if self._predecessor is not None and not (self._adopt and self._predecessor.alive):
            self._predecessor.channel.close()
        return states

    async def ready_async(self, final: Iterable[str] = ()) -> dict[str, Any]:
        """Begin to serve, as :meth:`ready`, without blocking the event loop meanwhile.

        Raises:
            HandoverError: and all else that ready raises.
        """
        import asyncio

        return await asyncio.to_thread(self.ready, final)

    def _check_initialising(self, what: str) -> None:
        if self._phase is _Phase.CLOSED:
            raise ClosedError("this handover was closed")
        if self._phase is not _Phase.INITIALISING:
            raise HandoverError(f"{what}: this process is {self._phase.value} already")

    def _make_door(self) -> Door:
        assert self._control is not None
        prepare(self._control.handle)
        with FdHandle.dup(self._control.handle) as handle:
            listener = Listener(handle, allow=self._allow, codec=OF_PREDECESSORS)
        try:
            return Door(listener, self._serving, self._allow, self._patience)
        except BaseException:
            listener.close()
            raise

    # --- after it was succeeded, and after it has succeeded ---------------------------------------------------------------

    async def retired_async(self) -> bool:
        """Wait in an asyncio task until a successor serves, or the handover is closed; return whether one serves.

        Raises:
            asyncio.CancelledError: the task was cancelled.
        """
        return await self.retired

    @property
    def adopts(self) -> bool:
        """Whether this process takes connections of its predecessor."""
        return self._adopt

    @property
    def kept(self) -> frozenset[str]:
        """The names of the listeners that the successor serves; none while there is no successor."""
        return frozenset(self._gate.kept)

    @property
    def successor_adopts(self) -> bool:
        """Whether a successor serves that takes connections."""
        return self.retired.is_set() and self._door is not None and self._door.adopts

    def send_connection(
        self, connection: Any, data: Any = None, *, timeout: float | None = ANSWER_SECONDS
    ) -> None:
        """Give a connection to the successor: an idle keep-alive one, say, of which nothing is half read.

        The process's own copy is closed once it is on its way, and stays open where this raises.

        Args:
            connection: a socket, or whatever travels in a message.
            data: what the successor should know about it, such as bytes that were read already.
            timeout: seconds to wait for room.

        Raises:
            HandoverError: no successor serves, or it takes no connections.
            PeerClosedError: it has gone.
            TimeoutError: it takes none at present.
            NotSendableError: it cannot travel.
        """
        if (
            self._gate.state is GateState.RETIRED
        ):  # who was told so by accept may be faster than the service manager
            self.retired.wait(timeout)
        if self._door is None or not self.successor_adopts:
            raise HandoverError("there is no successor that takes connections (Handover(..., adopt=True))")
        self._door.send_connection(move(connection), data, timeout)

    def connections(self) -> Connections:
        """Return the connections that the predecessor gives away while it drains; to be called after ``ready``.

        Raises:
            HandoverError: this process has not said ``adopt=True``, or is not ready.
        """
        if self._phase is not _Phase.SERVING or not self._adopt:
            raise HandoverError("connections come to a Handover(..., adopt=True) that is ready")
        alive = self._predecessor is not None and self._predecessor.alive
        return Connections(self._predecessor.channel if self._predecessor is not None and alive else None)

    def start_successor(self, command: Iterable[str] | None = None) -> int:
        """Start the next generation: this very command again, or another one; for a handler of SIGHUP.  Takes some 30 ms.

        It is no child of this process, but of init, or of systemd, which hears of its end.  What was handed to this process by
        systemd is not handed on.  The same command begins in the directory in which this process did, by the name that the shell
        has left in PWD, so that a relative path in it is found, and is the new release's where that name is a link to one.

        Args:
            command: program and arguments; None for those of this process.

        Returns:
            its pid.

        Raises:
            OSError: it cannot be started; without a command also where the program was read from standard input.
        """
        return spawn.start(command)

    # --- the end -----------------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._phase is _Phase.CLOSED

    def close(self) -> None:
        """End: close the sockets; what a successor has, or is about to serve, stays as it is.  Twice is harmless.

        Files of AF_UNIX sockets, the control socket's too, are removed where nobody succeeds this process.

        Raises:
            OSError: as close(2).
        """
        with self._lock:
            phase, self._phase = self._phase, _Phase.CLOSED
        if phase is _Phase.CLOSED:
            return
        self._gate.close()  # first: nothing that the door undoes may open it again
        left = self._door.close() if self._door is not None else False
        last = phase is _Phase.SERVING or (phase is _Phase.INITIALISING and self._predecessor is None)
        if last and not left:
            if phase is _Phase.SERVING:
                systemd.notify("STOPPING=1")
            self._listeners.remove_files()
            if self._control is not None:
                remove_file(self._control)
        if self._predecessor is not None:
            self._predecessor.channel.close()
        self._listeners.close()
        if self._control is not None:
            self._control.handle.close()
        self.retired._close()

    def _forget(self) -> None:
        """After a fork, in the child: the listening sockets are ordinary ones, and everything else is the parent's."""
        self._lock = locks.make_lock()
        phase, self._phase = self._phase, _Phase.CLOSED
        if phase is _Phase.CLOSED:
            return
        self._gate.forget()
        self.retired._forget()
        if self._door is not None:
            self._door.forget()
        if self._predecessor is not None:
            self._predecessor.channel.close()
        self._listeners.close_unwanted()
        if self._control is not None:
            self._control.handle.close()

    def __repr__(self) -> str:
        return (
            f"<Handover {self._phase.value} generation={self.generation} listeners={list(self._listeners)}>"
        )


_alive: weakref.WeakSet[Handover] = weakref.WeakSet()


def _after_fork() -> None:
    for handover in list(_alive):
        with contextlib.suppress(OSError):
            handover._forget()


os.register_at_fork(after_in_child=_after_fork)
