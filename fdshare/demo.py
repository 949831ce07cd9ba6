"""``fdshare demo``: the main job on real input, in two scenes, each with checks that can fail.

1. A parent opens a listening TCP socket, a log and a pipe, and sends all three in one message to each of two spawned
   workers.  The workers answer real HTTP requests, write to the one log and report through the one pipe.
2. A 64 MiB array goes to another process, over fdshare and over multiprocessing, side by side.

Everything here is importable by name and does nothing by itself, as spawned processes need it.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import signal
import socket
import statistics
import tempfile
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from multiprocessing import resource_tracker
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import attrs

import fdshare
from fdshare.leaks import LeakError, leak_check

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

__all__ = ["ArrayTimes", "DemoError", "Serving", "main", "send_array", "serve_http"]

PATIENCE = 15.0
"""Seconds that a step may take before the demo gives up; all of it takes about two."""

WORKERS = 2
REQUESTS = 20
CLIENTS = 4
"""Requests under way at once: more than there are workers, so that each has something to accept."""

ARRAY_SIZE = 64 * 2**20
"""Bytes of the second scene's array."""

ROUNDS = 3
"""How often each way is timed; the median counts."""

THINGS = ("server", "log", "report")


class DemoError(Exception):
    """The demo cannot go on: a worker died, or something took too long."""


@contextmanager
def started(*processes: BaseProcess) -> Iterator[None]:
    """Start processes; whatever happens in the block, none is left behind.

    Raises:
        DemoError: one did not end by itself, or not well.
    """
    resource_tracker.ensure_running()  # its start would unblock the signal
    # Ctrl-C reaches the whole group: the parent ends what it started, and its children, born with the signal blocked,
    # do not fill the screen with tracebacks.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        try:
            for process in processes:
                process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            yield
        except (DemoError, OSError) as error:  # often only the consequence of a death
            for process in processes:
                process.join(0.2)
                if process.exitcode:
                    raise DemoError(f"{process.name} died, exit code {process.exitcode}") from error
            raise
        deadline = time.monotonic() + PATIENCE
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode != 0:
                raise DemoError(f"{process.name} ended with exit code {process.exitcode}")
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
            process.close()


# --- scene 1: one server, one log, one pipe, several processes ----------------------------------------------------


@attrs.frozen
class Account:
    """What one process had, and did."""

    name: str
    pid: int
    descriptors: dict[str, int]
    served: int = 0


@attrs.frozen
class Serving:
    """The account of the first scene."""

    requests: int
    port: int
    seconds: float
    parent: Account
    workers: list[Account]
    replies: dict[str, str]
    """What was answered, by path."""
    log: str

    def problems(self) -> list[str]:
        """Return a line for each thing that is not as it has to be."""
        found = []
        names = {worker.pid: worker.name for worker in self.workers}
        answered: Counter[int] = Counter()
        for number in range(self.requests):
            path = f"/{number}"
            said, _, by = self.replies.get(path, "").rpartition(" served by ")
            if said != path or not by.isdecimal() or int(by) not in names:
                found.append(f"the answer to {path} was {self.replies.get(path)!r}")
            else:
                answered[int(by)] += 1
        if len(self.replies) != self.requests:
            found.append(f"{self.requests} requests, {len(self.replies)} answers")
        for worker in self.workers:
            if len({worker.descriptors.get(thing) for thing in THINGS} - {None}) != len(THINGS):
                found.append(f"{worker.name} has not three descriptors but {worker.descriptors}")
            if worker.served == 0:
                found.append(f"{worker.name} served nothing")
            if worker.served != answered[worker.pid]:
                found.append(
                    f"{worker.name} reports {worker.served} served, {answered[worker.pid]} got its answer"
                )
        expected = sorted(f"{reply.rpartition(' ')[2]} {path}" for path, reply in self.replies.items())
        if sorted(self.log.splitlines()) != expected:
            found.append(
                f"the log has {len(self.log.splitlines())} lines that are not the {len(expected)} expected"
            )
        return found

    def __str__(self) -> str:
        rows = [["process", "pid", *THINGS, "requests served"]]
        for process in (self.parent, *self.workers):
            served = "" if process is self.parent else str(process.served)
            numbers = [str(process.descriptors.get(thing, "?")) for thing in THINGS]
            rows.append([process.name, str(process.pid), *numbers, served])
        return "\n".join(
            [
                *_table(rows),
                "",
                "  (in the columns of things: their descriptors' numbers in that process)",
                f"  {self.requests} HTTP requests to 127.0.0.1:{self.port} answered in {1000 * self.seconds:.0f} ms",
                f"  the log has {len(self.log.splitlines())} lines, {len(self.log.encode())} bytes",
            ]
        )


