"""Channels, files, sockets and handles on their way into child processes: as arguments and as messages, by every start method."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing import connection as mp_connection
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from helpers import METHODS

from fdshare import Channel, FdHandle, NotSendableError, PeerClosedError, Pipe, move
from fdshare.testing import numbered_handle, read_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.process import BaseProcess
    from pathlib import Path

mp_wait: Any = mp_connection.wait  # its stubs take a Connection and nothing that serves as one

TIMEOUT = 30.0
"""Seconds that a child may take; spawn needs about 0.2."""


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """A start method."""
    return str(request.param)


def process(method: str, target: Callable[..., object], *args: object, **kwargs: object) -> BaseProcess:
    """Return a process of the standard library, as a user makes it."""
    context: Any = multiprocessing.get_context(method)
    made: BaseProcess = context.Process(target=target, args=args, kwargs=kwargs)
    return made


@contextmanager
def running(child: BaseProcess) -> Iterator[BaseProcess]:
    """Start a process; it must end well by itself after the block."""
    child.start()
    try:
        yield child
        child.join(TIMEOUT)
        assert child.exitcode == 0
    finally:
        if child.is_alive():
            child.kill()
            child.join()
        child.close()


@contextmanager
def child_with_channel(
    method: str, target: Callable[..., object], *args: object, transport: str | None = None
) -> Iterator[Channel]:
    """Run ``target(channel, *args)`` in a child; give the other end.  A forked child closes it first."""
    ours, theirs = Pipe(transport=transport)
    with ours, theirs:
        unwanted = ours if method == "fork" else None
        with running(process(method, first_close, target, unwanted, theirs, *args)):
            theirs.close()
            yield ours
            ours.close()  # the end of the child, where it serves until then


def first_close(target: Callable[..., object], unwanted: Channel | None, *args: object) -> None:
    if unwanted is not None:
        unwanted.close()
    target(*args)


# channels as arguments -----------------------------------------------------------------------------------------


def echo(channel: Channel) -> None:
    with channel:
        for message in channel:
            channel.send(message)


def test_channel_as_argument(method: str, transport: str) -> None:
    with child_with_channel(method, echo, transport=transport) as channel:
        for message in ("hello", None, bytes(100_000), {"k": [1, 2]}):
            channel.send(message, timeout=TIMEOUT)
            assert channel.recv(timeout=TIMEOUT) == message


def tell_what_it_is(channel: Channel) -> None:
    channel.send((channel.transport, channel.readable, channel.writable, channel.max_inflight))
    channel.send(os.get_inheritable(channel.fileno()))
    channel.close()


def test_channel_keeps_its_options(method: str, transport: str) -> None:
    reader, writer = Pipe(duplex=False, transport=transport, max_inflight=12345)
    with reader, running(process(method, tell_what_it_is, writer)):
        writer.close()
        assert reader.recv(timeout=TIMEOUT) == (transport, False, True, 12345)
        assert reader.recv(timeout=TIMEOUT) is False
        with pytest.raises(PeerClosedError):
            reader.recv(timeout=TIMEOUT)


@attrs.define
class Job:
    """Something of the user's that holds a channel."""

    name: str
    channels: dict[str, list[Channel]]


def answer_in_job(number: int, *, job: Job) -> None:
    with job.channels["results"][0] as channel:
        channel.send((job.name, number))


def test_channel_deep_inside_an_argument(method: str) -> None:
    ours, theirs = Pipe()
    with ours, running(process(method, answer_in_job, 5, job=Job("j", {"results": [theirs]}))):
        theirs.close()
        assert ours.recv(timeout=TIMEOUT) == ("j", 5)


def forward(source: Channel, sink: Channel) -> None:
    with source, sink:
        sink.send([*source.recv(), os.getpid()])


def test_chain_of_children_that_talk_to_each_other(method: str) -> None:
    """The parent only introduces them: no message goes through it."""
    (first_in, first_out), (second_in, second_out), (third_in, third_out) = (
        Pipe(duplex=False) for _ in range(3)
    )
    with (
        first_out,
        third_in,
        running(process(method, forward, first_in, second_out)) as one,
        running(process(method, forward, second_in, third_out)) as two,
    ):
        for end in (first_in, second_in, second_out, third_out):
            end.close()
        first_out.send([0])
        assert third_in.recv(timeout=TIMEOUT) == [0, one.pid, two.pid]


