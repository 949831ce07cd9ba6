"""The broker: where descriptors wait for the receiver of a pickle that is not a channel's.

Stock pools pickle to bytes that travel over pipes, where no descriptor can follow.  So the pickle holds a ticket, and the
descriptors wait with the broker of the process that pickled:

    pickling:    object -> codec.encode -> payload + duplicates; the duplicates are deposited under a one-shot token
    in the pickle:  rebuild_fetched(payload, buffers, address, token, count)
    unpickling:  connect(address), send the token, receive the descriptors -> codec.decode -> object

The protocol, on an AF_UNIX stream in a directory of mode 0700; both sides ask the kernel for the other's user first:

=========================== =========================================================================================
the receiver sends          TOKEN_SIZE bytes of token
the broker answers          one byte: GIVEN (with the descriptors), BUNDLED (with a bundle of them), UNKNOWN, DENIED, BUSY
the receiver closes         it has them; by then at the latest the broker closes its own
=========================== =========================================================================================

A token is spent once its descriptors are with the kernel.  What nobody fetches is closed when its lease ends.  Thread,
socket and directory exist only while something waits.  A pickle that is loaded in the process that made it needs none of
that: the deposit is taken directly.  After a fork the child forgets everything and closes its copies.  Where multiprocessing is
starting a process, the descriptors are inherited instead, and no broker is involved.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import heapq
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import attrs

from fdshare import locks, rights
from fdshare.credentials import peer_credentials, same_user
from fdshare.disposal import dispose, dispose_listener
from fdshare.handle import HandleList, socketpair_of
from fdshare.rendezvous import listen, remove
from fdshare.wire import MAX_FDS_PER_PACKET

__all__ = [
    "DEFAULT_LEASE",
    "Broker",
    "current",
    "get_lease",
    "set_lease",
    "shutdown",
]

DEFAULT_LEASE = 600.0
"""Seconds that a deposit waits.  A stock pool pickles tasks well before a worker reads them, and a task that expired there
breaks most pools, so this is longer than any queue should be; what is pickled and never loaded is rare."""

LONGEST_WAIT = 1e6
"""Most seconds that one system call is asked to wait, however long the lease (inf, too): poll takes no more than 2e6."""

PEER_DEADLINE = 10.0
"""Seconds that a peer has to send its token, and then to close."""

IDLE = 0.1
"""Seconds that the thread and its socket stay after the last deposit has gone; starting them takes 0.3 ms."""

LINGER = 5.0
"""Seconds that a child process that is exiting waits for its results to be fetched."""

MAX_PEERS = 256
"""Most peers at one time: each costs a descriptor.  Beyond it the oldest one has to go."""

ACCEPT_PAUSE = 0.05
"""Seconds without accepting after the descriptor limit was met there."""

ACCEPT_BATCH = 64
"""Most peers accepted in a row, so that a crowd at the door does not keep those inside waiting."""

KEEPS_IN_FLIGHT = sys.platform.startswith("linux")
"""Whether descriptors in flight survive their sender's close; macOS may drop them, so there the receiver closes first."""

TOKEN_SIZE = 16
"""Bytes: 128 bits, which nobody guesses."""

GIVEN, BUNDLED, UNKNOWN, DENIED, BUSY = b"G", b"B", b"U", b"D", b"R"

# One lock for the state of the broker.  A fork waits for it, so the child finds every descriptor where it belongs.
_lock = locks.make_rlock()


@attrs.define(eq=False)
class _Deposit:
    handles: HandleList
    expires: float
    bundled: int = 0
    """How many descriptors are in its only handle, a bundle; 0 where it is none."""


@attrs.define(eq=False)
class _Peer:
    sock: socket.socket
    deadline: float
    token: bytes = b""
    handles: HandleList | None = None
    """What it was given, see KEEPS_IN_FLIGHT."""

    def close(self) -> None:
        self.sock.close()
        if self.handles is not None:
            self.handles.close()