def serve(channel: fdshare.Channel) -> None:
    """A worker: accept, answer and log until the parent closes the channel; report through the pipe."""
    with leak_check(), channel:
        things = channel.recv(timeout=PATIENCE)
        with things["server"] as server, things["log"] as log, things["report"] as report:
            _tell(report, descriptors=_numbers(things))
            served = 0
            while channel not in fdshare.wait([server, channel]):
                try:
                    connection, address = server.accept()
                except BlockingIOError:
                    continue  # the other worker was faster
                with connection:
                    connection.settimeout(PATIENCE)
                    if served == 0:
                        # This client waits until the parent has heard from every worker: so each of them serves,
                        # and not only the one that starts first.
                        _tell(report, accepted=True)
                        channel.recv(timeout=PATIENCE)
                    Handler(connection, address, log)
                    served += 1
            _tell(report, served=served)


def _tell(report: IO[str], **what: object) -> None:
    # One write of less than PIPE_BUF bytes: lines of several processes do not mix.
    report.write(json.dumps({"pid": os.getpid(), **what}) + "\n")
    report.flush()


class Handler(BaseHTTPRequestHandler):
    """Answers a GET request with its path and this process's pid, and writes both to the log."""

    def __init__(self, connection: socket.socket, address: Any, log: IO[str]) -> None:
        self.log = log
        no_server: Any = None  # nothing is asked of it
        super().__init__(connection, address, no_server)

    def do_GET(self) -> None:
        self.log.write(f"{os.getpid()} {self.path}\n")
        self.log.flush()  # one write to a file in append mode: lines of several processes do not mix
        body = f"{self.path} served by {os.getpid()}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr for each request."""


class Reports:
    """What the workers say through the pipe, by pid."""

    def __init__(self, reader: IO[bytes], processes: list[BaseProcess]) -> None:
        self._reader = reader
        self._rest = b""
        self._processes = {process.pid or 0: process for process in processes}
        self.by_pid: dict[int, dict[str, Any]] = {pid: {} for pid in self._processes}

    def wait_for(self, key: str) -> None:
        """Read until every worker has said ``key``.

        Raises:
            DemoError: a worker ended before, or it took too long.
        """
        deadline = time.monotonic() + PATIENCE
        while missing := [process for pid, process in self._processes.items() if key not in self.by_pid[pid]]:
            watched = [self._reader, *(process.sentinel for process in missing)]
            ready = fdshare.wait(watched, max(0.0, deadline - time.monotonic()))
            data = self._reader.read(65536) if self._reader in ready else b""
            if not data:  # one has died, or all have closed the pipe, or the time is up
                raise DemoError(f"{missing[0].name} did not report {key!r} within {PATIENCE:g} s, or ever")
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                self.by_pid[said.pop("pid")].update(said)


