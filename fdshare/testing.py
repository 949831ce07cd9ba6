"""Leak checks and the channel conformance suite: what fdshare tests itself with, offered to its users.

It imports pytest, so nothing else of fdshare imports it; ``fdshare.leaks`` has what needs no pytest.

- ``with leak_check(): ...`` fails when the block ends with more descriptors, threads or child processes than it began
  with.  The pytest fixture ``fdshare_no_leaks`` does so for a test and for the processes that the test starts.  Both wait
  a bounded time for stragglers, by looking again, never by sleeping blindly.
- ``checked_child(target, *args)`` runs a function in a child process under the same check and returns its value.
- ``ChannelConformance`` is a class of tests over a pair of channels, whose far end is served in the same process and in
  forked, forkserver and spawned ones::

      class TestMyChannels(ChannelConformance):
          def make_pair(self):
              return my_pipe()

  The suite touches channels only through an :class:`Endpoint` (send, recv, close), so another way of waiting runs the
  same tests by naming its own endpoint class: :class:`AsyncEndpoint` is asyncio's.
"""

from __future__ import annotations

import contextlib
import os
import resource
import struct
import threading
import zlib
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from fdshare import system
from fdshare.errors import DecodeError, NotSendableError, PeerClosedError
from fdshare.handle import FdHandle, move, own_pipe
from fdshare.leaks import Child, ChildError, LeakCheck, LeakError, check_processes, checked_child, leak_check

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Coroutine, Iterator

    from fdshare.channel import Channel

__all__ = [
    "PLACES",
    "AsyncEndpoint",
    "ChannelConformance",
    "Child",
    "ChildError",
    "Endpoint",
    "LeakCheck",
    "LeakError",
    "check_processes",
    "checked_child",
    "fdshare_no_leaks",
    "leak_check",
    "numbered_handle",
    "pattern",
    "read_number",
    "room_for",
    "serve",
]

PLACES = ("same_process", "fork", "forkserver", "spawn")  # where the far end of a pair is served


@pytest.fixture
def fdshare_no_leaks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fail a test that ends with more descriptors, threads or child processes than it began with, children included.

    Make it the first fixture of a test, best by an autouse fixture in ``conftest.py`` that asks for it.  A test that failed is
    not checked: its traceback keeps its frames alive, and what they held.
    """
    failed_before = request.session.testsfailed
    prefix = str(tmp_path_factory.getbasetemp() / "leaks")
    with check_processes(prefix) as reports:
        # A descriptor of an earlier, failed test may still close during this one.
        check = LeakCheck(closed=not failed_before)
        yield
        if request.session.testsfailed == failed_before:
            found = check.leaks() + reports()
            if found:
                pytest.fail(str(LeakError(found, f"{request.node.nodeid} leaked")), pytrace=False)
        else:
            reports()


# the conformance suite ---------------------------------------------------------------------------------------------


class Endpoint:
    """One end of a channel as the suite uses it: the thin adapter to override for another way of waiting.

    It is made in the process that uses it, from a Channel; ``timeout`` is in seconds.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel

    def send(self, obj: object, timeout: float | None = 30.0) -> None:
        """Send one message."""
        self.channel.send(obj, timeout=timeout)

    def recv(self, timeout: float | None = 30.0) -> Any:
        """Receive one message."""
        return self.channel.recv(timeout=timeout)

    def close(self) -> None:
        """Close this end."""
        self.channel.close()


class AsyncEndpoint(Endpoint):
    """The same for an AsyncChannel: its event loop runs in a thread, and each call waits for a task of that.

    ``loop_factory`` makes the event loop; None for asyncio's own.
    """

    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None

    def __init__(self, channel: Channel) -> None:
        import asyncio

        from fdshare.aio import AsyncChannel

        self.channel: Any = AsyncChannel(channel)
        self._runner = asyncio.Runner(loop_factory=self.loop_factory)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="conformance event loop")
        self._thread.start()

    def _call(self, make: Callable[[], Coroutine[Any, Any, Any]], timeout: float | None) -> Any:
        import asyncio

        async def call() -> Any:
            async with asyncio.timeout(timeout):
                return await make()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def send(self, obj: object, timeout: float | None = 30.0) -> None:
        """Send one message."""
        self._call(lambda: self.channel.send(obj), timeout)

    def recv(self, timeout: float | None = 30.0) -> Any:
        """Receive one message."""
        return self._call(self.channel.recv, timeout)

    def close(self) -> None:
        """Close this end, and end the thread."""
        if not self.channel.closed:
            self._call(self.channel.aclose, None)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._runner.close()


