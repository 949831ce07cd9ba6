"""The old generation's side: a thread that answers at the control socket, and one for the successor.

========= ======================================== ==========================================================================
state     meaning                                  goes to
========= ======================================== ==========================================================================
IDLE      nobody is succeeding                     OFFERED, for the first that asks; others meanwhile are refused (busy)
OFFERED   a successor has the sockets              HANDING, when it is ready; IDLE, when it ends, or takes too long
HANDING   this process has stopped accepting       GONE, when the successor serves; IDLE where it died: accepting is resumed
GONE      a successor serves                       -
========= ======================================== ==========================================================================
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

from fdshare import locks
from fdshare.channel import Channel
from fdshare.credentials import Policy
from fdshare.endpoint import Listener
from fdshare.errors import ClosedError, FdShareError, PeerClosedError, ProtocolError
from fdshare.handover import protocol
from fdshare.handover.gate import Signal
from fdshare.handover.spoken import Message, Pickle
from fdshare.waiting import wait

__all__ = ["Door", "DoorState", "Host"]

logger = logging.getLogger("fdshare.handover")

MAX_PEERS = 256
"""Most peers that have not said yet what they want: each costs a descriptor.  Beyond it the oldest one has to go."""

ACCEPT_BATCH = 64
"""Most peers accepted in a row, so that a crowd at the door does not keep those inside waiting."""

ASK_SECONDS = 10.0
"""How long a peer may take to say what it wants; a successor says so at once."""

TELL_SECONDS = 10.0
"""How long a successor may take to make room for the state that it has asked for."""

START_SECONDS = 5.0
"""How long a successor may take from being told to go on to saying that it serves, while nobody accepts.  It does nothing but
send; after that it counts as stopped, and this process resumes."""

PAUSE = 0.1
"""Seconds without looking after that has failed, as at the descriptor limit."""

OUTLAST_TICK = 1.0
"""Seconds between two looks whether this process has closed its own end meanwhile."""


class DoorState(enum.Enum):
    """Where the succession stands."""

    IDLE = "idle"
    OFFERED = "offered"
    HANDING = "handing over"
    GONE = "gone"


class Host(Protocol):
    """What the door asks of the process that it belongs to."""

    def what_to_offer(self) -> Mapping[str, Any]:
        """Return the fields of an offer; the handles are the caller's."""

    def answer_state(self, name: str) -> Any:
        """Return application state; KeyError where there is none of that name."""

    def final_states(self, names: list[str]) -> dict[str, Any]:
        """Return those of these states that there are."""

    def begin_offer(self) -> None:
        """A successor is being given the sockets."""

    def end_offer(self) -> None:
        """It came to nothing."""

    def stop(self) -> Callable[[], None]:
        """Stop accepting; return what resumes it.  What it raises, it has undone."""

    def retire(self, successor: int, kept: Collection[str]) -> None:
        """The process ``successor`` serves now."""


