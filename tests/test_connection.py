"""A Channel where ``multiprocessing.connection.Connection`` is expected: the same calls, results and errors."""

from __future__ import annotations

import array
import errno
import math
import multiprocessing
import os
import pickle
import selectors
import socket
import threading
from multiprocessing import connection as mp_connection
from typing import TYPE_CHECKING, Any

import pytest
from helpers import TRANSPORTS, running, wait_until

from fdshare import Channel, ChannelSet, ClosedError, FdHandle, PeerClosedError, Pipe
from fdshare.testing import numbered_handle, read_number

if TYPE_CHECKING:
    from collections.abc import Iterator

Pair = tuple[Channel, Channel]

mp_wait: Any = mp_connection.wait  # its stubs take a Connection and nothing that serves as one


@pytest.fixture(params=[*TRANSPORTS, "multiprocessing"])
def kind(request: pytest.FixtureRequest) -> str:
    """A transport; or the standard library's own Pipe, which holds these tests to what it really does."""
    return str(request.param)


def make_pipe(kind: str, duplex: bool = True) -> Any:
    return multiprocessing.Pipe(duplex) if kind == "multiprocessing" else Pipe(duplex, transport=kind)


@pytest.fixture
def pair(kind: str) -> Iterator[Pair]:
    """Two connected ends."""
    a, b = make_pipe(kind)
    with a, b:
        yield a, b


@pytest.fixture
def one_way(kind: str) -> Iterator[Pair]:
    """A read-only and a write-only end."""
    reader, writer = make_pipe(kind, duplex=False)
    with reader, writer:
        yield reader, writer


