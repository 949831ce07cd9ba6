"""The template process: a pool's parent as it was when the first workers were forked, from which later ones are forked.

By then the parent has threads, at the least the pool's own.  Whoever forks beside threads inherits their locks as they are, and
waits for ever for one that was taken.  The template has one thread, which does nothing but this::

    parent                                         template
      start: the worker's ends  ------------------>  fork --> the worker
      its pid, and what tells of its end  <--------

      reap: a pid  ------------------------------->  waitpid
      its exit code  <-----------------------------

A worker from there has the globals, the files and the initializer of the first ones, none of another worker's descriptors, and
the pool's parent for its own in ``multiprocessing.parent_process()``; for the kernel its parent is the template.
"""

from __future__ import annotations

import gc
import logging
import os
import select
import signal
import threading
from collections.abc import Callable
from typing import Any

from fdshare import locks, native, system
from fdshare.channel import Channel, Pipe
from fdshare.errors import FdShareError
from fdshare.handle import FdHandle, move, own, own_pipe
from fdshare.pool.life import LifeLine, die_with_parent
from fdshare.pool.started import LOOK_SECONDS, UNKNOWN, birth_of

__all__ = ["Template", "TemplateChild"]

logger = logging.getLogger("fdshare.pool")

ANSWER_SECONDS = 20.0
"""After this time without an answer the template is given up: a fork takes milliseconds, on a busy machine some tenths."""

_START, _REAP = "start", "reap"


