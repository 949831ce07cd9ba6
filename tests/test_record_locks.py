"""Record locks (fcntl, lockf; SQLite's, those of pid files) stay with a process that sends the file, in whatever way.

The kernel drops them when the process closes any descriptor of the file, a duplicate too.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import METHODS

import fdshare
from fdshare import FdHandle, Pipe, ProcessPoolExecutor, Queue, broker, handoff
from fdshare.integrations.multiprocessing import install, uninstall

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="needs a kernel that tells of locks, and lets go of what is in flight"
)

TIMEOUT = 30.0
_FLOCK = "hhqqi"


def is_locked(probe: int) -> bool:
    """Whether there is a record lock on the file of ``probe``, this process's too, which must not be closed meanwhile."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    found = fcntl.fcntl(probe, fcntl.F_OFD_GETLK, asked)
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


class Locked:
    """An open file with a lock on it."""

    def __init__(self, path: Path) -> None:
        path.write_text("content")
        self.probe = os.open(path, os.O_RDWR)
        self.file = path.open("r+")
        fcntl.lockf(self.file, fcntl.LOCK_EX)

    def holds(self) -> bool:
        return is_locked(self.probe)

    def close(self) -> None:
        self.file.close()
        os.close(self.probe)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Locked]:
    locked = Locked(tmp_path / "locked")
    assert locked.holds()
    yield locked
    assert locked.holds()
    locked.close()


@pytest.fixture
def installed() -> Iterator[None]:
    install()
    yield
    uninstall()
    broker.shutdown()


def read(file: Any) -> str:
    return os.pread(file.fileno(), 100, 0).decode()  # the offset is shared with the other workers


def read_first(files: list[Any], *_: object) -> str:
    return read(files[0])


def test_the_probe_sees_a_duplicate_closed(tmp_path: Path) -> None:
    """What must not happen: a duplicate that the program itself makes and closes takes the lock along."""
    locked = Locked(tmp_path / "locked")
    with FdHandle.dup(locked.file):
        assert locked.holds()
    assert not locked.holds()
    locked.close()


# --- channels and queues --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["seqpacket", "stream"])
@pytest.mark.parametrize("more", [0, 300])
def test_channel(locked: Locked, transport: str, more: int) -> None:
    here, there = Pipe(transport=transport)
    pid = os.fork()
    if not pid:
        os._exit(read(there.recv(timeout=TIMEOUT)[0]) != "content")
    with here, there, socket.socket() as sock:
        others = [sock.dup() for _ in range(more)]
        here.send([locked.file, *others])
        for other in others:
            other.close()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert locked.holds()


def test_message_that_nobody_takes(locked: Locked) -> None:
    here, there = Pipe()
    with here, there, Queue() as queue:
        here.send(locked.file)
        queue.put(locked.file)
    assert locked.holds()


def test_send_that_fails(locked: Locked) -> None:
    here, there = Pipe()
    with here, there, pytest.raises(fdshare.NotSendableError):
        here.send([locked.file, threading.Lock()])


# --- our pool ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_pool(locked: Locked, method: str) -> None:
    ours, theirs = socket.socketpair()
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool, ours, theirs:
        file = locked.file
        for arguments in (
            ([file],),
            ([file.buffer, ours], "with a socket"),
            ([file.buffer.raw], b"x" * (1 << 20)),
            ([file], bytearray(3 << 20)),
            ([file] + [theirs.dup() for _ in range(300)],),
        ):
            assert pool.submit(read_first, *arguments).result(TIMEOUT) == "content"
            assert locked.holds()
            for sock in arguments[0][1:]:
                if sock is not ours:
                    sock.close()


def test_pool_with_more_tasks_than_it_takes_at_once(locked: Locked) -> None:
    """They go ahead into inboxes, and from one into another."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        results = [pool.submit(read, locked.file) for _ in range(100)]
        results += [pool.options(timeout=TIMEOUT).submit(read, locked.file)]
        assert [result.result(TIMEOUT) for result in results] == ["content"] * 101
        assert list(pool.map(read, [locked.file] * 20, chunksize=5)) == ["content"] * 20
    assert locked.holds()


def read_when_told(file: Any, gate: int) -> str:
    os.read(gate, 1)
    return read(file)


def test_pool_that_cancels(locked: Locked) -> None:
    reader, writer = os.pipe()
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"))
    with FdHandle(reader) as gate, FdHandle(writer):
        first = pool.submit(read_when_told, locked.file, reader)
        others = [pool.submit(read_when_told, locked.file, reader) for _ in range(5)]
        assert others[-1].cancel()  # which is behind those that may have gone ahead
        assert locked.holds()
        os.write(writer, bytes(10))
        pool.shutdown(cancel_futures=True)
        assert first.result(TIMEOUT) == "content"
        assert gate.fileno() >= 0


def die_once(file: Any, marker: str) -> str:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return read(file)
    os.kill(os.getpid(), signal.SIGKILL)
    return ""


def test_pool_that_runs_a_task_again(locked: Locked, tmp_path: Path) -> None:
    """The same descriptors go out twice."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        result = pool.options(retries=1).submit(die_once, locked.file, str(tmp_path / "marker"))
        waiting = pool.submit(read, locked.file)  # taken back out of the inbox of the dead
        assert result.result(TIMEOUT) == "content"
        assert waiting.result(TIMEOUT) == "content"