@pytest.fixture(params=TRANSPORTS)
def channels(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two connected channels, for what a Connection has not."""
    a, b = Pipe(transport=request.param)
    with a, b:
        yield a, b


def test_channel_has_all_that_a_connection_has() -> None:
    public = {name for name in dir(mp_connection.Connection) if not name.startswith("_")}
    assert public <= set(dir(Channel))


# objects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "obj", [None, [1, 2.25, None], "text", b"bytes", {"k": (1, {2})}, range(3), ValueError("v")], ids=repr
)
def test_object_arrives_equal(pair: Pair, obj: object) -> None:
    a, b = pair
    assert a.send(obj) is None  # type: ignore[func-returns-value]
    assert repr(b.recv()) == repr(obj)


def test_objects_arrive_in_order_both_ways(pair: Pair) -> None:
    a, b = pair
    for i in range(10):
        a.send(i)
        b.send(-i)
    assert [b.recv() for _ in range(10)] == list(range(10))
    assert [a.recv() for _ in range(10)] == [-i for i in range(10)]


def test_unpicklable_object_is_refused_by_the_sender(pair: Pair) -> None:
    a, b = pair
    with pytest.raises(TypeError):
        a.send(threading.Lock())
    assert not b.poll()
    a.send("still here")
    assert b.recv() == "still here"


def test_bytes_and_objects_are_the_same_messages(pair: Pair) -> None:
    """An object is its pickle: code that mixes the calls finds what it finds with a Connection."""
    a, b = pair
    a.send({"k": 1})
    assert pickle.loads(b.recv_bytes()) == {"k": 1}
    a.send_bytes(pickle.dumps({"k": 2}))
    assert b.recv() == {"k": 2}


# send_bytes ------------------------------------------------------------------------------------------------

LETTERS = b"abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), LETTERS),
        ((0,), LETTERS),
        ((5,), LETTERS[5:]),
        ((7, 8), LETTERS[7:15]),
        ((0, 26), LETTERS),
        ((0, 0), b""),
        ((26,), b""),
        ((26, 0), b""),
        ((5, None), LETTERS[5:]),
    ],
)
def test_part_of_a_buffer_is_sent(pair: Pair, arguments: tuple[Any, ...], expected: bytes) -> None:
    a, b = pair
    assert a.send_bytes(LETTERS, *arguments) is None  # type: ignore[func-returns-value]
    received = b.recv_bytes()
    assert received == expected
    assert type(received) is bytes


@pytest.mark.parametrize("arguments", [(27,), (22, 5), (26, 1), (-1,), (4, -1), (-1, 2), (0, 27)])
def test_part_outside_the_buffer_is_a_value_error(pair: Pair, arguments: tuple[int, ...]) -> None:
    a, b = pair
    with pytest.raises(ValueError, match=r"offset|size"):
        a.send_bytes(LETTERS, *arguments)
    assert not b.poll()


@pytest.mark.parametrize(
    "buffer",
    [
        bytearray(b"12345678"),
        memoryview(b"12345678"),
        array.array("i", [1, 2]),
        memoryview(array.array("d", [1.5])),
    ],
    ids=lambda buffer: type(buffer).__name__,
)
def test_any_buffer_is_sent_as_its_bytes(pair: Pair, buffer: Any) -> None:
    """Offset and size count bytes, whatever the items are."""
    a, b = pair
    a.send_bytes(buffer)
    assert b.recv_bytes() == bytes(memoryview(buffer).cast("B"))
    a.send_bytes(buffer, 3, 4)
    assert b.recv_bytes() == bytes(memoryview(buffer).cast("B"))[3:7]


@pytest.mark.parametrize("what", ["text", 5, None, [1, 2]])
def test_what_is_no_buffer_is_a_type_error(pair: Pair, what: Any) -> None:
    a, b = pair
    with pytest.raises(TypeError):
        a.send_bytes(what)
    assert not b.poll()


def test_byte_messages_are_never_merged_or_cut(pair: Pair) -> None:
    a, b = pair
    messages = [b"hello", b"", b"a", b"b", b"", b"bye", b"", b"lop"]
    for message in messages:
        a.send_bytes(message)
    assert [b.recv_bytes() for _ in messages] == messages
    assert not b.poll()


def test_a_large_byte_message_arrives_whole(pair: Pair) -> None:
    a, b = pair
    message = bytes(range(256)) * (4 << 12)  # 4 MiB, beyond every buffer in between
    sender = threading.Thread(target=a.send_bytes, args=(message,))
    sender.start()
    assert b.recv_bytes() == message
    sender.join()


# recv_bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maxlength", [5, 6, 1 << 20, None])
def test_message_within_maxlength_is_received(pair: Pair, maxlength: int | None) -> None:
    a, b = pair
    a.send_bytes(b"12345")
    assert b.recv_bytes(maxlength) == b"12345"


@pytest.mark.parametrize("maxlength", [0, 4])
def test_message_over_maxlength_is_an_os_error_and_the_end_of_receiving(pair: Pair, maxlength: int) -> None:
    a, b = pair
    a.send_bytes(b"12345")
    a.send_bytes(b"next")
    with pytest.raises(OSError, match="length"):
        b.recv_bytes(maxlength)
    with pytest.raises(OSError):  # noqa: PT011 -- "handle is closed" or "write-only", as the case may be
        b.recv_bytes()


def test_message_over_maxlength_closes_a_read_only_end(one_way: Pair) -> None:
    reader, writer = one_way
    writer.send_bytes(b"12345")
    with pytest.raises(OSError, match="length"):
        reader.recv_bytes(4)
    assert reader.closed


def test_negative_maxlength_is_a_value_error_and_takes_nothing(pair: Pair) -> None:
    a, b = pair
    a.send_bytes(b"12345")
    with pytest.raises(ValueError, match="negative"):
        b.recv_bytes(-1)
    assert b.recv_bytes() == b"12345"


# recv_bytes_into -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_message_is_received_into_a_buffer(pair: Pair, offset: int) -> None:
    a, b = pair
    buffer = bytearray(b".........." * 1)
    a.send_bytes(b"12345")
    assert b.recv_bytes_into(buffer, offset) == 5
    assert buffer == b"." * offset + b"12345" + b"." * (5 - offset)


def test_message_is_received_into_an_array(pair: Pair) -> None:
    """The offset counts bytes, not items."""
    a, b = pair
    numbers = array.array("i", range(4))
    buffer = array.array("i", [-1] * 10)
    a.send_bytes(numbers)
    assert b.recv_bytes_into(buffer, 3 * buffer.itemsize) == 4 * numbers.itemsize
    assert buffer.tolist() == [-1, -1, -1, 0, 1, 2, 3, -1, -1, -1]


def test_empty_message_is_received_into_a_buffer(pair: Pair) -> None:
    a, b = pair
    a.send_bytes(b"")
    buffer = bytearray(b"abc")
    assert b.recv_bytes_into(buffer, 3) == 0
    assert buffer == b"abc"


def test_a_read_only_buffer_is_refused_before_a_message_is_taken(channels: Pair) -> None:
    a, b = channels
    a.send_bytes(b"kept")
    with pytest.raises(TypeError, match="read-only"):
        b.recv_bytes_into(b"....")
    assert b.recv_bytes() == b"kept"


@pytest.mark.parametrize(("size", "offset"), [(4, 0), (10, 6), (0, 0)])
def test_buffer_too_short_gives_the_message_with_the_error(pair: Pair, size: int, offset: int) -> None:
    a, b = pair
    buffer = bytearray(b"." * size)
    a.send_bytes(b"12345")
    a.send_bytes(b"next")
    with pytest.raises(multiprocessing.BufferTooShort) as caught:
        b.recv_bytes_into(buffer, offset)
    assert caught.value.args == (b"12345",)
    assert buffer == b"." * size
    assert b.recv_bytes() == b"next"  # the connection goes on


@pytest.mark.parametrize("offset", [-1, 11])
def test_offset_outside_the_buffer_is_a_value_error_and_takes_nothing(pair: Pair, offset: int) -> None:
    a, b = pair
    a.send_bytes(b"12345")
    with pytest.raises(ValueError, match="offset"):
        b.recv_bytes_into(bytearray(10), offset)
    assert b.recv_bytes() == b"12345"


def test_read_only_buffer_is_a_type_error(pair: Pair) -> None:
    a, b = pair
    a.send_bytes(b"12345")
    with pytest.raises(TypeError):
        b.recv_bytes_into(b"0123456789")


# poll ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [(), (0,), (-1,), (0.01,), (0.0,)])
def test_poll_says_no_when_nothing_came(pair: Pair, timeout: tuple[float, ...]) -> None:
    assert pair[0].poll(*timeout) is False


@pytest.mark.parametrize("timeout", [(), (0,), (-1,), (10,), (None,)])
def test_poll_says_yes_until_the_message_is_taken(pair: Pair, timeout: tuple[Any, ...]) -> None:
    a, b = pair
    a.send_bytes(b"")  # an empty message is a message
    assert b.poll(*timeout) is True
    assert b.poll(*timeout) is True
    assert b.recv_bytes() == b""
    assert b.poll() is False


def test_poll_says_yes_at_the_end(pair: Pair) -> None:
    a, b = pair
    a.send("last")
    a.close()
    assert b.poll(10)
    assert b.recv() == "last"
    assert b.poll(10)
    with pytest.raises(EOFError):
        b.recv()


def test_poll_wakes_for_a_message_of_another_thread(pair: Pair) -> None:
    a, b = pair
    polling = threading.Event()

    def send_later() -> None:
        polling.wait(20)
        a.send("now")

    sender = threading.Thread(target=send_later)
    sender.start()
    polling.set()
    assert b.poll(20)
    assert b.recv() == "now"
    sender.join()


# ends ------------------------------------------------------------------------------------------------------


def test_duplex_ends_read_and_write(pair: Pair) -> None:
    for end in pair:
        assert (end.readable, end.writable, end.closed) == (True, True, False)


def test_one_way_ends_do_one_thing(one_way: Pair) -> None:
    reader, writer = one_way
    assert (reader.readable, reader.writable) == (True, False)
    assert (writer.readable, writer.writable) == (False, True)
    writer.send(1)
    assert reader.poll(10)
    assert reader.recv() == 1
    for wrong in (
        lambda: reader.send(2),
        lambda: reader.send_bytes(b"2"),
        lambda: writer.recv(),
        lambda: writer.recv_bytes(),
        lambda: writer.recv_bytes_into(bytearray(1)),
        lambda: writer.poll(),
    ):
        with pytest.raises(OSError, match="-only"):
            wrong()
    writer.send(3)
    assert reader.recv() == 3


def test_closed_end_does_nothing_more(pair: Pair) -> None:
    a, _ = pair
    a.close()
    a.close()
    assert a.closed
    for wrong in (
        lambda: a.send(1),
        lambda: a.send_bytes(b"1"),
        lambda: a.recv(),
        lambda: a.recv_bytes(),
        lambda: a.recv_bytes_into(bytearray(1)),
        lambda: a.poll(),
        lambda: a.fileno(),
    ):
        with pytest.raises(OSError, match="closed"):
            wrong()


def test_peer_that_closed_is_the_end_of_file(pair: Pair) -> None:
    a, b = pair
    a.send(1)
    a.close()
    assert b.recv() == 1
    for _ in range(2):
        with pytest.raises(EOFError):
            b.recv()
        with pytest.raises(EOFError):
            b.recv_bytes()
        with pytest.raises(EOFError):
            b.recv_bytes_into(bytearray(1))
    assert not b.closed


def test_sending_to_a_peer_that_closed_is_a_broken_pipe(pair: Pair) -> None:
    a, b = pair
    b.close()
    with pytest.raises(BrokenPipeError):
        a.send_bytes(b"1")
    with pytest.raises(BrokenPipeError) as caught:
        a.send(1)
    assert caught.value.errno == errno.EPIPE
    # A cycle through the traceback would leave the buffer of a Connection's message to the collector, which complains.
    del caught


def test_leaving_the_block_closes(kind: str) -> None:
    a, b = make_pipe(kind)
    with a as entered, b:
        assert entered is a
        a.send(1729)
        assert b.recv() == 1729
    assert a.closed
    assert b.closed


def test_fileno_is_an_open_descriptor_that_is_not_inherited(pair: Pair) -> None:
    for end in pair:
        fd = end.fileno()
        assert type(fd) is int
        os.fstat(fd)
        assert not os.get_inheritable(fd)


def test_both_families_of_errors_at_once(channels: Pair) -> None:
    a, b = channels
    a.close()
    with pytest.raises(ClosedError):
        a.recv()
    with pytest.raises(PeerClosedError):
        b.recv()
    with pytest.raises(PeerClosedError):
        b.send(1)


# waiting for several ----------------------------------------------------------------------------------------


def test_wait_of_multiprocessing_finds_the_ready_ones(kind: str) -> None:
    pairs = [make_pipe(kind) for _ in range(4)]
    near = [a for a, _ in pairs]
    here, there = socket.socketpair()
    with here, there:
        assert mp_wait([*near, here], 0) == []
        pairs[1][1].send("x")
        pairs[3][1].close()
        there.send(b"x")
        assert set(mp_wait([*near, here], 20)) == {near[1], near[3], here}
    for pair in pairs:
        for end in pair:
            end.close()


def test_wait_of_multiprocessing_in_vain(pair: Pair) -> None:
    assert mp_wait([*pair], 0.01) == []
    assert mp_wait([*pair], -1) == []


@pytest.mark.parametrize("descriptors", [0, 1])
def test_every_message_of_a_burst_shows_to_wait_and_selectors(channels: Pair, descriptors: int) -> None:
    """Nothing is read ahead into where only the channel sees it, and nothing shows that is no message."""
    a, b = channels
    count = 5
    for i in range(count):
        handles = [numbered_handle(i) for _ in range(descriptors)]
        a.send((i, handles))
        for handle in handles:
            handle.close()
    with selectors.DefaultSelector() as selector:
        selector.register(b, selectors.EVENT_READ)
        for i in range(count):
            assert mp_wait([b], 0) == [b]
            assert [key.fileobj for key, _ in selector.select(0)] == [b]
            assert b.poll()
            assert mp_wait([b], 0) == [b]  # poll has not taken it away
            number, received = b.recv()
            assert number == i
            assert [read_number(handle) for handle in received] == [i] * descriptors
        assert mp_wait([b], 0) == []
        assert selector.select(0) == []
        a.close()
        assert mp_wait([b], 20) == [b]
        assert selector.select(20)


def test_selectors_tell_when_there_is_room_to_send(channels: Pair) -> None:
    a, b = channels
    with selectors.DefaultSelector() as selector:
        selector.register(a, selectors.EVENT_WRITE)
        assert selector.select(0)
        sent = 0
        while selector.select(0):
            a.send_bytes(bytes(8192), timeout=20)
            sent += 1
        for _ in range(sent):
            b.recv_bytes()
        assert selector.select(20)


# what a Connection has not -----------------------------------------------------------------------------------


def test_descriptors_travel_beside_the_calls_of_a_connection(channels: Pair) -> None:
    a, b = channels
    with numbered_handle(5) as handle:
        a.send_bytes(b"before")
        a.send(handle)
        a.send_bytes(b"after")
    assert b.recv_bytes() == b"before"
    received = b.recv()
    assert type(received) is FdHandle
    assert read_number(received) == 5
    assert b.recv_bytes() == b"after"


def test_descriptors_of_a_message_taken_as_bytes_are_closed(channels: Pair) -> None:
    """recv_bytes on a message with descriptors gives its bytes; nothing stays open."""
    a, b = channels
    with numbered_handle(5) as handle:
        a.send([handle])
    assert type(b.recv_bytes()) is bytes
    assert not b.poll()


@pytest.mark.parametrize("seconds", [1e10, math.inf])
def test_a_set_waits_for_longer_than_the_system_counts(channels: Pair, seconds: float) -> None:
    with ChannelSet(channels) as many:
        channels[0].send("there")
        assert many.select(seconds) == [channels[1]]


def test_a_set_tells_what_is_in_it(channels: Pair) -> None:
    with ChannelSet(channels) as many:
        assert set(many) == set(channels)
        many.discard(channels[0])
        assert list(many) == [channels[1]]
    assert list(many) == []


def test_a_set_that_is_closed_says_so(channels: Pair) -> None:
    many = ChannelSet(channels)
    assert repr(many) == "<ChannelSet of 2>"
    many.close()
    assert repr(many) == "<ChannelSet closed>"
    for call in (many.select, lambda: many.select(0), lambda: many.add(channels[0])):
        with pytest.raises(ClosedError, match="ChannelSet"):
            call()
    many.discard(channels[0])


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_close_of_a_set_ends_the_wait_of_another_thread(channels: Pair, timeout: float | None) -> None:
    many = ChannelSet(channels)

    def select() -> None:
        with pytest.raises(ClosedError, match="ChannelSet"):
            many.select(timeout)

    with running(select):
        wait_until(lambda: many._wakers)
        many.close()


def test_a_set_is_waited_for_by_several_threads(channels: Pair) -> None:
    a, b = channels
    found: list[Any] = []
    with ChannelSet([a]) as many:
        with running(*[lambda: found.append(many.select(60)) for _ in range(3)]):
            wait_until(lambda: len(many._wakers) == 3)
            b.send("to be left there")
        assert found == [[a]] * 3
        assert list(many) == [a]