class Door:
    """Answers successors at a listening control socket, which it takes over.

    Args:
        listener: the control socket.
        host: who is succeeded.
        allow: who may succeed, held against the sender of each message.
        patience: seconds that a successor may take to get ready; None for ever.
    """

    def __init__(self, listener: Listener, host: Host, allow: Policy, patience: float | None) -> None:
        self.state = DoorState.IDLE
        self.adopts = False
        """Whether the successor takes connections."""
        self._listener = listener
        self._host = host
        self._allow = allow
        self._patience = patience
        self._serving = False
        self._closed = False
        self._lock = locks.make_lock()
        self._decided = threading.Condition(self._lock)
        self._successor: Channel | None = None
        self._successor_pid = 0
        self._pending: dict[Channel, float] = {}
        self._sessions: dict[Channel, threading.Thread] = {}
        self._signal = Signal()
        self._thread: threading.Thread | None = None

    def answer(self) -> None:
        """Begin to answer: until ``open``, that this process is not ready.

        Raises:
            RuntimeError: no thread left.
        """
        thread = threading.Thread(target=self._answer, name="fdshare handover", daemon=True)
        thread.start()
        self._thread = thread

    def open(self) -> None:
        """Give offers from now on.

        Raises:
            RuntimeError: no thread left.
        """
        self._serving = True
        if self._thread is None:
            self.answer()

    # --- the thread that answers --------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        pending = self._pending
        try:
            while not self._closed and self.state is not DoorState.GONE:
                try:
                    self._attend_to_all()
                except OSError as error:  # no descriptor left, most likely: even waiting takes one
                    logger.warning("successors have to wait: %s", error)
                    time.sleep(PAUSE)
        finally:
            for channel in list(pending):
                self._drop(channel)
            self._listener.close()

    def _attend_to_all(self) -> None:
        pending, now = self._pending, time.monotonic()
        for channel in [channel for channel, deadline in pending.items() if deadline <= now]:
            self._drop(channel)
        left = min(pending.values(), default=None)
        for thing in wait([self._signal, self._listener, *pending], None if left is None else left - now):
            if thing is self._listener:
                self._accept()
            elif thing in pending:
                self._attend(thing)

    def _accept(self) -> None:
        try:
            for _ in range(ACCEPT_BATCH):
                channel = self._listener.accept(timeout=0)
                try:
                    protocol.hold_to(channel, self._allow)
                except BaseException:
                    channel.close()
                    raise
                self._pending[channel] = time.monotonic() + ASK_SECONDS
                if len(self._pending) > MAX_PEERS:
                    self._drop(next(iter(self._pending)))
        except TimeoutError:
            pass

    def _drop(self, channel: Channel) -> None:
        del self._pending[channel]
        channel.close()

    def _attend(self, channel: Channel) -> None:
        """Hear what a peer wants, and make it the successor, or tell it why not."""
        try:
            _, asked = protocol.receive(channel, "take", timeout=0)
            granted = self._consider(channel, asked.get("versions"))
        except TimeoutError:  # half a message, or no room for an answer
            return
        except PeerClosedError:
            granted = False
        except (FdShareError, OSError) as error:
            logger.warning("a peer was turned away: %s", error)
            granted = False
        except Exception:
            logger.exception("a peer was turned away")
            granted = False
        if granted:
            del self._pending[channel]
        else:
            self._drop(channel)

    def _consider(self, channel: Channel, versions: Any) -> bool:
        common = set(versions) & set(protocol.VERSIONS) if isinstance(versions, list | tuple) else set()
        if not common:
            text = f"the predecessor speaks versions {protocol.VERSIONS} of the handover's protocol, not {versions!r}"
            protocol.send(channel, "refused", timeout=0, why="version", text=text)
            return False
        with self._lock:
            refused = self._reserve(channel)
            if not refused:
                arguments = (channel, max(common))
                thread = threading.Thread(
                    target=self._succeed, args=arguments, name="fdshare handover successor", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:  # no thread left
                    self._successor, self.state = None, DoorState.IDLE
                    refused = "busy", f"process {os.getpid()} cannot attend to a successor: {error}"
                else:
                    self._sessions[channel] = thread
        if refused:
            why, text = refused
            protocol.send(channel, "refused", timeout=0, why=why, text=text)
        return not refused

    def _reserve(self, channel: Channel) -> tuple[str, str] | None:
        """Make this peer the successor; return why not, where not.  Whoever calls holds the lock."""
        me = os.getpid()
        if self._closed or self.state in (DoorState.HANDING, DoorState.GONE):
            # In HANDING, the successor may serve already, and this process not know it yet.
            return "gone", f"process {me} is being succeeded by process {self._successor_pid}"
        if not self._serving:
            return "busy", f"process {me} is not ready itself"
        if self._successor is not None and _has_ended(self._successor):
            return "gone", f"process {self._successor_pid} has just failed to succeed process {me}"
        if self._successor is not None:
            return "busy", f"process {self._successor_pid} is succeeding process {me} already"
        self._successor, self._successor_pid = channel, protocol.sender(channel)
        self.state = DoorState.OFFERED
        return None

    # --- the thread of the successor ----------------------------------------------------------------------------------------

    def _succeed(self, channel: Channel, version: int) -> None:
        try:
            try:
                self._host.begin_offer()
                names = self._offer(channel, version)
                kept = self._initialising(channel, names)
            except BaseException as error:
                self._release(channel, f"{type(error).__name__}: {error}")
                raise
            self._retire(channel, kept)
        except (ClosedError, PeerClosedError):
            pass  # this process ends, or the successor did
        except (FdShareError, OSError) as error:
            logger.warning("a successor was turned away: %s", error)
        except Exception:
            logger.exception("a successor was turned away")
        finally:
            channel.close()
            with self._lock:
                self._sessions.pop(channel, None)

    def _release(self, channel: Channel, why: str) -> None:
        """Let others succeed: this one has failed."""
        with self._lock:
            self.state = DoorState.OFFERED if self._closed else DoorState.IDLE
            self._decided.notify_all()
            if self._closed:
                return  # on purpose, so its end without a word is right: the successor goes on alone
            pid = self._successor_pid
            self._successor = None
        logger.info("process %d did not succeed; process %d serves on", pid, os.getpid())
        self._host.end_offer()
        told, _ = self._revoke(channel, f"the predecessor has given this successor up: {why}")
        if not told:
            self._outlast(channel)

    def _revoke(self, channel: Channel, text: str) -> tuple[bool, Message | None]:
        """Tell the successor that it must not serve; return whether it could be told, and what it had said before."""
        told = True
        try:
            protocol.send(channel, "revoked", timeout=0.0, text=text[:1000])
        except TimeoutError:  # it reads nothing
            told = False
        except (FdShareError, OSError):  # it has gone
            pass
        return told, protocol.shut(channel)

    def _outlast(self, channel: Channel) -> None:
        """Wait for the end of a successor that could not be told: ours, without a word, would make it serve beside us."""
        while not _has_ended(channel, OUTLAST_TICK):
            pass

    def _offer(self, channel: Channel, version: int) -> list[str]:
        """Offer the sockets; return their names in the order of the offer."""
        fields = self._host.what_to_offer()
        try:
            protocol.send(channel, "offer", version=version, pid=os.getpid(), **fields)
        finally:
            protocol.close_handles(fields)
        return list(fields["listeners"])

    def _initialising(self, channel: Channel, names: list[str]) -> list[str]:
        """Answer until the successor is ready and serves; return the names that it keeps.

        Raises:
            PeerClosedError, TimeoutError, ProtocolError, NotSendableError: it does not; this process accepts.
        """
        deadline = None if self._patience is None else time.monotonic() + self._patience
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                kind, fields = protocol.receive(channel, "state", "ready", timeout=left)
            except TimeoutError:
                raise TimeoutError(f"it was not ready after {self._patience:g} s") from None
            if kind == "state":
                self._tell_state(channel, fields.get("name"), fields.get("number"))
                continue
            kept, final = _kept(fields.get("kept"), names), _names(fields.get("final"))
            self._hand_over(channel, final)
            self.adopts = fields.get("adopt") is True
            return kept

    def _tell_state(self, channel: Channel, name: Any, number: Any) -> None:
        try:
            value = self._host.answer_state(name)
        except Exception as error:  # noqa: BLE001 -- the application's; whoever asked is told
            protocol.send(channel, "no_value", number=number, text=f"{type(error).__name__}: {error}"[:1000])
            return
        try:
            protocol.send(channel, "value", timeout=TELL_SECONDS, number=number, value=Pickle(value))
        except (TypeError, ValueError) as error:  # NotSendableError, MessageTooLargeError: nothing was sent
            protocol.send(channel, "no_value", number=number, text=f"{type(error).__name__}: {error}"[:1000])

    def _hand_over(self, channel: Channel, final: list[str]) -> None:
        with self._lock:
            if self._closed:
                raise ClosedError("this process ends")
            self.state = DoorState.HANDING
        resume = self._host.stop()
        try:
            states = Pickle(self._host.final_states(final)) if final else None
            protocol.send(channel, "go", states=states)
            protocol.receive(channel, "serving", timeout=START_SECONDS)
        except BaseException as error:
            if not isinstance(error, PeerClosedError | ClosedError):
                why = f"the predecessor resumes: {type(error).__name__}: {error}"
                _, message = self._revoke(channel, why)
                if message is not None and message[0] == "serving":
                    return  # it was faster
            resume()
            raise

    def _retire(self, channel: Channel, kept: list[str]) -> None:
        with self._lock:
            self._successor_pid = (
                protocol.sender(channel) or self._successor_pid
            )  # of who serves, who need not be who connected
            self.state = DoorState.GONE
            self._decided.notify_all()
        self._signal.set()
        self._host.retire(self._successor_pid, kept)
        # The end of the successor, or of the waiting for connections by our own close.
        with contextlib.suppress(ClosedError, PeerClosedError):
            protocol.receive(channel, timeout=None)

    # --- what the process calls --------------------------------------------------------------------------------------------

    def send_connection(self, obj: Any, data: Any, timeout: float | None) -> None:
        """Send something to the successor that serves.

        Raises:
            PeerClosedError: it has gone.
            TimeoutError: it takes nothing; nothing was sent.
            NotSendableError: it cannot travel.
        """
        successor = self._successor
        if self.state is not DoorState.GONE or successor is None:
            raise PeerClosedError("there is no successor that serves")
        try:
            protocol.send(successor, "connection", pair=Pickle((obj, data)), timeout=timeout)
        except ClosedError as error:
            if self._closed:
                raise
            raise PeerClosedError("the successor has ended, or takes nothing more") from error

    def close(self) -> bool:
        """Answer no more; return whether the sockets are left to a successor, which serves or is about to.  Twice is harmless."""
        with self._lock:
            self._closed = True
            sessions = dict(self._sessions)
            # Whether a successor that was told to go on serves is a matter of microseconds, unless it was stopped.
            self._decided.wait_for(lambda: self.state is not DoorState.HANDING, 2 * START_SECONDS)
            left = self._successor is not None and (
                self.state is not DoorState.OFFERED or not _has_ended(self._successor)
            )
        self._signal.set()
        for channel in sessions:
            channel.close()
        for thread in (self._thread, *sessions.values()):
            if thread is not None and thread is not threading.current_thread():
                thread.join(2 * START_SECONDS)  # longer is a function of the program's that does not return
        self._listener.close()  # where no thread has
        self._signal.close()
        return left

    def forget(self) -> None:
        """After a fork, in the child: close its copies."""
        self._closed = True
        self._lock = locks.make_lock()
        self._decided = threading.Condition(self._lock)
        self._signal.forget()
        self._listener.close()
        for channel in (*self._pending, *self._sessions):
            channel.close()
        self._pending.clear()
        self._sessions.clear()


def _has_ended(channel: Channel, timeout: float = 0.0) -> bool:
    """Whether the other side has closed altogether, or this one; whatever was said before may still be unread."""
    poll = select.poll()
    try:
        # Asked for by name: macOS tells nothing unasked (poll_nocancel in XNU's bsd/kern/sys_generic.c).
        poll.register(channel.fileno(), select.POLLHUP)
    except ClosedError:
        return True
    return bool(poll.poll(timeout * 1000))


def _kept(value: Any, names: list[str]) -> list[str]:
    """Return the names of the listeners that a successor keeps, by their places in the offer."""
    if isinstance(value, list) and all(type(place) is int and 0 <= place < len(names) for place in value):
        return [names[place] for place in value]
    raise ProtocolError("the successor keeps listeners that it was not offered")


def _names(value: Any) -> list[str]:
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return value
    raise ProtocolError("the successor says ready in another way than the protocol has it")