class Broker:
    """Deposits of this process, and the thread that gives them out.

    Args:
        lease: seconds that a deposit waits to be fetched.
        clock: tells the seconds that leases and deadlines are measured in.
    """

    def __init__(self, *, lease: float = DEFAULT_LEASE, clock: Callable[[], float] = time.monotonic) -> None:
        self.lease = lease
        self.clock = clock
        self.address = ""
        """The path of the socket; empty while nothing waits."""
        self._changed = threading.Condition(_lock)
        self._deposits: dict[bytes, _Deposit] = {}
        self._leases: list[tuple[float, bytes]] = []
        self._peers: dict[int, _Peer] = {}
        self._thread: threading.Thread | None = None
        self._listener: socket.socket | None = None
        self._wakers: tuple[socket.socket, ...] = ()
        self._idle_since: float | None = None
        self._accept_again = 0.0

    def __len__(self) -> int:
        return len(self._deposits)

    def __contains__(self, token: bytes) -> bool:
        return token in self._deposits

    # --- what the pickling and unpickling threads call ------------------------------------------------------------------

    def deposit(self, handles: HandleList, bundled: int = 0) -> tuple[str, bytes, int]:
        """Keep descriptors until they are fetched, taken or expired.

        Args:
            bundled: how many are in the only handle, where that is a bundle.

        Returns:
            the ticket: where, under which token, and how many.

        Raises:
            OSError: no socket could be made; the handles are the caller's still.
        """
        with _lock:
            self._start()
            token = os.urandom(TOKEN_SIZE)
            expires = self.clock() + self.lease
            self._deposits[token] = _Deposit(handles, expires, bundled)
            heapq.heappush(self._leases, (expires, token))
            self._idle_since = None
            if self._leases[0][1] == token:  # the thread may be asleep for longer
                self._wake()
            return self.address, token, bundled or len(handles)

    def take(self, token: bytes) -> HandleList | None:
        """Return what waits under ``token``, which is spent; None where there is nothing.

        Raises:
            FdLimitError: no room for what is in a bundle; it waits on.
        """
        with _lock:
            deposit = self._deposits.get(token)
            if deposit is not None and deposit.bundled and not rights.has_room_for(deposit.bundled):
                raise rights.limit_error(deposit.bundled)
            deposit = self._withdraw(token)
        if deposit is None:
            return None
        if deposit.expires <= self.clock():
            deposit.handles.close()
            return None
        if deposit.bundled:
            return rights.unbundle(deposit.handles.pop(), deposit.bundled)
        return deposit.handles

    def discard(self, token: bytes) -> None:
        """Close what waits under ``token``, if anything does."""
        deposit = self._withdraw(token)
        if deposit is not None:
            deposit.handles.close()

    def _withdraw(self, token: bytes) -> _Deposit | None:
        with _lock:
            deposit = self._deposits.pop(token, None)
            if deposit is not None:
                if not self._deposits:
                    self._wake()
                self._changed.notify_all()
            return deposit

    def expire(self) -> int:
        """Close what has waited beyond its lease; return how many deposits those were."""
        expired = []
        with _lock:
            now = self.clock()
            while self._leases and (self._leases[0][0] <= now or self._leases[0][1] not in self._deposits):
                deposit = self._deposits.pop(heapq.heappop(self._leases)[1], None)
                if deposit is not None:
                    expired.append(deposit)
            if expired:
                self._changed.notify_all()
        for deposit in expired:
            deposit.handles.close()
        return len(expired)

    def drain(self, timeout: float) -> bool:
        """Wait until every deposit has gone, at most ``timeout`` seconds; return whether they have."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._deposits, timeout)

    def close(self) -> None:
        """Stop the thread, remove the socket, and close what still waits.  The broker may be used again."""
        with _lock:
            thread = self._thread
            deposits, self._deposits = self._deposits, {}
            self._leases.clear()
            self._wake()
            self._stop()
            self._changed.notify_all()
        for deposit in deposits.values():
            deposit.handles.close()
        if thread is not None and thread is not threading.current_thread():
            thread.join(PEER_DEADLINE)

    def forget(self) -> None:
        """After a fork, in the child: close its copies and leave everything else to the parent."""
        for peer in self._peers.values():
            peer.close()
        for deposit in self._deposits.values():
            deposit.handles.close()
        for sock in (*self._wakers, *([self._listener] if self._listener else ())):
            sock.close()

    # --- the thread ---------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is not None:
            return
        _at_exit.register()
        self._listener, self.address = listen()
        try:
            self._wakers = socketpair_of(socket.SOCK_STREAM)
            for sock in self._wakers:
                sock.setblocking(False)
            self._thread = threading.Thread(target=self._serve, name="fdshare broker", daemon=True)
            self._thread.start()
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        """Close everything but the deposits; whoever calls holds the lock."""
        self._thread = None
        for peer in self._peers.values():
            peer.close()
        self._peers.clear()
        address, self.address = self.address, ""
        wakers, self._wakers = self._wakers, ()
        listener, self._listener = self._listener, None
        if listener is not None:
            dispose_listener(listener, alone=False)
            remove(address)
        for sock in wakers:
            sock.close()

    def _wake(self) -> None:
        if self._wakers and threading.current_thread() is not self._thread:
            try:
                self._wakers[1].send(b"!")
            except OSError:  # full: it is awake
                pass

    def _serve(self) -> None:
        poll = select.poll()
        timeout: float | None = 0.0
        events: list[tuple[int, int]] = []
        with _lock:
            me = threading.current_thread()
            if self._thread is not me or self._listener is None:
                return
            poll.register(self._listener, select.POLLIN)
            poll.register(self._wakers[0], select.POLLIN)
        try:
            while timeout is not None:
                events = poll.poll(min(timeout, LONGEST_WAIT) * 1000)
                with _lock:
                    if self._thread is not me:
                        return
                    for fd, _ in events:
                        self._on_event(poll, fd)
                    self.expire()
                    timeout = self._tidy(poll)
                    if timeout is None:  # under the same lock, or a deposit of this moment would be stranded
                        self._stop()
        finally:
            with _lock:
                if self._thread is me:
                    self._stop()

    def _on_event(self, poll: select.poll, fd: int) -> None:
        assert self._listener is not None
        if fd == self._listener.fileno():
            self._accept(poll)
        elif fd == self._wakers[0].fileno():
            with contextlib.suppress(BlockingIOError):
                self._wakers[0].recv(4096)
        elif fd in self._peers:
            self._on_peer(poll, fd)

    def _accept(self, poll: select.poll) -> None:
        assert self._listener is not None
        try:
            for _ in range(ACCEPT_BATCH):
                sock, _ = self._listener.accept()
                fd = sock.fileno()
                self._peers[fd] = _Peer(sock, self.clock() + PEER_DEADLINE)
                sock.setblocking(False)
                poll.register(fd, select.POLLIN)
                self._on_peer(poll, fd, new=True)
                if len(self._peers) > MAX_PEERS:
                    self._drop(poll, next(iter(self._peers)))
        except BlockingIOError:
            pass
        except OSError:  # no descriptor left, most likely: they wait in the backlog
            self._accept_again = self.clock() + ACCEPT_PAUSE
            poll.unregister(self._listener)

    def _on_peer(self, poll: select.poll, fd: int, *, new: bool = False) -> None:
        peer = self._peers[fd]
        try:
            if new and not same_user(peer_credentials(peer.sock)):
                with contextlib.suppress(OSError):
                    peer.sock.send(DENIED)
                dispose(peer.sock, alone=True)
                done = True
            else:
                done = self._attend(peer)
        except BlockingIOError:  # new, and its token is on the way still
            done = False
        except OSError:  # it has gone
            done = True
        if done:
            self._drop(poll, fd)

    def _attend(self, peer: _Peer) -> bool:
        """Go on with a peer from which there is something to read; return whether it is done with."""
        data = peer.sock.recv(TOKEN_SIZE - len(peer.token) + 1)
        if not data or len(peer.token) + len(data) > TOKEN_SIZE:
            return True
        peer.token += data
        if len(peer.token) == TOKEN_SIZE:
            self._answer(peer)
            return KEEPS_IN_FLIGHT
        return False

    def _answer(self, peer: _Peer) -> None:
        deposit = self._deposits.get(peer.token)
        if deposit is None or deposit.expires <= self.clock():
            peer.sock.send(UNKNOWN)
            return
        try:
            if deposit.bundled:
                rights.send_fds(peer.sock, [BUNDLED], deposit.handles)
            elif len(deposit.handles) <= MAX_FDS_PER_PACKET:
                rights.send_fds(peer.sock, [GIVEN], deposit.handles)
            else:
                with rights.make_bundle([handle.fileno() for handle in deposit.handles]) as bundle:
                    rights.send_fds(peer.sock, [BUNDLED], [bundle])
        except OSError as error:
            if error.errno not in (errno.ETOOMANYREFS, errno.EMFILE, errno.ENFILE):
                raise
            peer.sock.send(BUSY)  # and they stay
            return
        del self._deposits[peer.token]
        peer.handles = deposit.handles
        self._changed.notify_all()

    def _drop(self, poll: select.poll, fd: int) -> None:
        poll.unregister(fd)  # by its number: the socket may be closed
        self._peers.pop(fd).close()

    def _tidy(self, poll: select.poll) -> float | None:
        """Drop late peers; return how many seconds to sleep at most, None to end."""
        now = self.clock()
        for fd in [fd for fd, peer in self._peers.items() if peer.deadline <= now]:
            self._drop(poll, fd)
        deadlines = [peer.deadline for peer in self._peers.values()]
        if self._leases:
            deadlines.append(self._leases[0][0])
        if self._accept_again:
            if self._accept_again <= now:
                self._accept_again = 0.0
                assert self._listener is not None
                poll.register(self._listener, select.POLLIN)
            else:
                deadlines.append(self._accept_again)
        if not self._deposits and not self._peers:
            self._idle_since = now if self._idle_since is None else self._idle_since
            if now >= self._idle_since + IDLE:
                return None
            deadlines.append(self._idle_since + IDLE)
        else:
            self._idle_since = None
        return max(0.0, min(deadlines, default=now + IDLE) - now)


# --- the broker of this process -----------------------------------------------------------------------------------------------


def current() -> Broker:
    """Return the broker of this process."""
    return _broker


def get_lease() -> float:
    """Return how many seconds a deposit waits to be fetched."""
    return _broker.lease


def set_lease(seconds: float) -> None:
    """Set how long deposits from now on wait to be fetched.

    Raises:
        ValueError: not above zero.
    """
    if not seconds > 0:
        raise ValueError(f"a lease of {seconds} seconds")
    _broker.lease = seconds


def shutdown() -> None:
    """Close everything that waits, stop the thread and remove its socket; a later pickle starts anew."""
    _broker.close()


class _AtExit:
    """Closes the broker when the process ends, after multiprocessing has joined the children, which may still fetch."""

    def __init__(self) -> None:
        self.registered = False
        self.finalizer: Any = None

    def register(self) -> None:
        if not self.registered:
            self.registered = True
            atexit.register(self)
        self._finalize_late()

    def _finalize_late(self) -> bool:
        """Let multiprocessing, where it is in use, call us last; a forked child of it never runs atexit (before 3.13)."""
        util = sys.modules.get("multiprocessing.util")
        if util is None or util._exiting:
            return False
        if self.finalizer is None or not self.finalizer.still_active():
            self.finalizer = util.Finalize(None, self.finish, exitpriority=-100)
        return True

    def __call__(self) -> None:
        if not self._finalize_late():
            self.finish()

    def finish(self) -> None:
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.current_process()._parent_pid is not None:
            _broker.drain(LINGER)
        _broker.close()


_broker = Broker()
_at_exit = _AtExit()


def _after_fork() -> None:
    global _lock, _broker, _at_exit
    old, _lock = _broker, locks.make_rlock()
    _broker = Broker(lease=old.lease)
    atexit.unregister(_at_exit)
    _at_exit = _AtExit()
    old.forget()


os.register_at_fork(
    before=lambda: _lock.acquire(), after_in_parent=lambda: _lock.release(), after_in_child=_after_fork
)