def test_same_channel_twice_is_one_object(method: str) -> None:
    ours, theirs = Pipe()
    with ours, running(process(method, send_whether_same, theirs, theirs)):
        theirs.close()
        assert ours.recv(timeout=TIMEOUT) is True


def send_whether_same(first: Channel, second: Channel) -> None:
    with first:
        first.send(first is second)


def test_starting_a_child_leaves_the_parent_its_own_end(method: str, transport: str) -> None:
    ours, theirs = Pipe(transport=transport)
    with ours, theirs:
        with running(process(method, send_pid_on, theirs)) as child:
            assert ours.recv(timeout=TIMEOUT) == child.pid
        theirs.send("and the parent")
        assert ours.recv(timeout=TIMEOUT) == "and the parent"


def send_pid_on(channel: Channel) -> None:
    channel.send(os.getpid())
    channel.close()


def test_one_end_for_several_children(method: str) -> None:
    """A SEQPACKET end may be shared: messages of several writers never mix."""
    ours, theirs = Pipe()
    each = 50
    children = [process(method, send_many, theirs, number, each) for number in range(3)]
    with ours, running(children[0]), running(children[1]), running(children[2]):
        theirs.close()
        received = list(ours)
    assert sorted((sender, i) for sender, i, _ in received) == [(n, i) for n in range(3) for i in range(each)]
    assert all(payload == bytes([sender]) * 1000 for sender, _, payload in received)


def send_many(channel: Channel, number: int, count: int) -> None:
    with channel:
        for i in range(count):
            channel.send((number, i, bytes([number]) * 1000))


def test_process_subclass_that_holds_a_channel(method: str) -> None:
    ours, theirs = Pipe()
    child = PROCESS_CLASSES[method](theirs)
    with ours, running(child):
        theirs.close()
        child.channel.close()
        assert ours.recv(timeout=TIMEOUT) == "from run"


class _HoldsChannel:
    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.channel = channel

    def run(self) -> None:
        with self.channel:
            self.channel.send("from run")


class SpawnHolder(_HoldsChannel, multiprocessing.get_context("spawn").Process):  # type: ignore[misc]
    pass


class ForkHolder(_HoldsChannel, multiprocessing.get_context("fork").Process):  # type: ignore[misc]
    pass


class ForkserverHolder(_HoldsChannel, multiprocessing.get_context("forkserver").Process):  # type: ignore[misc]
    pass


PROCESS_CLASSES: dict[str, Any] = {"spawn": SpawnHolder, "fork": ForkHolder, "forkserver": ForkserverHolder}

_worker_channel: list[Channel] = []


def keep_channel(channel: Channel) -> None:
    _worker_channel.append(channel)


def report(number: int) -> None:
    _worker_channel[0].send(number)


def test_channel_for_the_workers_of_a_stock_pool(method: str) -> None:
    """initargs are Process arguments underneath, so channels pass: all workers write to one end."""
    ours, theirs = Pipe()
    with ours, theirs:
        executor = concurrent.futures.ProcessPoolExecutor(
            2, multiprocessing.get_context(method), keep_channel, (theirs,)
        )
        with executor:
            list(executor.map(report, range(10)))
        assert sorted(ours.recv(timeout=TIMEOUT) for _ in range(10)) == list(range(10))


# the end of a child --------------------------------------------------------------------------------------------


def wait_for_ever(channel: Channel) -> None:
    channel.send("ready")
    channel.recv()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_child_is_the_end_of_file(method: str, transport: str, how: signal.Signals) -> None:
    ours, theirs = Pipe(transport=transport)
    child = process(method, wait_for_ever, theirs)
    child.start()
    theirs.close()
    with ours:
        assert ours.recv(timeout=TIMEOUT) == "ready"
        assert child.pid is not None
        os.kill(child.pid, how)
        with pytest.raises(EOFError):
            ours.recv(timeout=TIMEOUT)
        with pytest.raises(BrokenPipeError):
            ours.send("anybody there?")
    child.join()
    assert child.exitcode == -how
    child.close()


