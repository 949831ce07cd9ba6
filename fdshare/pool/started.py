"""A worker's process, as its parent holds it: what tells of its end, how it ended, and signals that reach no other process.

==================== =============================== ============================================
started by           tells of its end                tells how it ended
==================== =============================== ============================================
fork, spawn          a pidfd                         waitid(2) by that; whoever has waited for it
the fork server      a pipe from there               a number in it
the template process a pidfd from there              the template process, which waits for it
==================== =============================== ============================================

Each is one descriptor.  Where descriptors are scarce there is none, and the manager looks now and then: ``sentinel`` is None.
Where the system has no pidfds, the end of a pipe tells that the process holds.

Children are not ours alone: with SIGCHLD ignored the kernel takes them, a handler may call ``os.wait()``, a library may wait for
everything.  Then the pidfd still tells of the end, and only how it ended may stay unknown.
"""

from __future__ import annotations

import _thread
import errno
import os
import signal
import time
from functools import partial
from typing import Any, cast

from fdshare import processes, system
from fdshare.handle import FdHandle, own

__all__ = ["Started", "start"]

UNKNOWN = 255
"""What multiprocessing says of an end that it does not know."""

LOOK_SECONDS = 0.01
"""How often an end is looked for that is to come any moment and that no descriptor tells of."""

_allowing = _thread.allocate_lock()


def _renew() -> None:
    global _allowing
    _allowing = _thread.allocate_lock()


os.register_at_fork(after_in_child=_renew)