def numbered_handle(number: int) -> FdHandle:
    """Return a handle to a descriptor from which :func:`read_number` reads ``number`` back, once."""
    content = struct.pack("=Q", number + 1)
    if system.HAVE_EVENTFD:
        return FdHandle(os.eventfd(number + 1, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
    reader, writer = own_pipe()
    with writer:
        os.write(writer.fileno(), content)
    return reader


def read_number(handle: FdHandle) -> int:
    """Consume a numbered handle: return its number and close it."""
    with handle:
        return int(struct.unpack("=Q", os.read(handle.fileno(), 8))[0]) - 1


def pattern(size: int, seed: int = 0) -> bytes:
    """Return ``size`` bytes whose period is a prime, so that a shifted or repeated page shows."""
    period = bytes((i * 7 + seed) % 251 for i in range(251))
    return (period * (size // len(period) + 1))[:size]


@contextlib.contextmanager
def room_for(descriptors: int) -> Iterator[None]:
    """Raise the soft limit RLIMIT_NOFILE to ``descriptors`` in the block, or skip the test where it cannot be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < descriptors:
        pytest.skip(f"needs {descriptors} descriptors, the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, descriptors), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class _Refuses:
    """Pickles well and raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (_refuse, ())


def _refuse() -> None:
    raise ValueError("this object refuses to be rebuilt")


def _send_numbered(end: Endpoint, count: int) -> None:
    handles = [numbered_handle(i) for i in range(count)]
    try:
        end.send(handles)
    finally:
        for handle in handles:
            handle.close()


def _answer(end: Endpoint, verb: str, arg: Any) -> None:
    if verb == "echo":
        end.send(move(arg))
    elif verb == "numbers":  # handles came: which?
        end.send([read_number(handle) for handle in arg])
    elif verb == "make":
        _send_numbered(end, arg)
    elif verb == "digest":
        end.send((type(arg).__name__, len(arg), zlib.crc32(arg)))
    elif verb == "exchange":  # both sides send a large message first, then read
        end.send(pattern(arg, seed=1))
        end.send(zlib.crc32(end.recv()))
    elif verb == "collect":
        end.send([(sender, i, read_number(handle)) for sender, i, handle in (end.recv() for _ in range(arg))])
    else:
        raise ValueError(f"the suite has no verb {verb!r}")


def serve(end: Endpoint) -> None:
    """Answer the suite's requests on one end until the other closes, then close this one."""
    try:
        while True:
            try:
                verb, arg = end.recv(timeout=None)
            except DecodeError as error:
                end.send(("undecodable", type(error).__name__))
                continue
            _answer(end, verb, arg)
            verb = arg = None  # nothing of one request is kept while waiting for the next
    except PeerClosedError:
        pass
    finally:
        end.close()


def _serve_in_child(endpoint: type[Endpoint], channel: Channel) -> None:
    serve(endpoint(channel))


class ChannelConformance:
    """What any pair of channels must do; subclass it as ``Test...`` and give ``make_pair``.

    ``endpoint`` is the adapter class, ``places`` (from PLACES) where the far end is served.
    """

    endpoint: ClassVar[type[Endpoint]] = Endpoint
    places: ClassVar[tuple[str, ...]] = PLACES

    def make_pair(self) -> tuple[Channel, Channel]:
        """Return two new channels that are connected to each other, which can be given to a process being started."""
        raise NotImplementedError

    @contextlib.contextmanager
    def served(self, place: str) -> Iterator[Endpoint]:
        """Serve one end of a new pair in ``place``, give the other."""
        a, b = self.make_pair()
        near = self.endpoint(a)
        with contextlib.ExitStack() as stack:
            if place == "same_process":
                thread = threading.Thread(target=serve, args=(self.endpoint(b),), name="conformance peer")
                thread.start()
                stack.callback(thread.join, 30.0)
            else:
                try:
                    child = Child(_serve_in_child, self.endpoint, b, method=place, unwanted=(near.channel,))
                except BaseException:
                    near.close()
                    raise
                finally:
                    b.close()
                stack.callback(child.result, 30.0)
            stack.callback(near.close)  # runs first, and ends the peer
            yield near

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test of the suite in each of ``places``."""
        if "near" in metafunc.fixturenames:
            metafunc.parametrize("near", self.places, indirect=True)
        elif metafunc.function.__name__ == "test_message_with_5000_descriptors":
            metafunc.parametrize("place", self.places)

    @pytest.fixture
    def near(self, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
        """One end of a pair; the other is served in each place in turn."""
        with self.served(request.param) as end:
            yield end

    def test_messages_with_descriptors(self, near: Endpoint) -> None:
        """All of them arrive, in their order, in both directions."""
        for count in (0, 1, 252, 253, 254, 1000):
            with room_for(4 * count + 100):
                self.check_descriptors(near, count)

    def check_descriptors(self, near: Endpoint, count: int) -> None:
        """Send ``count`` descriptors in one message and receive as many."""
        handles = [numbered_handle(i) for i in range(count)]
        near.send(("numbers", handles))
        for handle in handles:
            handle.close()
        assert near.recv() == list(range(count))
        near.send(("make", count))
        assert [read_number(handle) for handle in near.recv()] == list(range(count))

    def test_message_with_5000_descriptors(self, place: str) -> None:
        """As many as no system call takes at once; the limit is raised before the peer starts, which inherits it."""
        with room_for(16_000), self.served(place) as near:
            self.check_descriptors(near, 5000)

    def test_empty_messages(self, near: Endpoint) -> None:
        """Nothing in it, and yet a message."""
        empty: list[Any] = [None, b"", "", (), [], {}]
        for message in empty:
            near.send(("echo", message))
            received = near.recv()
            assert received == message
            assert type(received) is type(message)

    def test_messages_of_many_sizes(self, near: Endpoint) -> None:
        """Whole, whatever its size: bytes, and a bytearray which stays one."""
        for size in (1, 1000, 65_535, 65_536, 65_537, 250_000, 1 << 20, 16 << 20):
            content = pattern(size)
            digest = zlib.crc32(content)
            near.send(("digest", content))
            assert near.recv() == ("bytes", size, digest)
            near.send(("digest", bytearray(content)))
            assert near.recv() == ("bytearray", size, digest)

    def test_large_messages_both_ways_at_once(self, near: Endpoint) -> None:
        """Both sides send before either reads."""
        for size in (60_000, 300_000, 16 << 20):
            content = pattern(size)
            near.send(("exchange", size))
            near.send(content)
            assert zlib.crc32(near.recv()) == zlib.crc32(pattern(size, seed=1))
            assert near.recv() == zlib.crc32(content)

    @pytest.mark.parametrize("threads", [1, 4])
    def test_threads_sending_on_one_end(self, near: Endpoint, threads: int, each: int = 100) -> None:
        """Messages never interleave, each thread's stay in order, each keeps its own descriptor."""
        near.send(("collect", threads * each))

        def send_all(sender: int) -> None:
            for i in range(each):
                with numbered_handle(1000 * sender + i) as handle:
                    near.send((sender, i, handle))

        workers = [threading.Thread(target=send_all, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        collected = near.recv()
        for worker in workers:
            worker.join(30.0)
        assert [number for _, _, number in collected] == [1000 * sender + i for sender, i, _ in collected]
        for n in range(threads):
            assert [i for sender, i, _ in collected if sender == n] == list(range(each))

    def test_same_descriptor_twice_is_one_object(self, near: Endpoint) -> None:
        """Identity is kept, so it is also one descriptor."""
        with numbered_handle(7) as handle:
            near.send(("echo", [handle, {"again": handle}]))
            first, rest = near.recv()
        assert rest["again"] is first
        assert read_number(first) == 7

    def test_unsendable_message_leaves_the_channel_usable(self, near: Endpoint) -> None:
        """It is refused before anything was sent."""
        with numbered_handle(1) as handle, pytest.raises(NotSendableError):
            near.send(("echo", [handle, threading.Lock()]))
        near.send(("echo", "still here"))
        assert near.recv() == "still here"

    def test_undecodable_message_leaves_the_channel_usable(self, near: Endpoint) -> None:
        """The receiver gets a DecodeError, and then the next message."""
        with numbered_handle(1) as handle:
            near.send(("echo", [handle, _Refuses()]))
        assert near.recv() == ("undecodable", "DecodeError")
        near.send(("echo", "still here"))
        assert near.recv() == "still here"

    def test_timeout_loses_nothing(self, near: Endpoint) -> None:
        """A recv that ran out of time, and then the message."""
        with pytest.raises(TimeoutError):
            near.recv(timeout=0.01)
        self.check_descriptors(near, 3)

    def test_closed_peer(self) -> None:
        """What was sent before the close arrives, then the end is told, to readers and writers."""
        a, b = map(self.endpoint, self.make_pair())
        with contextlib.closing(a):
            b.send("last words")
            b.close()
            assert a.recv() == "last words"
            for _ in range(2):
                with pytest.raises(PeerClosedError):
                    a.recv()
            with pytest.raises(PeerClosedError):
                a.send("too late")