def test_wait_tells_a_message_from_the_end_of_a_child(method: str) -> None:
    ours, theirs = Pipe()
    with ours, running(process(method, send_then_end_on_demand, theirs)) as child:
        theirs.close()
        assert mp_wait([ours, child.sentinel], TIMEOUT) == [ours]
        assert ours.recv() == "ready"
        assert mp_wait([ours, child.sentinel], 0) == []
        ours.send("end")
        assert mp_wait([child.sentinel], TIMEOUT) == [child.sentinel]
        assert ours in mp_wait([ours, child.sentinel], TIMEOUT)


def send_then_end_on_demand(channel: Channel) -> None:
    channel.send("ready")
    channel.recv()
    channel.close()


# messages to children --------------------------------------------------------------------------------------------


def append_line(channel: Channel) -> None:
    with channel, channel.recv() as log:
        log.write(f"line of {os.getpid()}\n")
        channel.send((type(log).__name__, log.name, log.mode, log.encoding, os.getpid()))


def test_file_to_a_child(method: str, transport: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with (
        child_with_channel(method, append_line, transport=transport) as channel,
        path.open("a", encoding="latin-1") as log,
    ):
        log.write("line of the parent\n")  # still in the buffer: sending flushes it
        channel.send(log)
        kind, name, mode, encoding, pid = channel.recv(timeout=TIMEOUT)
    assert (kind, name, mode, encoding) == ("TextIOWrapper", str(path), "a", "latin-1")
    assert path.read_text().splitlines() == ["line of the parent", f"line of {pid}"]


def serve_one(channel: Channel) -> None:
    with channel, channel.recv() as listener:
        channel.send("listening")
        connection, _ = listener.accept()
        with connection:
            connection.sendall(connection.recv(100).upper())


def test_listening_socket_to_a_child(method: str, transport: str) -> None:
    with child_with_channel(method, serve_one, transport=transport) as channel:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = listener.getsockname()
            channel.send(move(listener))
            assert listener.fileno() == -1
        assert channel.recv(timeout=TIMEOUT) == "listening"
        with socket.create_connection(address, TIMEOUT) as client:
            client.sendall(b"hello")
            assert client.recv(100) == b"HELLO"


def answer_on_socket(channel: Channel) -> None:
    with channel, channel.recv() as connection:
        connection.sendall(f"{connection.gettimeout()} {connection.family.name}".encode())


def test_connected_socket_to_a_child(method: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, child_with_channel(method, answer_on_socket) as channel:
        theirs.settimeout(7.5)
        channel.send(theirs)
        ours.settimeout(TIMEOUT)
        assert ours.recv(100) == b"7.5 AF_UNIX"
        assert theirs.gettimeout() == 7.5


def double_handles(channel: Channel) -> None:
    with channel:
        numbers = [read_number(handle) for handle in channel.recv()]
        handles = [numbered_handle(2 * number) for number in numbers]
        channel.send(move(handles))
        assert all(handle.closed for handle in handles)


def test_handles_to_a_child_and_back(method: str, transport: str) -> None:
    with child_with_channel(method, double_handles, transport=transport) as channel:
        handles = [numbered_handle(number) for number in range(20)]
        channel.send(handles)
        for handle in handles:
            handle.close()
        assert [read_number(handle) for handle in channel.recv(timeout=TIMEOUT)] == [2 * n for n in range(20)]


def answer_on_new_channel(channel: Channel) -> None:
    with channel, channel.recv() as inner:
        kind = type(inner).__name__
        inner.send(kind)


@pytest.mark.parametrize("kind", ["Channel", "Connection"])
def test_channel_as_message_to_a_child(method: str, kind: str) -> None:
    ours, theirs = Pipe() if kind == "Channel" else multiprocessing.Pipe()
    with ours, theirs, child_with_channel(method, answer_on_new_channel) as channel:
        channel.send(theirs)
        theirs.close()
        assert ours.poll(TIMEOUT)
        assert ours.recv() == kind
        with pytest.raises(EOFError):
            ours.recv()


# FdHandle as an argument ------------------------------------------------------------------------------------------


def number_of(channel: Channel, *handles: FdHandle) -> None:
    with channel:
        channel.send(
            [(handle.kind, os.get_inheritable(handle.fileno()), read_number(handle)) for handle in handles]
        )


def test_handle_as_argument_is_inherited(method: str) -> None:
    ours, theirs = Pipe()
    with ours, numbered_handle(7) as first, numbered_handle(8) as second:
        kinds = [first.kind, second.kind]
        with running(process(method, number_of, theirs, first, second)):
            theirs.close()
            assert ours.recv(timeout=TIMEOUT) == [(kinds[0], False, 7), (kinds[1], False, 8)]
        assert not first.closed  # the parent's own


def look_from_a_grandchild(channel: Channel, handle: FdHandle) -> None:
    look = "import os, sys; print(*[os.path.exists(f'/dev/fd/{fd}') for fd in sys.argv[1:]])"
    command = [sys.executable, "-c", look, str(handle.fileno()), str(channel.fileno())]
    with channel, handle:
        channel.send(subprocess.check_output(command, close_fds=False, text=True).split())


def test_inherited_descriptors_go_no_further(method: str) -> None:
    """What a child was given for itself is not passed on to every program that it starts."""
    ours, theirs = Pipe()
    with ours, numbered_handle(7) as handle, running(process(method, look_from_a_grandchild, theirs, handle)):
        theirs.close()
        assert ours.recv(timeout=TIMEOUT) == ["False", "False"]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_moved_argument_is_refused_while_a_child_starts(method: str) -> None:
    with numbered_handle(7) as handle:
        child = process(method, read_number, move(handle))
        with pytest.raises(NotSendableError, match=r"move\(\)"):
            child.start()
        assert read_number(handle) == 7


def _through_forking_pickler(obj: Any) -> Any:
    return pickle.loads(ForkingPickler.dumps(obj))


@pytest.mark.parametrize("what", ["handle", "channel"])
@pytest.mark.parametrize(
    "pickler",
    [lambda obj: pickle.loads(pickle.dumps(obj)), _through_forking_pickler, copy.copy, copy.deepcopy],
    ids=["pickle", "ForkingPickler", "copy", "deepcopy"],
)
def test_pickling_outside_a_channel_duplicates(pickler: Callable[[Any], Any], what: str) -> None:
    ours, theirs = Pipe()
    with ours, theirs, numbered_handle(7) as handle:
        with pickler({"handle": handle, "channel": ours}[what]) as copied:
            if what == "channel":
                copied.send("by the copy")
                assert theirs.recv() == "by the copy"
            else:
                assert copied.fileno() != handle.fileno()
                assert read_number(copied) == 7
        ours.send("unharmed")
        assert theirs.recv() == "unharmed"


@pytest.mark.parametrize("what", ["handle", "channel"])
def test_pickling_what_is_closed_says_so(what: str) -> None:
    ours, theirs = Pipe()
    handle = numbered_handle(7)
    for thing in (ours, theirs, handle):
        thing.close()
    with pytest.raises(NotSendableError, match="closed") as caught:
        pickle.dumps({"handle": handle, "channel": ours}[what])
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, pickle.PicklingError)


def test_handle_over_a_plain_connection() -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs, numbered_handle(7) as handle:
        ours.send(handle)
        with theirs.recv() as received:
            assert read_number(received) == 7


def read_and_close(handle: FdHandle) -> int:
    with handle:
        return read_number(handle)


def test_handle_as_argument_of_a_stock_pool(method: str) -> None:
    with (
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(method)) as executor,
        numbered_handle(7) as handle,
    ):
        assert executor.submit(read_and_close, handle).result(TIMEOUT) == 7


# os.fork alone -----------------------------------------------------------------------------------------------------


def test_channel_across_a_bare_fork(transport: str) -> None:
    ours, theirs = Pipe(transport=transport)
    ours.send("before")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ours.close()
            assert theirs.recv() == "before"
            with theirs.recv() as file:
                theirs.send(file.read())
            status = 0
        finally:
            os._exit(status)
    theirs.close()
    with ours, open(__file__, encoding="utf-8") as file:
        ours.send(file)
        assert "across a bare fork" in ours.recv(timeout=TIMEOUT).replace("_", " ")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