class Started:
    """A process that multiprocessing has started here."""

    def __init__(self, process: Any, *, scarce: bool) -> None:
        self.process = process
        """What others look at."""
        self.pid: int = process.pid
        self._death: FdHandle | None = None
        self._birth: bytes | None = None
        self._served = getattr(process._popen, "method", None) == "forkserver"
        if (
            self._served
        ):  # it is no child of ours, and its number may be another's as soon as the server has waited for it
            self._birth = birth_of(self.pid)
        elif system.HAVE_PIDFD and not scarce:
            try:
                self._death = own(os.pidfd_open, self.pid)
            except ProcessLookupError:
                scarce = True  # it has ended, and somebody has waited for it
        self._keep_one(scarce)
        # Others have the process object: what it sends must not reach another process either.
        process._popen._send_signal = self._signal_unless_over

    def _keep_one(self, scarce: bool) -> None:
        """Of the descriptors that multiprocessing holds close all that are not needed, two of two or one."""
        from multiprocessing import util

        close_fds: Any = cast(Any, util).close_fds  # not in typeshed
        popen = self.process._popen
        finalizer: Any = getattr(popen, "finalizer", None)
        self._sentinel: int | None = None if scarce else popen.sentinel
        if self._death is not None:
            self._sentinel = self._death.fileno()
        if getattr(finalizer, "_callback", None) is not close_fds:
            return  # of a library of its own
        fds = set(finalizer._args)
        kept = fds & {self._sentinel}
        # In this order, so that an interrupt closes nothing twice.
        finalizer.cancel()
        popen.finalizer = util.Finalize(popen, cast(Any, close_fds), tuple(kept)) if kept else None
        for fd in fds - kept:
            os.close(fd)
        # Processes are looked at by their sentinels, so it is not to be a number that another file gets.
        popen.sentinel = self.process._sentinel = -1 if self._sentinel is None else self._sentinel
        if self._sentinel is None:
            popen.wait = self._wait_by_looking
            if self._served:
                popen.poll = partial(self._wait_by_looking, 0)

    def _wait_by_looking(self, timeout: float | None = None, flag: int = 0) -> int | None:
        """Do what multiprocessing does by the sentinel, where there is none; ``flag`` is its own word for no time at all."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.has_ended():
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(LOOK_SECONDS)
        popen = self.process._popen
        if popen.returncode is None:
            code = self._taken()
            popen.returncode = UNKNOWN if code is None else code
        return popen.returncode  # type: ignore[no-any-return]

    @property
    def sentinel(self) -> int | None:
        """Borrow the descriptor that becomes readable when it has ended; None without one."""
        return self._sentinel

    def filenos(self) -> list[int]:
        """Borrow all of its descriptors."""
        return [] if self._sentinel is None else [self._sentinel]

    def has_ended(self) -> bool:
        """Whether it has."""
        popen = self.process._popen
        if popen.returncode is not None:
            return True
        if self._served:
            return _has_ended(self.pid, self._birth)
        if hasattr(os, "waitid"):
            try:
                return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:
                return True
        return self.process.exitcode is not None

    def reap(self) -> int | None:
        """Wait for its end, which has come or will any moment; return its exit code, None where nobody knows."""
        popen = self.process._popen
        code = popen.returncode
        if code is None and not (self._served and self._sentinel is not None):
            code = self._taken()
            if code is None:
                code = popen.returncode  # somebody else has asked this very object
            popen.returncode = UNKNOWN if code is None else code
        self.process.join()
        if self._served:
            code = None if self._sentinel is None else self.process.exitcode
        return code  # type: ignore[no-any-return]

    def _taken(self) -> int | None:
        """Take its exit code from the kernel."""
        if self._served:
            while not self.has_ended():
                time.sleep(LOOK_SECONDS)
            return None
        try:
            if self._death is None or not hasattr(os, "P_PIDFD"):
                return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            # Not by its number, which may be that of another child by now.
            end = os.waitid(os.P_PIDFD, self._death.fileno(), os.WEXITED)
        except ChildProcessError:
            return self._told()
        assert end is not None
        return end.si_status if end.si_code == os.CLD_EXITED else -end.si_status

    def _told(self) -> int | None:
        """Ask for the exit code of a process that somebody else has waited for: newer kernels tell."""
        return None if self._death is None else processes._ask(self._death.fileno())

    def signal(self, number: int) -> None:
        """Send it a signal, and never to another process that has its number by now.

        Raises:
            PermissionError: it has changed its user.
        """
        try:
            if self._death is not None and not self._death.closed:
                signal.pidfd_send_signal(self._death.fileno(), number)
            elif not self.has_ended():
                self._signal_by_number(number)
        except ProcessLookupError:
            pass

    def _signal_unless_over(self, number: int) -> None:
        """Do what multiprocessing does by the bare number, for ``terminate`` and ``kill`` of its process objects."""
        if self.process._popen.returncode is None:
            self.signal(number)

    def _signal_by_number(self, number: int) -> None:
        if system.HAVE_PIDFD:
            try:
                handle = own(os.pidfd_open, self.pid)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
            else:
                with handle:
                    if not self.has_ended():  # asked again: the number was its own when it was opened
                        signal.pidfd_send_signal(handle.fileno(), number)
                return
        os.kill(self.pid, number)

    def close(self) -> None:
        """Let go of its descriptor; it has ended, or will."""
        popen = self.process._popen
        self._sentinel = None
        if self._death is not None:
            self._death.close()
        if popen.finalizer is not None:
            popen.finalizer()
        vars(popen).pop("_send_signal", None)  # which keeps this object alive, as this keeps that
        popen.sentinel = self.process._sentinel = -1


def start(process: Any, *, forks: bool) -> None:
    """Start a process of multiprocessing, in a daemonic process too, whose end takes this one along.

    Args:
        forks: whether it is forked, with whatever handlers are set here: SIGTERM is held back until the worker has its own.

    Raises:
        OSError, pickle.PicklingError, …: it could not be started.
    """
    from multiprocessing.process import current_process

    config: dict[str, Any] = current_process()._config  # type: ignore[attr-defined]
    begin = partial(_start_in_daemon, process, config) if config.get("daemon") else process.start
    if not forks:
        begin()
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
        begin()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_in_daemon(process: Any, config: dict[str, Any]) -> None:
    """Start it though this process is daemonic, which multiprocessing refuses lest children are left behind."""
    with _allowing:
        daemon = config.pop("daemon")
        try:
            process.start()
        finally:
            config["daemon"] = daemon


def birth_of(pid: int) -> bytes | None:
    """Return when a process was started, which tells it from others with its number; None where /proc does not tell, or no more.

    Raises:
        OSError: there is no descriptor to ask with.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError, PermissionError):
        return None
    return None if fields[0] in (b"Z", b"X") else fields[19]


def _has_ended(pid: int, birth: bytes | None) -> bool:
    """Whether a process that is no child of ours has."""
    try:
        if birth is not None:
            return birth_of(pid) != birth
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's; or there is no descriptor to ask with
        pass
    return False