def _ask(port: int, path: str) -> str:
    # No proxy of the environment: 127.0.0.1 is this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def serve_http(
    requests: int = REQUESTS, workers: int = WORKERS, target: Callable[[fdshare.Channel], None] = serve
) -> Serving:
    """Play the first scene.

    Args:
        requests: how many HTTP requests to make, at least one for each worker.
        workers: how many processes serve them.
        target: what a worker runs.

    Raises:
        DemoError: a worker died, or something took too long.
        OSError: a request failed, or the system is out of something.
    """
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fdshare-demo-"))
        clients = stack.enter_context(ThreadPoolExecutor(max(CLIENTS, workers)))
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        server.setblocking(
            False
        )  # for all who hold it: a worker that is woken in vain must not hang in accept
        log = stack.enter_context(open(Path(folder, "requests.log"), "a"))
        read_end, write_end = os.pipe()
        reader = stack.enter_context(open(read_end, "rb", buffering=0))
        report = stack.enter_context(open(write_end, "w"))
        things = {"server": server, "log": log, "report": report}
        parent = Account("parent", os.getpid(), _numbers(things))
        port = server.getsockname()[1]

        pairs = [fdshare.Pipe() for _ in range(workers)]
        for end in itertools.chain(*pairs):
            stack.enter_context(end)
        processes: list[BaseProcess] = [
            context.Process(target=target, args=(theirs,), name=f"worker {number}", daemon=True)
            for number, (_, theirs) in enumerate(pairs, 1)
        ]
        with started(*processes):
            for ours, theirs in pairs:
                theirs.close()
                ours.send(things)
            report.close()  # the workers' copies are the only ones now: once they are gone, the pipe ends
            reports = Reports(reader, processes)
            reports.wait_for("descriptors")

            start = time.monotonic()
            futures = {f"/{n}": clients.submit(_ask, port, f"/{n}") for n in range(requests)}
            reports.wait_for("accepted")
            for ours, _ in pairs:
                ours.send("go on")
            replies = {path: future.result(PATIENCE) for path, future in futures.items()}
            seconds = time.monotonic() - start

            for ours, _ in pairs:
                ours.close()
            reports.wait_for("served")
            accounts = [
                Account(process.name, process.pid or 0, said["descriptors"], said["served"])
                for process, said in zip(processes, reports.by_pid.values(), strict=True)
            ]
        return Serving(requests, port, seconds, parent, accounts, replies, Path(log.name).read_text())


def _numbers(things: dict[str, Any]) -> dict[str, int]:
    return {name: thing.fileno() for name, thing in things.items()}


# --- scene 2: a large array --------------------------------------------------------------------------------------


class _Pipe(Protocol):
    """What a Channel and a Connection of multiprocessing have in common."""

    def send(self, obj: Any) -> None: ...
    def recv(self) -> Any: ...
    def poll(self, timeout: float | None = 0.0) -> bool: ...


WAYS = ("fdshare.Pipe", "multiprocessing.Pipe")


@attrs.frozen
class ArrayTimes:
    """The account of the second scene: seconds from ``send`` to the answer, by way."""

    what: str
    size: int
    received: dict[str, float]
    """The array was there."""
    read: dict[str, float]
    """Every byte of it was read there."""
    wrong: list[str]

    def problems(self) -> list[str]:
        """Return a line for each array that did not arrive as it was sent."""
        return self.wrong

    def __str__(self) -> str:
        rows = [[f"{self.what}, from send to the answer", "received", "every byte read"]]
        for way in WAYS:
            rows.append([way, *(f"{1000 * times[way]:.1f} ms" for times in (self.received, self.read))])
        ours, theirs = WAYS
        rows.append(
            ["ratio", *(f"{times[theirs] / times[ours]:.1f}" for times in (self.received, self.read))]
        )
        return "\n".join(_table(rows))


