"""``ProcessHandle``: a process as a descriptor (a pidfd), which keeps meaning that one process when its number is used again.

Who may know how a process ended, in the order in which it is asked:

==================== ============================== ========================================================
source               until                          for whom
==================== ============================== ========================================================
``waitid``           its parent has waited for it   the parent; WNOWAIT leaves that to whoever started it
``PIDFD_GET_INFO``   the last pidfd is closed       every holder, from Linux 6.15, once the parent has waited
``/proc/PID/stat``   its parent has waited for it   the same user, and root
what is remembered   the handle is closed           whoever was told once, and to whom that one sends the handle
==================== ============================== ========================================================
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
from typing import Any, Protocol

from fdshare import system
from fdshare.closing import Closing
from fdshare.errors import DecodeError
from fdshare.handle import kind_of, own
from fdshare.travelling import Kept, Readable, keep, travels

__all__ = ["HasPid", "ProcessHandle"]

HAVE_PIDFD = system.HAVE_PIDFD
"""Whether there are pidfds; read at each use, so that tests can switch it off."""

HAVE_EXIT_INFO = True
"""Whether the kernel may be asked by PIDFD_GET_INFO; read at each use, so that tests can switch it off."""

_INFO = struct.Struct(
    "=QQ11Ii"
)  # of linux/pidfd.h: mask, cgroup, eleven numbers of processes and users, exit code
_GET_INFO = 3 << 30 | _INFO.size << 16 | 0xFF << 8 | 11  # _IOWR(0xFF, 11, struct pidfd_info)
_INFO_EXIT = 1 << 3

_STAT_STATE, _STAT_EXIT_CODE = 0, 49  # proc_pid_stat(5), counted from behind the name


_LARGEST_PID = (1 << 31) - 1
"""What a system call takes, and far more than Linux gives."""


class HasPid(Protocol):
    """Anything that stands for a process: ``subprocess.Popen``, ``multiprocessing.Process``, asyncio's."""

    @property
    def pid(self) -> int | None:
        """Its number; None before the start."""
        ...


class ProcessHandle(Readable, Closing):
    """One process, to wait for and to send signals to, from any process that has the handle.

    It is readable from the end of the process on: ``fdshare.wait``, selectors and event loops take it.  It borrows: who started
    the process still has to wait for it, and gets its status.  Dropping the handle does nothing to the process.

    Args:
        pid: a number, or an object with one, such as ``subprocess.Popen`` or ``multiprocessing.Process``.  A bare number must be
            of a process that cannot have ended and made room for another: a child that was not waited for, or oneself.

    Raises:
        ProcessLookupError: there is no such process, or the object has seen its end, so that the number may be another's.
        ValueError: it was not started.
        TypeError: no pid.
        NotImplementedError: the system has no process descriptors (Linux has, from 5.3).
    """

    __slots__ = ("_exitcode", "_pid")

    def __init__(self, pid: int | HasPid) -> None:
        if not HAVE_PIDFD:
            raise NotImplementedError("this system has no process descriptors: Linux has, from 5.3")
        number = pid if isinstance(pid, int) else getattr(pid, "pid", pid)
        if number is None:
            raise ValueError(f"{pid!r} was not started")
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"a pid or an object with one, not {type(pid).__name__}")
        if number < 1:
            raise ValueError(f"no process has the number {number}")
        if number > _LARGEST_PID:
            raise ProcessLookupError(errno.ESRCH, f"no process has the number {number}")
        handle = keep(own(os.pidfd_open, number))
        # Looked at afterwards: as long as the object had not waited for it, the number was its process's.
        if not isinstance(pid, int) and _seen_end(pid):
            handle.close()
            raise ProcessLookupError(errno.ESRCH, f"{pid!r} has ended; its number may be another process's")
        self._adopt(handle, number, None)

    def _adopt(self, handle: Kept, pid: int, exitcode: int | None) -> None:
        self._handles = (handle,)
        self._pid = pid
        self._exitcode = exitcode

    def _options(self) -> tuple[Any, ...]:
        return self._pid, self.exitcode

    @property
    def pid(self) -> int:
        """The number of the process, as whoever made the handle saw it; to be shown, not to be signalled."""
        return self._pid

    @property
    def alive(self) -> bool:
        """Whether the process runs; not from its end on, whether or not somebody has waited for it.

        Raises:
            ClosedError: this handle was closed.
        """
        return not self._ended(0)

    @property
    def exitcode(self) -> int | None:
        """Its exit status, or minus the signal that killed it; None while it runs, and where the system does not tell.

        Raises:
            ClosedError: this handle was closed before it was known.
        """
        if self._exitcode is None and self._ended(0):
            self._exitcode = _ask(self._handles[0].fileno())
        return self._exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the process has ended; return :attr:`exitcode`.

        Whoever started it must still wait for it (``os.waitpid``, ``Popen.wait``, ``Process.join``): this leaves its status
        where it is, and may be called by many, and again.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: it still runs.
            ClosedError: this handle was closed.
        """
        if not self._ended(timeout):
            raise TimeoutError(f"process {self._pid} runs after {timeout} s")
        return self.exitcode

    def send_signal(self, signum: int) -> None:
        """Send a signal to this process, and to no other that may have its number by now.

        Raises:
            ProcessLookupError: it has ended, and somebody has waited for it.
            PermissionError: it is another user's.
            ClosedError: this handle was closed.
        """
        self._check_open()
        signal.pidfd_send_signal(self._handles[0].fileno(), signum)

    def terminate(self) -> None:
        """Send SIGTERM; harmless where the process has ended.

        Raises:
            PermissionError, ClosedError: as for :meth:`send_signal`.
        """
        self._send_if_there(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL; harmless where the process has ended.

        Raises:
            PermissionError, ClosedError: as for :meth:`send_signal`.
        """
        self._send_if_there(signal.SIGKILL)

    def _send_if_there(self, signum: int) -> None:
        try:
            self.send_signal(signum)
        except ProcessLookupError:
            pass

    def _ended(self, timeout: float | None) -> bool:
        if self._exitcode is not None:
            return True
        return self._is_readable(timeout)

    def __repr__(self) -> str:
        if self.closed:
            return f"<ProcessHandle closed pid={self._pid}>"
        return f"<ProcessHandle pid={self._pid} {'runs' if self.alive else f'exitcode={self.exitcode}'}>"


