"""Who may accept: a gate in front of every listening socket of one process, and the wait for its end.

Old and new process share a listening socket's description, so nothing in the kernel keeps the old one from accepting.  The
gate does: each accept (and each read from a datagram socket) holds its lock, and so does whoever moves it.

========= ==================================================== ===================================================
state     accept                                               goes to
========= ==================================================== ===================================================
SHUT      waits                                                OPEN, when this process is ready and serves
OPEN      accepts                                              PAUSED, when a successor is ready; CLOSED
PAUSED    waits                                                RETIRED, when it serves; OPEN again, where it died
RETIRED   RetiredError; a socket that the successor did not    CLOSED
          keep still gives what is queued, once
CLOSED    ClosedError                                          -
========= ==================================================== ===================================================

"Waits" is BlockingIOError on a non-blocking socket, as if nothing had come; so is RETIRED there, for event loops know no other
answer.
"""

from __future__ import annotations

import contextlib
import enum
import os
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator

from fdshare import locks
from fdshare.errors import ClosedError
from fdshare.handle import own_pipe
from fdshare.handover.errors import RetiredError

__all__ = ["Gate", "GateState", "Retired"]


class GateState(enum.Enum):
    """Where a gate stands."""

    SHUT = "shut"
    OPEN = "open"
    PAUSED = "paused"
    RETIRED = "retired"
    CLOSED = "closed"


class Gate:
    """The gate of one process.

    Raises:
        OSError: no descriptor left for its signal.
    """

    def __init__(self) -> None:
        self.state = GateState.SHUT
        self.lock = locks.make_lock()
        """Held over each accept, and while the state changes."""
        self.kept: Collection[str] = ()
        """After RETIRED: the names of the sockets that the successor serves."""
        self._changed = threading.Condition(self.lock)
        self._drained: set[str] = set()
        self._signal: Signal | None = Signal()

    def admits(self, name: str) -> bool:
        """Whether the socket called ``name`` may accept now; whoever asks holds the lock.

        Raises:
            RetiredError, ClosedError: never again.
        """
        if self.state is GateState.OPEN:
            return True
        if self.state is GateState.RETIRED:
            if name not in self.kept and name not in self._drained:
                return True
            raise RetiredError
        if self.state is GateState.CLOSED:
            raise ClosedError("the handover was closed")
        return False

    def note_empty(self, name: str) -> None:
        """Note that nothing is queued on the socket called ``name``; whoever notes holds the lock."""
        if self.state is GateState.RETIRED:
            self._drained.add(name)

    def move(self, state: GateState, kept: Collection[str] = ()) -> None:
        """Go to ``state``, unless the gate was closed; no accept is under way at that moment.

        Args:
            kept: with RETIRED, the names that the successor serves.
        """
        with self.lock:
            if self.state is not GateState.CLOSED:
                self.state, self.kept = state, kept
                self._changed.notify_all()
        if state in (GateState.RETIRED, GateState.CLOSED) and self._signal is not None:
            self._signal.set()

    def wait_until_moved(self, deadline: float | None) -> bool:
        """Wait while the gate is SHUT or PAUSED, until ``deadline`` (of the monotonic clock); False where time was up."""
        with self.lock:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            left = None if left is None else min(left, threading.TIMEOUT_MAX)
            return self._changed.wait_for(lambda: self.state not in (GateState.SHUT, GateState.PAUSED), left)

    @contextlib.contextmanager
    def watching(self) -> Iterator[int | None]:
        """Lend a descriptor that gets readable when the gate is RETIRED or CLOSED; None in a forked child, where it stays open.

        Raises:
            ClosedError: it is CLOSED.
        """
        if self._signal is None:
            yield None
            return
        with self._signal.borrowed() as fd:
            yield fd

    def close(self) -> None:
        """Close for good, and wake everybody who waits."""
        self.move(GateState.CLOSED)
        if self._signal is not None:
            self._signal.close()

    def forget(self) -> None:
        """After a fork, in the child: other threads' locks are gone, and its sockets are ordinary ones from now on."""
        self.lock = locks.make_lock()
        self._changed = threading.Condition(self.lock)
        self.state = GateState.OPEN if self.state is not GateState.CLOSED else self.state
        signal, self._signal = self._signal, None
        if signal is not None:
            signal.forget()


