"""Leak checks: what a block, a test or a child process leaves behind of descriptors, threads and children.

``fdshare.testing`` offers all of it under its own name and adds what needs pytest; nothing here does, so a child process
under a check starts as fast as any other.

A check is two snapshots.  Where the second has something that the first had not, it is taken again until a deadline: a
thread that was told to stop, a child being reaped and an object in a reference cycle are no leaks.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import sys
import threading
import time
import traceback
import unittest
import warnings
from multiprocessing import connection as mp_connection
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from fdshare import recycle, rights
from fdshare.handle import kind_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

__all__ = ["Child", "ChildError", "LeakCheck", "LeakError", "check_processes", "checked_child", "leak_check"]

GRACE = (
    2.0  # seconds a straggler gets to go away: a joined thread or a reaped child needs milliseconds, CI more
)


class LeakError(AssertionError):
    """Something was still there at the end that was not there at the start; ``leaks`` (list of str) says what."""

    def __init__(self, leaks: list[str], where: str = "leaked") -> None:
        super().__init__(leaks, where)
        self.leaks = leaks
        self.where = where

    def __str__(self) -> str:
        return "\n  ".join([f"{self.where}:", *self.leaks])


@attrs.frozen
class _Snapshot:
    descriptors: dict[int, tuple[object, ...]]
    threads: frozenset[threading.Thread]
    children: frozenset[int]

    @classmethod
    def take(cls) -> _Snapshot:
        recycle.give_up()  # kept on purpose, and only as long as a channel is in use
        own_fds, own_pids = _helpers_of_multiprocessing()
        descriptors: dict[int, tuple[object, ...]] = {}
        for fd in _open_descriptors():
            with contextlib.suppress(OSError):  # the listing's own descriptor is gone by now
                status = os.fstat(fd)
                if fd not in own_fds:
                    descriptors[fd] = (status.st_dev, status.st_ino, _link(fd))
        threads = frozenset(t for t in threading.enumerate() if not isinstance(t, threading._DummyThread))
        return cls(descriptors, threads, frozenset(_child_pids() - own_pids))


def _open_descriptors() -> list[int]:
    try:
        return rights.open_numbers()
    except OSError:  # no /proc here, or no descriptor left for a listing
        return list(range(rights.descriptor_limit()))


def _link(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _descriptor_of_libffi(descriptors: dict[int, tuple[object, ...]]) -> int | None:
    """Return the first descriptor that may be the one of libffi: of a file whose code runs here, and read-only.

    For its callbacks libffi 3.5 opens the file that it was loaded from, at the first use of ctypes, and keeps that open for
    the life of the process.  Which file it is depends on how Python was built: libffi.so, or the program itself.
    """
    running: set[str] | None = None
    for fd, (_, _, link) in sorted(descriptors.items()):
        if not str(link).startswith("/"):
            continue
        if running is None:
            running = _files_of_code()
        if link in running and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return fd
    return None


def _files_of_code() -> set[str]:
    try:
        lines = Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return set()
    fields = (line.split(maxsplit=5) for line in lines)  # address, permissions, offset, device, inode, path
    return {words[5] for words in fields if len(words) == 6 and "x" in words[1]}


def _helpers_of_multiprocessing() -> tuple[set[object], set[object]]:
    """Descriptors and processes that the standard library starts once and keeps for the life of the process."""
    fds: set[object] = set()
    pids: set[object] = set()
    for module, keeper in (("resource_tracker", "_resource_tracker"), ("forkserver", "_forkserver")):
        state = getattr(sys.modules.get(f"multiprocessing.{module}"), keeper, None)
        fds |= {getattr(state, "_fd", None), getattr(state, "_forkserver_alive_fd", None)}
        pids |= {getattr(state, "_pid", None), getattr(state, "_forkserver_pid", None)}
    return fds, pids


def _child_pids() -> set[int]:
    # active_children() also reaps what has ended, and knows the children of a forkserver, which are not ours by kernel.
    pids = {process.pid for process in get_context().active_children() if process.pid}
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # that thread has ended meanwhile
            pids |= {int(word) for word in task.read_text().split()}
    return pids


def _describe_child(pid: int) -> str:
    try:
        command = (
            Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        )
        return f"child process {pid}: {command or 'ended, but nobody has waited for it'}"
    except OSError:
        return f"child process {pid}"


def _describe_descriptor(fd: int) -> str:
    try:
        return f"descriptor {fd} ({kind_of(fd)}): {_link(fd) or 'no link'}"
    except OSError:
        return f"descriptor {fd} (closed just now)"


class LeakCheck:
    """Compares descriptors, threads and child processes at two moments; a context manager.

    Args:
        grace: seconds to wait for what is about to go away; None is GRACE.
        closed: also report descriptors that were open at the start and are not any more, which is how
            closing somebody else's descriptor (a number closed twice) shows; 0, 1 and 2 always are.

    No leak is what Python and its libraries open once and keep for life: multiprocessing's resource tracker and forkserver, and
    the file of its own code that libffi 3.5 opens for ctypes.

    Leaving the block raises :class:`LeakError`, unless it is left by another exception.
    """

    def __init__(self, *, grace: float | None = None, closed: bool = False) -> None:
        self._grace = GRACE if grace is None else grace
        self._closed = closed
        self._before = _Snapshot.take()

    def leaks(self) -> list[str]:
        """Return one line for each thing leaked since the start, after at most ``grace`` seconds; empty when clean."""
        deadline = time.monotonic() + self._grace
        pause = 0.001
        found = self._compare()
        while found and time.monotonic() < deadline:
            gc.collect()  # an object in a reference cycle closes when the collector comes by
            found = self._compare()
            if found:
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        return found

    def verify(self) -> None:
        """Raise LeakError where :meth:`leaks` finds something."""
        found = self.leaks()
        if found:
            raise LeakError(found)

    def _compare(self) -> list[str]:
        before, after = self._before, _Snapshot.take()
        opened = [fd for fd, what in after.descriptors.items() if before.descriptors.get(fd) != what]
        if opened and _descriptor_of_libffi(before.descriptors) is None:
            found_one = _descriptor_of_libffi({fd: after.descriptors[fd] for fd in opened})
            opened = [fd for fd in opened if fd != found_one]
        found = [_describe_descriptor(fd) for fd in sorted(opened)]
        # Of the standard descriptors nobody but the program itself may dispose.
        gone = sorted(
            fd for fd in before.descriptors.keys() - after.descriptors.keys() if self._closed or fd <= 2
        )
        found += [f"descriptor {fd} was closed: {before.descriptors[fd][-1] or 'no link'}" for fd in gone]
        found += [
            f"thread {thread.name!r} (daemon={thread.daemon})" for thread in after.threads - before.threads
        ]
        found += [_describe_child(pid) for pid in sorted(after.children - before.children)]
        return found

    def __enter__(self) -> LeakCheck:
        self._before = _Snapshot.take()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if exc is None:  # the frames of an exception keep what they were working with
            self.verify()


def leak_check(*, grace: float | None = None, closed: bool = False) -> LeakCheck:
    """Return a :class:`LeakCheck` for a ``with`` statement."""
    return LeakCheck(grace=grace, closed=closed)


@attrs.frozen
class _CheckedTarget:
    """The target of a multiprocessing.Process under a leak check; what it finds goes into a file beside ``prefix``."""

    target: Callable[..., object]
    prefix: str
    grace: float | None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        check = LeakCheck(grace=self.grace)
        self.target(*args, **kwargs)
        # A feeder thread of multiprocessing.Queue is joined only while the process exits.
        found = [leak for leak in check.leaks() if "QueueFeederThread" not in leak]
        if found:
            Path(f"{self.prefix}.{os.getpid()}").write_text("\n".join(found))
            raise LeakError(found, f"process {os.getpid()} leaked")


@contextlib.contextmanager
def check_processes(prefix: str, *, grace: float | None = None) -> Iterator[Callable[[], list[str]]]:
    """Put every ``multiprocessing.Process`` started in the block under a leak check, by any start method.

    ``prefix`` is a path to which a child appends its pid to report.  Gives a function that returns the children's
    leaks so far.  A child that leaks also exits with code 1.
    """
    original = BaseProcess.start

    def start(self: Any) -> None:
        target = self._target
        if target is not None and target is not _child_main and not isinstance(target, _CheckedTarget):
            self._target = _CheckedTarget(target, prefix, grace)
        original(self)

    def reports() -> list[str]:
        found: list[str] = []
        for path in sorted(Path(prefix).parent.glob(f"{Path(prefix).name}.*")):
            found += [f"in process {path.suffix[1:]}: {line}" for line in path.read_text().splitlines()]
            path.unlink()
        return found

    BaseProcess.start = start  # type: ignore[method-assign]
    try:
        yield reports
    finally:
        BaseProcess.start = original  # type: ignore[method-assign]


# children ----------------------------------------------------------------------------------------------------------


class ChildError(AssertionError):
    """The function in the child raised, or the child died: the message has its traceback or its exit code."""


def _skip_exceptions() -> tuple[type[BaseException], ...]:
    """How a test says that it was skipped; pytest's own way last, where there is pytest."""
    pytest = sys.modules.get("pytest")
    return (unittest.SkipTest,) if pytest is None else (unittest.SkipTest, pytest.skip.Exception)