def _seen_end(process: Any) -> bool:
    """Whether the object has waited for its process; what it has, it keeps."""
    return any(getattr(process, name, None) is not None for name in ("returncode", "exitcode"))


def _ask(fd: int) -> int | None:
    """Return how a process that has ended did."""
    try:
        found = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
    except ChildProcessError:
        pass
    status = _ask_kernel(fd)
    if status is None:
        status = _ask_proc(fd)
    if status is None:  # waited for meanwhile
        status = _ask_kernel(fd)
    return None if status is None else os.waitstatus_to_exitcode(status)


def _ask_kernel(fd: int) -> int | None:
    if not HAVE_EXIT_INFO:
        return None
    info = bytearray(_INFO.size)
    _INFO.pack_into(info, 0, _INFO_EXIT, *[0] * 13)
    try:
        fcntl.ioctl(fd, _GET_INFO, info)
    except OSError:  # an older kernel
        return None
    mask, *_, status = _INFO.unpack(info)
    return int(status) if mask & _INFO_EXIT else None


def _ask_proc(fd: int) -> int | None:
    try:
        with open(f"/proc/self/fdinfo/{fd}") as info:
            pid = next(int(line[4:]) for line in info if line.startswith("Pid:"))
        if pid < 1:
            return None
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
        status = int(fields[_STAT_EXIT_CODE])
        if (
            not status
        ):  # which is also what is shown to those who may not see it; they may not see this either
            os.readlink(f"/proc/{pid}/ns/user")
        try:
            signal.pidfd_send_signal(
                fd, 0
            )  # still nobody has waited for it, so it was the one that was asked for
        except PermissionError:
            pass
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    return status if fields[_STAT_STATE] in "ZX" else None


def rebuild_process(handles: tuple[Kept, ...], pid: int, exitcode: int | None) -> ProcessHandle:
    if kind_of(handles[0].fileno()) not in ("pidfd", "unknown"):
        raise DecodeError("a process was declared, and something else has come")
    process = ProcessHandle.__new__(ProcessHandle)
    process._adopt(handles[0], pid, exitcode)
    return process


travels(ProcessHandle, rebuild_process)