def make_array(size: int) -> Any:
    """Return ``size`` bytes: an array of numpy where that is installed, else a bytearray."""
    try:
        import numpy
    except ImportError:
        return bytearray(bytes(range(256)) * (size // 256))
    return numpy.arange(size // 8, dtype=numpy.int64)


def receive(channel: fdshare.Channel, connection: Any) -> None:
    """The other process: answer each array with its size and, where asked to read it, its checksum."""
    with leak_check(), channel, connection:
        while True:
            for pipe in fdshare.wait([channel, connection]):
                try:
                    read, array = pipe.recv()
                except EOFError:
                    return
                pipe.send(_sum_up(array, read))
                del array


def _sum_up(array: Any, read: bool) -> tuple[str, int, int | None]:
    view = memoryview(array)
    return type(array).__name__, view.nbytes, zlib.crc32(view) if read else None


def send_array(size: int = ARRAY_SIZE, rounds: int = ROUNDS) -> ArrayTimes:
    """Play the second scene.

    Args:
        size: bytes of the array, a multiple of 256.
        rounds: how often each way is timed.

    Raises:
        DemoError: the other process died, or something took too long.
        OSError: the system is out of something.
    """
    context = multiprocessing.get_context("spawn")
    array = make_array(size)
    wrong: list[str] = []
    times: dict[tuple[str, bool], list[float]] = {}
    channel, far_channel = fdshare.Pipe()
    connection, far_connection = context.Pipe()
    with channel, far_channel, connection, far_connection:
        process = context.Process(
            target=receive, args=(far_channel, far_connection), name="receiver", daemon=True
        )
        with started(process):
            far_channel.close()
            far_connection.close()
            pipes: dict[str, _Pipe] = dict(zip(WAYS, (channel, connection), strict=True))
            for pipe in pipes.values():  # the other process is up, and has imported what it needs
                _time(pipe, make_array(256), read=True)
            for _, (way, pipe), read in itertools.product(range(rounds), pipes.items(), (False, True)):
                seconds, answer = _time(pipe, array, read)
                times.setdefault((way, read), []).append(seconds)
                if answer != _sum_up(array, read):
                    wrong.append(f"{way}: sent {_sum_up(array, read)}, arrived {answer}")
            channel.close()
            connection.close()
    received, read_too = (
        {way: statistics.median(times[way, read]) for way in WAYS} for read in (False, True)
    )
    module = type(array).__module__
    what = type(array).__name__ if module == "builtins" else f"{module}.{type(array).__name__}"
    return ArrayTimes(what, size, received, read_too, wrong)


def _time(pipe: _Pipe, array: Any, read: bool) -> tuple[float, Any]:
    start = time.perf_counter()
    pipe.send((read, array))
    if not pipe.poll(PATIENCE):
        raise DemoError(f"no answer within {PATIENCE:g} s")
    try:
        answer = pipe.recv()
    except EOFError as error:
        raise DemoError("the receiver has ended") from error
    return time.perf_counter() - start, answer


# --- both -----------------------------------------------------------------------------------------------------------


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "   ".join(
            c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def main(requests: int = REQUESTS, target: Callable[[fdshare.Channel], None] = serve) -> int:
    """Play both scenes and print the account; return 0 where all is well, 1 where something is off.

    Args: as for :func:`serve_http`.
    """
    start = time.monotonic()
    problems: list[str] = []
    version = f"{platform.python_implementation()} {platform.python_version()}"
    print(f"fdshare {fdshare.__version__} on {version}, {platform.system()} {platform.release()}")

    scenes: list[tuple[str, Callable[[], Serving | ArrayTimes]]] = [
        (
            f"A listening socket, a log and a pipe, in one message to each of {WORKERS} spawned workers",
            lambda: serve_http(requests, target=target),
        ),
        (f"{ARRAY_SIZE >> 20} MiB to another process; median of {ROUNDS}", send_array),
    ]
    for number, (title, play) in enumerate(scenes, 1):
        print(f"\n{number}. {title}\n", flush=True)
        try:
            with leak_check(closed=True):
                account = play()
        except (DemoError, LeakError, OSError, fdshare.FdShareError) as error:
            problems.append(f"{type(error).__name__}: {error}")
        else:
            print(account)
            problems += account.problems()
    print()
    for problem in problems:
        print(f"off: {problem}")
    if not problems:
        print(f"all is well, and nothing was left open, in {time.monotonic() - start:.1f} s")
    return 1 if problems else 0
