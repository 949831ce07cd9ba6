"""The functions that the pool's tests run in workers."""

from __future__ import annotations

import array
import multiprocessing
import os
import signal
import socket
import sys
import time
from typing import Any

import attrs

import fdshare
from fdshare import FdHandle
from fdshare.rights import open_numbers


def identity(value: Any) -> Any:
    return value


def add(one: int, other: int) -> int:
    return one + other


def fail(text: str) -> None:
    raise ValueError(text)


def pid() -> int:
    return os.getpid()


def read_all(file: Any) -> Any:
    return file.read()


def read_handle(handle: FdHandle) -> bytes:
    with handle:
        return os.read(handle.fileno(), 100)


def say(sock: socket.socket, text: bytes) -> int:
    with sock:
        sock.sendall(text)
    return len(text)


def answer(channel: fdshare.Channel) -> str:
    with channel:
        channel.send(("pong", channel.recv()))
    return "answered"


def open_file(path: str) -> Any:
    return open(path)


def open_pair() -> list[socket.socket]:
    return list(socket.socketpair())


def pipe_with(text: bytes) -> FdHandle:
    reader, writer = os.pipe()
    os.write(writer, text)
    os.close(writer)
    return FdHandle(reader)


def moved_pipe_with(text: bytes) -> Any:
    return fdshare.move(pipe_with(text))


def total(values: Any) -> float:
    return float(values.sum())


def doubled(values: Any) -> Any:
    values *= 2  # arrives writable
    return values


def crash(manner: str, _: Any = None) -> None:
    """End this process in the middle of a task."""
    import faulthandler

    faulthandler.disable()  # pytest's, inherited
    if manner == "_exit":
        os._exit(7)
    os.kill(os.getpid(), {"SIGKILL": signal.SIGKILL, "SIGSEGV": signal.SIGSEGV}[manner])
    signal.pause()


def close_everything() -> None:
    os.closerange(3, 1 << 12)


def wait_for(handle: FdHandle, value: Any = None) -> Any:
    """Block until the other end of a pipe is written to or closed."""
    with handle:
        os.read(handle.fileno(), 1)
    return value


def tell_and_wait(told: FdHandle, awaited: FdHandle) -> int:
    """Say that this task has begun, then block."""
    with told:
        os.write(told.fileno(), b"!")
    wait_for(awaited)
    return os.getpid()


def nested(method: str, depth: int) -> int:
    """Run a pool inside a task, and so on; return how deep it went."""
    if not depth:
        return 0
    with fdshare.ProcessPoolExecutor(2, multiprocessing.get_context(method)) as executor:
        assert [executor.submit(identity, i).result(30) for i in range(3)] == [0, 1, 2]
        return 1 + int(executor.submit(nested, method, depth - 1).result(30))


def run_forever(told: FdHandle) -> None:
    """Say that this task has begun, then compute without end."""
    with told:
        os.write(told.fileno(), b"!")
    while True:
        array.array("d", range(1000))


def log_run(path: str, number: int) -> int:
    """Note in a file that a task was run, atomically."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, b"%d\n" % number)
    os.close(fd)
    return number


def log_and_crash_once(path: str, number: int, handle: FdHandle) -> int:
    """Die at the first run only."""
    first = not os.path.exists(path)
    log_run(path, number)
    if first:
        os._exit(9)
    read_handle(handle)
    return number


def run_one(call: tuple[Any, ...]) -> Any:
    return call[0](*call[1:])


def many_pipes(count: int) -> Any:
    return fdshare.move([pipe_with(b"%d" % i) for i in range(count)])


def fork_and_wait(told: FdHandle, awaited: FdHandle) -> int:
    """Leave a child behind that blocks; return its pid."""
    child = os.fork()
    if not child:
        tell_and_wait(told, awaited)
        os._exit(0)
    return child


def descriptors() -> int:
    """Count the descriptors that are open in this process."""
    return len(open_numbers()) - 1


def open_links() -> list[str]:
    return [os.readlink(link.path) for link in os.scandir("/proc/self/fd") if os.path.islink(link.path)]


def fork_and_return() -> int:
    """Fork a child that returns from the task too."""
    child = os.fork()
    if not child:
        return -1
    os.waitpid(child, 0)
    return os.getpid()


def limit_descriptors(most: int) -> None:
    """Lower the limit of this process."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def large_result(size: int) -> bytes:
    return bytes(size)


def set_global(value: Any) -> None:
    global _value
    _value = value


def failing_initializer(text: str) -> None:
    raise ValueError(text)


def dying_initializer() -> None:
    os._exit(3)


def get_global() -> Any:
    return _value


_value: Any = None


@attrs.define
class Job:
    """What travels as an argument: an attrs object with a file in it."""

    name: str
    log: Any


def write_log(job: Job) -> Job:
    job.log.write(f"{job.name} was here\n")
    job.log.flush()
    return job


class RefusesToPickle:
    def __reduce__(self) -> Any:
        raise RuntimeError("not this one")


class ExitsAtPickle:
    def __reduce__(self) -> Any:
        sys.exit(5)


class RefusesToUnpickle:
    def __reduce__(self) -> Any:
        return fail, ("cannot be rebuilt",)


class ExitsAtUnpickle:
    def __reduce__(self) -> Any:
        return sys.exit, (6,)


def make(cls: type) -> Any:
    return cls()


class UnpicklableError(Exception):
    """An exception that cannot be pickled."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not this exception")


class UnloadableError(Exception):
    """An exception that cannot be unpickled."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def raise_one(cls: type[Exception], *args: Any) -> None:
    raise cls(*args)


def nap(seconds: float, value: Any = None) -> Any:
    """Take a known time: for tests of limits and of the order of long and short tasks."""
    time.sleep(seconds)
    return value


def lock_global() -> bool:
    return bool(_value.acquire(block=False))


def type_of_global() -> str:
    return str(_value.__name__)


def meet(telling: FdHandle, awaited: FdHandle) -> None:
    """Say that this task has begun, then wait until all have."""
    with telling, awaited:
        os.write(telling.fileno(), b"!")
        os.read(awaited.fileno(), 1)


def fill(executor: fdshare.ProcessPoolExecutor, count: int) -> None:
    """Have ``count`` workers run at once."""
    told, telling = map(FdHandle, os.pipe())
    awaited, release = map(FdHandle, os.pipe())
    with told, telling, awaited, release:
        futures = [executor.submit(meet, telling, awaited) for _ in range(count)]
        for _ in range(count):
            assert os.read(told.fileno(), 1) == b"!"
        os.write(release.fileno(), bytes(count))
        for future in futures:
            future.result(30)


def meet_at(path: str, count: int) -> None:
    """Wait until as many processes as ``count`` have come."""
    os.makedirs(path, exist_ok=True)
    open(f"{path}/{os.getpid()}", "x").close()
    deadline = time.monotonic() + 30
    while len(os.listdir(path)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def runs(pid: int) -> bool:
    """Whether a process is there that has not ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def parent() -> tuple[int, bool]:
    """Return the pid of the parent, as multiprocessing tells, and whether it is alive."""
    process = multiprocessing.parent_process()
    assert process is not None
    assert process.pid is not None
    return process.pid, process.is_alive()


def stop_once(parent: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