class Signal:
    """A flag with a descriptor that is readable once it is set; it may be closed while others poll it.

    Raises:
        OSError: no descriptor left.
    """

    def __init__(self) -> None:
        self._lock = locks.make_lock()
        self._borrowers = 0
        self._open = True
        self.is_set = False
        self._reader, self._writer = own_pipe()

    def set(self) -> None:
        """Set it, once and for all."""
        with self._lock:
            if not self.is_set:
                self.is_set = True
                if not self._writer.closed:
                    os.write(self._writer.fileno(), b"!")  # never read: it stays readable

    def fileno(self) -> int:
        """Borrow the descriptor for as long as the signal is not closed.

        Raises:
            ClosedError: it is closed.
        """
        return self._reader.fileno()

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[int]:
        """Lend the descriptor; a close meanwhile waits for its return.

        Raises:
            ClosedError: it is closed.
        """
        with self._lock:
            if not self._open:
                raise ClosedError("the handover was closed")
            self._borrowers += 1
        try:
            yield self._reader.fileno()
        finally:
            with self._lock:
                self._borrowers -= 1
            self._close_if_done()

    def close(self) -> None:
        """Set it, and close its descriptors once nobody polls them."""
        self.set()
        with self._lock:
            self._open = False
        self._close_if_done()

    def _close_if_done(self) -> None:
        with self._lock:
            if not self._open and not self._borrowers:
                self._reader.close()
                self._writer.close()

    def forget(self) -> None:
        """After a fork, in the child: close its copies."""
        self._lock = locks.make_lock()
        self._open, self._borrowers = False, 0
        self._close_if_done()


class Retired:
    """The moment from which on a successor serves; see ``Handover.retired``.

    Raises:
        OSError: no descriptor left.
    """

    def __init__(self) -> None:
        self._signal = Signal()
        self._condition = threading.Condition()
        self._callbacks: list[Callable[[], object]] = []
        self._set = self._over = False

    def is_set(self) -> bool:
        """Tell whether a successor serves.

        Raises:
            nothing.
        """
        return self._set

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until a successor serves, or the handover is closed; return whether one serves.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            nothing.
        """
        with self._condition:
            most = None if timeout is None else min(timeout, threading.TIMEOUT_MAX)
            self._condition.wait_for(lambda: self._over, most)
            return self._set

    __call__ = wait

    def fileno(self) -> int:
        """Borrow a descriptor that gets readable at that moment, for ``fdshare.wait``, selectors and event loops.

        Raises:
            ClosedError: the handover is closed.
        """
        return self._signal.fileno()

    def __await__(self) -> Generator[object, None, bool]:
        """Wait in an asyncio task until a successor serves, or the handover is closed; give whether one serves.

        Raises:
            RuntimeError: no event loop runs here.
        """
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not future.done():
                future.set_result(None)

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(settle)

        self._call_when_over(wake)
        try:
            yield from future
        finally:
            with self._condition:
                if wake in self._callbacks:
                    self._callbacks.remove(wake)
        return self._set

    def _call_when_over(self, callback: Callable[[], object]) -> None:
        with self._condition:
            if not self._over:
                self._callbacks.append(callback)
                return
        callback()

    def _end(self, retired: bool) -> None:
        with self._condition:
            if self._over:
                return
            self._set, self._over = retired, True
            callbacks, self._callbacks = self._callbacks, []
            self._condition.notify_all()
        if retired:
            self._signal.set()
        for callback in callbacks:
            callback()

    def _retire(self) -> None:
        """Wake everybody: a successor serves."""
        self._end(True)

    def _close(self) -> None:
        """Wake everybody: there will be none; twice is harmless."""
        self._end(False)
        self._signal.close()

    def _forget(self) -> None:
        """After a fork, in the child: nobody tells it anything any more."""
        self._condition = threading.Condition()
        self._callbacks = []
        self._signal.forget()

    def __repr__(self) -> str:
        return f"<Retired {self._set}>"