def test_pool_that_runs_a_task_with_many_descriptors_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pool.submit(os.getpid).result(TIMEOUT)
        files = [path.open() for _ in range(300)]
        task = pool.options(retries=1).submit(die_once_with_many, files, str(tmp_path / "marker"))
        for file in files:
            file.close()
        assert task.result(TIMEOUT) == "content"


def die_once_with_many(files: list[Any], marker: str) -> str:
    return die_once(files[-1], marker)


kept: list[Any] = []


def lock_and_return(path: str) -> Any:
    kept[:] = Path(path).open("r+"), os.open(path, os.O_RDWR)  # noqa: SIM115
    fcntl.lockf(kept[0], fcntl.LOCK_EX)
    return kept[0]


def still_holds() -> bool:
    holds = is_locked(kept[1])
    kept.pop(0).close()
    os.close(kept.pop())
    return holds


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_keeps_its_lock_on_a_file_that_it_returns(method: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        with pool.submit(lock_and_return, str(path)).result(TIMEOUT) as file:
            assert read(file) == "content"
        assert pool.submit(still_holds).result(TIMEOUT)


def check_initial(file: Any) -> None:
    kept[:] = [read(file)]


def initial() -> list[Any]:
    return kept


@pytest.mark.parametrize("method", METHODS)
def test_initializer(locked: Locked, method: str) -> None:
    with ProcessPoolExecutor(
        1, multiprocessing.get_context(method), initializer=check_initial, initargs=(locked.file,)
    ) as pool:
        assert pool.submit(initial).result(TIMEOUT) == ["content"]


# --- stock pools ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("method", METHODS)
def test_stock_pool(locked: Locked, method: str) -> None:
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        for thing in (locked.file, locked.file.buffer.raw):
            assert pool.submit(read, thing).result(TIMEOUT) == "content"
            assert locked.holds()
    process = context.Process(target=read, args=(locked.file,))  # type: ignore[attr-defined]
    process.start()
    process.join(TIMEOUT)
    assert process.exitcode == 0
    process.close()


def take(queue: Any) -> None:
    with queue.get(timeout=TIMEOUT)[0] as file:
        assert read(file) == "content"


@pytest.mark.usefixtures("installed")
def test_stock_queue(locked: Locked) -> None:
    context = multiprocessing.get_context("fork")
    queue: Any = context.Queue()
    process = context.Process(target=take, args=(queue,))
    process.start()
    queue.put([locked.file])
    process.join(TIMEOUT)
    assert process.exitcode == 0
    process.close()
    queue.close()
    queue.join_thread()


def expire() -> None:
    """Let every lease run out; the broker's own thread may be the one that sees it first."""
    broker.current()._leases[:] = [(0.0, token) for _, token in broker.current()._leases]
    for deposit in broker.current()._deposits.values():
        deposit.expires = 0.0
    broker.current().expire()
    assert len(broker.current()) == 0


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("end", [expire, broker.shutdown])
def test_deposit_that_nobody_fetches(locked: Locked, end: Callable[[], object]) -> None:
    data = pickle.dumps(locked.file)
    end()
    assert locked.holds()
    with pytest.raises(fdshare.HandoffExpiredError):
        pickle.loads(data)


@pytest.mark.usefixtures("installed")
def test_deposit_of_a_pickle_that_was_given_up(locked: Locked) -> None:
    with pytest.raises(RuntimeError), handoff.attempts():
        pickle.dumps(locked.file)
        raise RuntimeError
    assert len(broker.current()) == 0


def test_deposit_is_taken_in_the_process_that_made_it(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+") as file:
        file.write("content")
        file.flush()
        with FdHandle.dup(file) as handle, pickle.loads(pickle.dumps(handle)) as copy:
            assert read(copy) == "content"
    broker.shutdown()