def _child_main(
    report: Any,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    unwanted: tuple[Any, ...],
    grace: float | None,
) -> None:
    for thing in unwanted:
        thing.close()
    ignored: list[str] = []
    warnings.simplefilter("error", ResourceWarning)  # raised in a __del__, so it ends in the hook
    sys.unraisablehook = lambda unraisable: ignored.append(f"exception ignored: {unraisable.exc_value!r}")
    check = LeakCheck(grace=grace)
    outcome: tuple[str, Any]
    try:
        value = target(*args)
    except BaseException as error:  # noqa: BLE001 -- whatever it was, the parent raises it
        skipped = isinstance(error, _skip_exceptions())
        outcome = ("skipped", str(error)) if skipped else ("failed", traceback.format_exc())
    else:
        leaks = check.leaks() + ignored
        outcome = ("leaked", leaks) if leaks else ("returned", value)
    report.send(outcome)
    report.close()


class Child:
    """A child process that runs ``target(*args)`` under a leak check; a context manager, which kills what still runs.

    Args:
        target: a function that the start method can pickle.
        args: its arguments; they may hold channels.
        method: "spawn", "forkserver" or "fork".
        unwanted: what a forked child has inherited and closes first (the other ends of its channels).
        grace: seconds for the leak check, as for LeakCheck.
    """

    def __init__(
        self,
        target: Callable[..., Any],
        *args: Any,
        method: str = "forkserver",
        unwanted: tuple[Any, ...] = (),
        grace: float | None = None,
    ) -> None:
        context = get_context(method)
        self._reports, report = context.Pipe(duplex=False)
        unwanted = (*unwanted, self._reports) if method == "fork" else ()
        arguments = (report, target, args, unwanted, grace)
        self._process: Any = context.Process(target=_child_main, args=arguments)  # type: ignore[attr-defined]
        try:
            with report, warnings.catch_warnings():
                # Python 3.12 warns of a fork beside threads; the children here touch only what fdshare makes safe.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._process.start()
        except BaseException:
            self._reports.close()
            raise
        self.pid: int = self._process.pid

    def result(self, timeout: float = 60.0) -> Any:
        """Wait at most ``timeout`` seconds for the end of the child and return what the function returned.

        Raises:
            ChildError: the function raised (a skip is raised again as a skip), or the child died, or it did not
                end in time (it is killed).
            LeakError: it ended with more descriptors, threads or children than it began with.
        """
        deadline = time.monotonic() + timeout
        with self:
            if not mp_connection.wait([self._reports, self._process.sentinel], timeout):
                raise ChildError(f"child {self.pid} did not end within {timeout} seconds")
            try:
                how, what = self._reports.recv()
            except EOFError:
                how, what = "died", None
            self._process.join(max(0.0, deadline - time.monotonic()))
            code = self._process.exitcode
        if code is None:
            raise ChildError(f"child {self.pid} ended its work and hung while exiting")
        if how == "died" or code < 0:
            raise ChildError(f"child {self.pid} died, exit code {code}")
        if how == "skipped":
            raise _skip_exceptions()[-1](what)
        if how == "failed":
            raise ChildError(f"in child {self.pid}:\n{what}")
        if how == "leaked":
            raise LeakError(what, f"child {self.pid} leaked")
        return what

    def kill(self) -> None:
        """Kill the child with SIGKILL and wait for it."""
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._reports.closed:
            if self._process.is_alive():
                self.kill()
            self._process.join()
            self._process.close()
            self._reports.close()


def checked_child(
    target: Callable[..., Any],
    *args: Any,
    method: str = "forkserver",
    timeout: float = 60.0,
    grace: float | None = None,
) -> Any:
    """Run ``target(*args)`` in a child process under a leak check; see :class:`Child` for arguments and errors."""
    return Child(target, *args, method=method, grace=grace).result(timeout)
