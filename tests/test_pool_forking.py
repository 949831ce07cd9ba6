"""The start of a forked pool: what its workers and strangers inherit, and a start that fails half way."""

from __future__ import annotations

import errno
import multiprocessing
import multiprocessing.context
import operator
import os
import resource
import signal
import threading
from typing import ClassVar

import pytest

from fdshare import FdHandle, ProcessPoolExecutor
from fdshare.pool import template
from tests import pool_tasks as tasks
from tests.helpers import wait_until

TIMEOUT = 30

needs_proc = pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="needs /proc to see what a process has open"
)


@needs_proc
def test_forked_workers_inherit_nothing_of_the_pool() -> None:
    own = tasks.open_links()
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as executor:
        for future in [executor.submit(tasks.open_links) for _ in range(40)]:
            links = future.result(TIMEOUT)
            for link in own:
                if link in links:
                    links.remove(link)
            assert sum(link.startswith("socket:") for link in links) == 1  # its own inbox
            assert not [link for link in links if link.startswith(("anon_inode:", "pidfd:", "/memfd:"))]


class CountedProcess(multiprocessing.context.ForkProcess):
    left = 2

    def start(self) -> None:
        if not CountedProcess.left:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        CountedProcess.left -= 1
        super().start()


def test_forking_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.context.ForkContext()
    monkeypatch.setattr(context, "Process", CountedProcess)
    with ProcessPoolExecutor(3, context) as executor:
        with pytest.raises(BlockingIOError, match="no more processes"):
            executor.submit(tasks.pid)
        assert not executor.stats().workers
        CountedProcess.left = 3
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1


def test_worker_that_cannot_be_replaced_at_once_is_replaced_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "no more processes")

    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as executor:
        executor.submit(operator.neg, 1).result(TIMEOUT)
        victim, survivor = executor._processes
        with monkeypatch.context() as patch:
            patch.setattr(template.Template, "start_worker", refuse)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: executor._pool.short)  # the pool has tried
            assert executor.submit(tasks.pid).result(TIMEOUT) == survivor
        reader, writer = map(FdHandle, os.pipe())
        with reader, writer:
            blocked = executor.submit(tasks.wait_for, reader)
            assert executor.submit(tasks.pid).result(TIMEOUT) not in (victim, survivor)
            os.write(writer.fileno(), b"!")
            blocked.result(TIMEOUT)


class WatchedProcess(multiprocessing.context.ForkProcess):
    own: ClassVar[list[str]] = []
    found: ClassVar[list[str]] = []

    def start(self) -> None:
        thread = threading.Thread(target=self.fork_a_stranger)
        thread.start()
        thread.join()
        super().start()

    def fork_a_stranger(self) -> None:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            links = [link for link in tasks.open_links() if link not in self.own]
            os.write(writer, "\n".join(links).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as told:
            self.found.append(told.read())
        os.waitpid(child, 0)


@needs_proc
def test_forking_while_another_thread_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.context.ForkContext()
    monkeypatch.setattr(context, "Process", WatchedProcess)
    monkeypatch.setattr(WatchedProcess, "own", tasks.open_links())
    with ProcessPoolExecutor(3, context) as executor:
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1
    assert len(WatchedProcess.found) == 3
    assert "socket:" not in "".join(WatchedProcess.found)


def test_forking_without_room_leaves_nothing() -> None:
    with ProcessPoolExecutor(8, multiprocessing.get_context("fork")) as executor:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = set(range(soft)) - set(map(int, os.listdir("/dev/fd")))
        resource.setrlimit(resource.RLIMIT_NOFILE, (sorted(room)[10], hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                executor.submit(tasks.pid)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert executor.submit(operator.neg, 1).result(TIMEOUT) == -1
