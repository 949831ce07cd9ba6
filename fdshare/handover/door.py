"""The old generation's side: a thread that answers at the control socket, and one for each successor that comes.

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

from fdshare.channel import Channel
from fdshare.endpoint import Listener
from fdshare.errors import ClosedError, FdLimitError, FdShareError, PeerClosedError, ProtocolError
from fdshare.handover import protocol

__all__ = ["Door", "DoorState", "Host"]

logger = logging.getLogger("fdshare.handover")

MAX_PEERS = 16
"""Most successors that are being talked to at a time: each is a thread, and all but one will be refused."""

ASK_SECONDS = 10.0
"""How long a peer may take to say what it wants; a successor says so at once."""

START_SECONDS = 5.0
"""How long a successor may take from being told to go on to saying that it serves, while nobody accepts.  It does nothing but
send; after that it counts as stopped, and this process resumes."""

ACCEPT_PAUSE = 0.1
"""Seconds without accepting after the descriptor limit was met."""

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
        patience: seconds that a successor may take to get ready; None for ever.
    """

    def __init__(self, listener: Listener, host: Host, patience: float | None) -> None:
        self.state = DoorState.IDLE
        self.adopts = False
        """Whether the successor takes connections."""
        self._listener = listener
        self._host = host
        self._patience = patience
        self._serving = False
        self._closed = False
        self._lock = threading.Lock()
        self._successor: Channel | None = None
        self._successor_pid = 0
        self._peers: dict[Channel, threading.Thread] = {}
        self._thread = threading.Thread(target=self._answer, name="fdshare handover", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Give offers from now on; until then whoever comes is told to come later."""
        self._serving = True

    # --- the threads ----------------------------------------------------------------------------------------------------

    def _answer(self) -> None:
        while True:
            try:
                channel = self._listener.accept()
            except ClosedError:
                return
            except FdLimitError as error:
                logger.warning("a successor has to wait: %s", error)
                time.sleep(ACCEPT_PAUSE)
                continue
            self._receive(channel)

    def _receive(self, channel: Channel) -> None:
        thread = threading.Thread(
            target=self._talk_to, args=(channel,), name="fdshare handover peer", daemon=True
        )
        try:
            with self._lock:
                if not self._closed and len(self._peers) < MAX_PEERS:
                    thread.start()
                    self._peers[channel] = thread
                    return
        except RuntimeError as error:  # no thread left
            logger.warning("a successor was turned away: %s", error)
        channel.close()

    def _talk_to(self, channel: Channel) -> None:
        try:
            self._succeed(channel)
        except (ClosedError, PeerClosedError):
            pass  # this side was closed, or a peer has ended that was nobody's successor yet
        except (FdShareError, OSError) as error:
            logger.warning("a successor was turned away: %s", error)
        except Exception:
            logger.exception("a successor was turned away")
        finally:
            channel.close()
            with self._lock:
                self._peers.pop(channel, None)

    def _succeed(self, channel: Channel) -> None:
        _, asked = protocol.receive(channel, "take", timeout=ASK_SECONDS)
        pid = channel.peer.pid
        versions = asked.get("versions")
        common = set(versions) & set(protocol.VERSIONS) if isinstance(versions, list | tuple) else set()
        if not common:
            text = f"the predecessor speaks versions {protocol.VERSIONS} of the handover's protocol, not {versions!r}"
            protocol.send(channel, "refused", why="version", text=text)
            return
        refused = self._reserve(channel, pid)
        if refused:
            why, text = refused
            protocol.send(channel, "refused", why=why, text=text)
            return
        gone = False
        try:
            self._host.begin_offer()
            self._offer(channel, max(common))
            kept = self._initialising(channel)
            gone = True
        finally:
            if not gone:
                self._release(channel)
        self._retire(channel, kept)

    def _reserve(self, channel: Channel, pid: int) -> tuple[str, str] | None:
        """Make this peer the successor; return why not, where not."""
        with self._lock:
            if self._closed or self.state is DoorState.GONE:
                return "gone", f"process {os.getpid()} has just been succeeded"
            if not self._serving:
                return "busy", f"process {os.getpid()} is not ready itself"
            if self._successor is not None:
                return "busy", f"process {self._successor_pid} is succeeding process {os.getpid()} already"
            self._successor, self._successor_pid = channel, pid
            self.state = DoorState.OFFERED
        return None

    def _release(self, channel: Channel) -> None:
        """Let others succeed: this one has failed."""
        with self._lock:
            closed, pid = self._closed, self._successor_pid
            self._successor = None
            self.state = DoorState.IDLE
        if closed:
            return  # on purpose, so its end without a word is right: the successor goes on alone
        logger.info("process %d did not succeed; process %d serves on", pid, os.getpid())
        self._host.end_offer()
        told, _ = self._revoke(channel, "the predecessor has given this successor up")
        if not told:
            self._outlast(channel)

    def _revoke(self, channel: Channel, text: str) -> tuple[bool, protocol.Message | None]:
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
        with contextlib.suppress(ClosedError):
            while True:
                poll = select.poll()
                poll.register(channel.fileno(), 0)
                if poll.poll(OUTLAST_TICK * 1000):
                    return

    def _offer(self, channel: Channel, version: int) -> None:
        fields = self._host.what_to_offer()
        try:
            protocol.send(channel, "offer", version=version, pid=os.getpid(), **fields)
        finally:
            protocol.close_handles(fields)

    def _initialising(self, channel: Channel) -> list[str]:
        """Answer until the successor is ready and serves; return the names that it keeps.

        Raises:
            PeerClosedError, TimeoutError, ProtocolError, NotSendableError: it does not; this process accepts.
        """
        deadline = None if self._patience is None else time.monotonic() + self._patience
        while True:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            kind, fields = protocol.receive(channel, "state", "ready", timeout=left)
            if kind == "state":
                self._tell_state(channel, fields.get("name"), fields.get("number"))
                continue
            kept, final = _names(fields.get("kept")), _names(fields.get("final"))
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
            protocol.send(channel, "value", number=number, value=value)
        except (TypeError, ValueError) as error:  # NotSendableError, MessageTooLargeError: nothing was sent
            protocol.send(channel, "no_value", number=number, text=f"{type(error).__name__}: {error}"[:1000])

    def _hand_over(self, channel: Channel, final: list[str]) -> None:
        self.state = DoorState.HANDING
        resume = self._host.stop()
        try:
            protocol.send(channel, "go", states=self._host.final_states(final))
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
            self.state = DoorState.GONE
        self._listener.close()
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
        protocol.send(successor, "connection", obj=obj, data=data, timeout=timeout)

    def close(self) -> bool:
        """Answer no more; return whether the sockets are left to a successor, which serves or is about to.  Twice is harmless."""
        with self._lock:
            self._closed = True
            left = self._successor is not None
            peers = dict(self._peers)
        self._listener.close()
        for channel in peers:
            channel.close()
        for thread in (self._thread, *peers.values()):
            if thread is not threading.current_thread():
                thread.join()
        return left

    def forget(self) -> None:
        """After a fork, in the child: close its copies."""
        self._closed = True
        self._lock = threading.Lock()
        self._listener.close()
        for channel in self._peers:
            channel.close()
        self._peers.clear()


def _names(value: Any) -> list[str]:
    if (
        isinstance(value, list)
        and len(value) <= protocol.MAX_LISTENERS
        and all(isinstance(name, str) for name in value)
    ):
        return value
    raise ProtocolError("the successor says ready in another way than the protocol has it")