class Template:
    """The parent's side of it."""

    def __init__(self, life: LifeLine, make: Callable[[Channel, FdHandle], Any]) -> None:
        """Fork it.

        Args:
            life: the pool's.
            make: makes the process object of a worker, given its ends.

        Raises:
            OSError: no descriptor or no process left.
        """
        from multiprocessing import util

        self._lock = locks.make_lock()
        self._channel, theirs = Pipe()
        self._life: FdHandle | None = None
        self._pid = -1
        reader = None
        try:
            reader, self._life = life.end()
            util._flush_std_streams()  # type: ignore[attr-defined]  # what waits there is to be written once
            parent = os.getpid()
            self._pid = os.fork()
            if not self._pid:
                self.let_go()
                _be_template(theirs, reader, make, parent)
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()
            if reader is not None:
                reader.close()

    def start_worker(self, inbox: Channel, life: FdHandle, *, scarce: bool) -> TemplateChild:
        """Have a worker forked.

        Raises:
            OSError: it could not be; or there is no template any more.
        """
        pid, death, birth = self._ask(_START, inbox, life, scarce)
        return TemplateChild(self, pid, death, birth)

    def reap(self, pid: int) -> int | None:
        """Have a worker that has ended waited for; return its exit code, None where nobody knows."""
        try:
            code: int | None = self._ask(_REAP, pid)
        except (OSError, EOFError):
            return None
        return code

    def _ask(self, *question: Any) -> Any:
        with self._lock:
            if self._channel.closed:
                raise ChildProcessError("the process that forks workers has ended")
            try:
                self._channel.send(question, timeout=ANSWER_SECONDS)
                answer = self._channel.recv(timeout=ANSWER_SECONDS)
            except (OSError, FdShareError, EOFError) as error:
                # Whatever it is, the next answer could be one to this question.
                self._end()
                raise ChildProcessError(f"the process that forks workers does not answer: {error}") from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def filenos(self) -> list[int]:
        """Borrow all of its descriptors."""
        owners = self._channel, self._life
        return [owner.fileno() for owner in owners if owner is not None and not owner.closed]

    def let_go(self) -> None:
        """In a forked child: close what is the parent's."""
        self._channel.close()
        if self._life is not None:
            self._life.close()

    def close(self) -> None:
        """End it.  The workers that it has forked have ended, or nobody will know how they do."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._channel.close()
        if self._life is not None:
            self._life.close()
        pid, self._pid = self._pid, -1
        if pid > 0:
            try:
                if native.waitpid(pid, os.WNOHANG)[0]:
                    return
                os.kill(pid, signal.SIGKILL)  # it holds nothing that needs an end
                native.waitpid(pid, 0)
            except (ChildProcessError, ProcessLookupError):
                pass  # somebody else has waited for it


class TemplateChild:
    """A worker's process, as started.py describes it, and what others look at, as ``multiprocessing.Process`` is."""

    daemon = False

    def __init__(self, template: Template, pid: int, death: FdHandle | None, birth: bytes | None) -> None:
        self.pid = self.ident = pid
        self.name = f"TemplateChild-{pid}"
        self._template = template
        self._death = death
        self._birth = birth
        self._over = False
        self._code: int | None = None
        self._reaping = locks.make_lock()

    @property
    def process(self) -> TemplateChild:
        """What others look at."""
        return self

    @property
    def sentinel(self) -> int | None:
        """Borrow the descriptor that becomes readable when it has ended; None without one."""
        return None if self._death is None or self._death.closed else self._death.fileno()

    def filenos(self) -> list[int]:
        """Borrow all of its descriptors."""
        return [] if self.sentinel is None else [self.sentinel]

    def has_ended(self) -> bool:
        """Whether it has: nobody but us has the template wait for it, so its number is its own until then."""
        if self._over:
            return True
        try:
            return birth_of(self.pid) != self._birth if self._birth is not None else not _exists(self.pid)
        except OSError:
            return False

    def reap(self) -> int | None:
        """Wait for its end, which has come or will any moment; return its exit code, None where nobody knows."""
        with self._reaping:
            if not self._over:
                self._wait(None)
                self._code = self._template.reap(self.pid)
                self._over = True
        return self._code

    def _wait(self, timeout: float | None) -> bool:
        if self._death is None or self._death.closed:
            rest = threading.Event()
            while not self.has_ended():
                rest.wait(LOOK_SECONDS)
                if timeout is not None and (timeout := timeout - LOOK_SECONDS) <= 0:
                    return False
            return True
        poll = select.poll()
        poll.register(self._death.fileno(), select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))

    def signal(self, number: int) -> None:
        """Send it a signal, and never to another process that has its number by now.

        Raises:
            PermissionError: it has changed its user.
        """
        try:
            if system.HAVE_PIDFD and self._death is not None and not self._death.closed:
                signal.pidfd_send_signal(self._death.fileno(), number)
            elif not self.has_ended():
                os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def close(self) -> None:
        """Let go of its descriptor; it has ended, or will."""
        if self._death is not None:
            self._death.close()

    # --- as multiprocessing.Process ----------------------------------------------------------------------------------

    @property
    def exitcode(self) -> int | None:
        """How it ended; None while it runs."""
        if not self._over and not self._wait(0):
            return None
        code = self.reap()
        return UNKNOWN if code is None else code

    def is_alive(self) -> bool:
        """Whether it runs."""
        return self.exitcode is None

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end, at most ``timeout`` seconds."""
        if not self._over and self._wait(timeout):
            self.reap()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.signal(signal.SIGKILL)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- in the template ---------------------------------------------------------------------------------------------------


def _be_template(
    channel: Channel,
    life: FdHandle,
    make: Callable[[Channel, FdHandle], Any],
    parent: int,
) -> None:
    """Serve until the parent is gone; never returns."""
    try:
        die_with_parent(life)
        collects = gc.isenabled()
        gc.disable()  # what is dropped here is the parent's
        restore = _set_signals()
        while True:
            kind, *arguments = channel.recv()
            try:
                if kind == _REAP:
                    answer: Any = _reap(*arguments)
                else:
                    answer = _fork(channel, make, parent, restore, collects, *arguments)
            except OSError as error:
                answer = error
            channel.send(answer)
            del answer, arguments
    except BaseException:  # noqa: BLE001 -- the parent sees that it is gone; nothing of the parent's code is to run here
        os._exit(0)


def _set_signals() -> Callable[[], None]:
    """Let no handler of the parent run here; return what gives them back to a worker."""
    signal.set_wakeup_fd(-1)
    before: dict[int, Any] = {}
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if number == signal.SIGCHLD:  # ignored, it would have exit codes lost
            wanted: Any = signal.SIG_DFL
        elif number == signal.SIGTERM:
            wanted = signal.SIG_DFL
        elif callable(handler):
            wanted = signal.SIG_IGN
        else:
            continue
        if handler is not None:
            previous = signal.signal(number, wanted)
            if number != signal.SIGTERM:  # of which a worker must not lose one by ignoring it for a moment
                before[number] = previous

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    return restore


def _reap(pid: int) -> int | None:
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def _fork(
    channel: Channel,
    make: Callable[[Channel, FdHandle], Any],
    parent: int,
    restore: Callable[[], None],
    collects: bool,
    inbox: Channel,
    life: FdHandle,
    scarce: bool,
) -> tuple[int, Any, bytes | None]:
    """Fork a worker; return what the parent is to know."""
    with inbox, life:
        reader = writer = None
        if not system.HAVE_PIDFD:
            reader, writer = own_pipe()
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))  # until the worker has its own way
        pid = os.fork()
        if not pid:
            code = 1
            try:
                channel.close()
                if reader is not None:
                    reader.close()
                restore()
                if collects:
                    gc.enable()
                process = make(inbox, life)
                process._parent_pid = parent
                code = process._bootstrap(parent_sentinel=life.fileno())
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
        if writer is not None:
            writer.close()
            return pid, move(reader), birth_of(pid)
        death = None if scarce else own(os.pidfd_open, pid)
        return pid, death and move(death), birth_of(pid)
