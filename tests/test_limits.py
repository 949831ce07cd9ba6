"""Every limit of the system, reached for real: descriptors at the receiver, at the sender, in flight, and in one message."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
from helpers import LARGE, TRANSPORTS, bare_pair, inject, requires_seqpacket, running, wait_until

import fdshare
from fdshare import (
    AccessDeniedError,
    Channel,
    DescriptorsLostError,
    FdHandle,
    FdLimitError,
    MessageTooLargeError,
    ProtocolError,
    wire,
)
from fdshare.rights import open_numbers
from fdshare.testing import Child, checked_child, numbered_handle, pattern, read_number


def set_limit(soft: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


class NoRoom:
    """A block in which this process has exactly ``free`` descriptors left under a low limit."""

    def __init__(self, free: int = 0) -> None:
        self.free = free
        self.fillers: list[int] = []
        self.before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def __enter__(self) -> NoRoom:
        set_limit(max(open_numbers()) + 64 + self.free)
        try:
            while True:
                self.fillers.append(os.dup(0))
        except OSError:
            pass
        self.make_room(self.free)
        return self

    def make_room(self, count: int) -> None:
        for _ in range(count):
            os.close(self.fillers.pop())

    def __exit__(self, *exc_info: object) -> None:
        set_limit(self.before)
        self.make_room(len(self.fillers))


def check_arrived(message: Any, count: int, size: int) -> None:
    handles, content = message
    assert [read_number(handle) for handle in handles] == list(range(count))
    assert content == pattern(size)


def send_numbered(channel: Channel, count: int, size: int) -> None:
    handles = [numbered_handle(i) for i in range(count)]
    channel.send((handles, bytearray(pattern(size))), timeout=20)
    for handle in handles:
        handle.close()


# at the receiver


def _no_room_at_the_receiver(transport: str, count: int, size: int) -> None:
    total = count + (size >= LARGE)
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        a.send("plain")
        send_numbered(a, count, size)
        a.send("after")
        with NoRoom() as full:
            assert b.recv() == "plain"
            for _ in range(3):
                with pytest.raises(FdLimitError) as caught:
                    b.recv(timeout=5)
                assert caught.value.errno == errno.EMFILE
                assert caught.value.needed == total
                assert caught.value.limit == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                assert str(total) in str(caught.value)
                assert "RLIMIT_NOFILE" in str(caught.value)
                assert isinstance(caught.value, OSError)
                assert b.poll()
            del caught
            if 1 < total < 100:  # room for all but one
                full.make_room(total - 1)
                with pytest.raises(FdLimitError):
                    b.recv(timeout=5)
                full.make_room(1)
                message = b.recv(timeout=5)  # exactly enough
                check_arrived(message, count, size)
                assert b.recv() == "after"
        if not 1 < total < 100:
            check_arrived(b.recv(timeout=5), count, size)
            assert b.recv() == "after"


@pytest.mark.parametrize(
    ("count", "size"),
    [(1, 0), (16, 0), (253, 0), (300, 0), (0, LARGE), (3, LARGE), (300, LARGE)],
    ids=[
        "1_fd",
        "16_fds",
        "full_packet",
        "bundle",
        "large_array",
        "large_array_and_fds",
        "large_array_and_bundle",
    ],
)
def test_no_room_at_the_receiver_loses_nothing(transport: str, count: int, size: int) -> None:
    """FdLimitError, the message stays queued, and arrives whole as soon as there is room."""
    checked_child(_no_room_at_the_receiver, transport, count, size)


def _some_room_for_a_bundle(transport: str) -> None:
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        send_numbered(a, 300, 0)
        with NoRoom(200), pytest.raises(FdLimitError) as caught:
            b.recv(timeout=5)
        assert caught.value.needed == 300
        del caught
        check_arrived(b.recv(timeout=5), 300, 0)


def test_bundle_that_fits_in_part_stays_queued(transport: str) -> None:
    checked_child(_some_room_for_a_bundle, transport)


def _close_with_a_queued_message(transport: str) -> None:
    a, b = fdshare.Pipe(transport=transport)
    reader, writer = os.pipe()
    with a, b:
        with FdHandle(writer) as handle, numbered_handle(1) as other:
            a.send([handle, other])
        with NoRoom(), pytest.raises(FdLimitError):
            b.recv(timeout=5)
    assert os.read(reader, 1) == b"", "the message's descriptors are still open"
    os.close(reader)


def test_message_that_did_not_fit_can_be_dropped(transport: str) -> None:
    """Closing the channel closes what was queued."""
    checked_child(_close_with_a_queued_message, transport)


def _plain_messages_at_the_limit(transport: str) -> None:
    a, b = fdshare.Pipe(transport=transport)
    with a, b, NoRoom():
        for number in range(3):
            a.send(number)
            assert b.recv() == number
        with pytest.raises(TimeoutError):
            b.recv(timeout=0.05)
        assert not b.poll(0.05)


def _plain_messages_at_the_limit_beside_threads(transport: str) -> None:
    a, b = fdshare.Pipe(transport=transport)

    def answer() -> None:
        for message in a:
            a.send(message + 1, timeout=20)

    with a, b, NoRoom(), running(answer, closing=(a, b)):
        for number in range(3):
            b.send(number, timeout=20)
            assert b.recv(timeout=20) == number + 1
        with pytest.raises(TimeoutError):
            b.recv(timeout=0.05)
        assert not b.poll(0.05)
        b.close()


@pytest.mark.parametrize(
    "target",
    [_plain_messages_at_the_limit, _plain_messages_at_the_limit_beside_threads],
    ids=["alone", "beside_threads"],
)
def test_plain_messages_need_no_room(transport: str, target: Callable[[str], None]) -> None:
    """Neither to wait for one, nor to wait for room, nor with other threads around."""
    checked_child(target, transport)


def _several_readers_at_the_limit(channel: Channel) -> str:
    """One of two processes on one end: it has no room, the other takes the message."""
    with NoRoom(), pytest.raises(FdLimitError):
        channel.recv(timeout=20)
    channel.close()
    return "no room"


@requires_seqpacket
def test_reader_without_room_leaves_the_message_to_the_other() -> None:
    a, b = fdshare.Pipe(transport="seqpacket")
    with a, b:
        send_numbered(a, 5, 0)
        with Child(_several_readers_at_the_limit, b, method="fork", unwanted=(a,)) as child:
            assert child.result() == "no room"
        check_arrived(b.recv(timeout=5), 5, 0)


# at the sender


def _no_room_at_the_sender(transport: str, count: int, size: int) -> None:
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        handles = [numbered_handle(i) for i in range(count)]
        message = (handles, bytearray(pattern(size)))
        with NoRoom():
            for _ in range(2):
                with pytest.raises(FdLimitError) as caught:
                    a.send(message, timeout=1)
                assert caught.value.errno == errno.EMFILE
                del caught
            assert not b.poll()
        a.send(message)
        for handle in handles:
            handle.close()
        del message, handles
        check_arrived(b.recv(timeout=5), count, size)
        assert not b.poll()


@pytest.mark.parametrize(("count", "size"), [(0, LARGE), (300, 0)], ids=["segment", "bundle"])
def test_no_room_at_the_sender(transport: str, count: int, size: int) -> None:
    """What needs a descriptor to be sent says that there is none, and nothing was sent."""
    checked_child(_no_room_at_the_sender, transport, count, size)


# in flight


def drop_privileges() -> None:
    """Become a user of nobody else's, so that what other tests have in flight does not count here."""
    if os.geteuid():
        pytest.skip("becoming another user needs root; this user's own limits are the system's")
    user = 50_000 + os.getpid() % 10_000
    os.setregid(user, user)
    os.setreuid(user, user)


def _too_many_in_flight(transport: str) -> None:
    drop_privileges()
    set_limit(128)
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        handles = [numbered_handle(i) for i in range(20)]
        sent = 0
        with pytest.raises(FdLimitError) as caught:
            while sent < 50:
                a.send((sent, handles), timeout=0.1)
                sent += 1
        assert caught.value.errno == errno.ETOOMANYREFS
        assert 128 <= 20 * (sent + 1) <= 200
        with pytest.raises(FdLimitError):  # without a timeout it gives up by itself
            a.send((sent, handles))
        assert not handles[0].closed
        # As soon as some were taken it goes on; a sender that waits does so by itself.
        first, taken = b.recv(timeout=5)
        assert first == 0
        for handle in taken:
            handle.close()
        a.send((sent, handles), timeout=5)

        def drain() -> None:
            for number in range(1, sent + 2):
                received, taken = b.recv(timeout=10)
                assert received == number
                for handle in taken:
                    handle.close()

        with running(drain, closing=(a, b)):
            a.send((sent + 1, handles), timeout=10)
        for handle in handles:
            handle.close()


def test_too_many_descriptors_in_flight(transport: str) -> None:
    """ETOOMANYREFS, which root never sees: nothing was sent, and it goes on when the receiver reads."""
    checked_child(_too_many_in_flight, transport, method="fork")


def _bundle_over_the_limit_in_flight(transport: str) -> None:
    drop_privileges()
    set_limit(1000)
    a, b = fdshare.Pipe(transport=transport)
    handles = [numbered_handle(0) for _ in range(300)]
    sent = 0
    with a, b:
        with pytest.raises(FdLimitError) as caught:
            while sent < 20:
                a.send(handles, timeout=0.1)
                sent += 1
        assert sent >= 3
        assert caught.value.errno == errno.ETOOMANYREFS
        del caught
        a.send("goes on")
        for _ in range(sent):
            received = b.recv(timeout=5)
            assert len(received) == 300
            for handle in received:
                handle.close()
        assert b.recv() == "goes on"
        a.send(handles, timeout=5)
        for handle in [*handles, *b.recv(timeout=5)]:
            handle.close()


def test_bundle_with_more_than_may_be_in_flight(transport: str) -> None:
    checked_child(_bundle_over_the_limit_in_flight, transport, method="fork")


def _bundle_after_dropping_privileges(transport: str) -> None:
    """After a change of user /proc/self/fd belongs to root and cannot be listed."""
    drop_privileges()
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        send_numbered(a, 300, 0)
        set_limit(100)
        with pytest.raises(FdLimitError):
            b.recv(timeout=5)
        set_limit(2000)
        check_arrived(b.recv(timeout=5), 300, 0)


def test_bundle_after_dropping_privileges(transport: str) -> None:
    checked_child(_bundle_after_dropping_privileges, transport, method="fork")


def _more_in_pipes_than_allowed(transport: str) -> None:
    drop_privileges()
    a, b = fdshare.Pipe(transport=transport)
    content = bytearray(pattern(1_000_000))
    with a, b:
        for _ in range(100):
            a.send(content, timeout=5)
        for _ in range(100):
            assert b.recv(timeout=5) == content


def test_more_in_pipes_than_a_user_may_have(transport: str) -> None:
    """64 MiB is a user's share by default (fs.pipe-user-pages-soft), root's is endless: memfds take the rest."""
    checked_child(_more_in_pipes_than_allowed, transport, method="fork")


# dropped by the kernel


def message_by_hand(
    transport: str, declared: int, sent: list[int], notice: bool = False
) -> list[tuple[bytes, list[int]]]:
    """A message of raw bytes that declares so many descriptors and brings others."""
    import pickle

    payload = pickle.dumps("by hand")
    header = wire.pack(wire.MESSAGE, 0, declared, 0, len(payload), 0, 7)
    if transport == "stream":
        return [(header, []), (payload[:1], sent), (payload[1:] + b"\x01", [])]
    return [(wire.pack(wire.NOTICE, descriptors=declared), [])] * notice + [(header + payload, sent)]


def _truncated_by_the_kernel() -> None:
    with bare_pair("seqpacket") as (channel, bare):
        handles = [numbered_handle(i) for i in range(3)]
        # Without the notice nobody looks for room first: MSG_CTRUNC.
        inject(bare, message_by_hand("seqpacket", 3, [handle.fileno() for handle in handles]))
        with NoRoom(2), pytest.raises(DescriptorsLostError) as caught:
            channel.recv(timeout=5)
        assert (caught.value.expected, caught.value.received) == (3, 2)
        del caught
        inject(bare, message_by_hand("seqpacket", 3, [handle.fileno() for handle in handles], notice=True))
        assert channel.recv(timeout=5) == "by hand"
        for handle in handles:
            handle.close()


def test_descriptors_dropped_by_the_kernel() -> None:
    """MSG_CTRUNC: the counts are told, what came is closed, the channel goes on."""
    checked_child(_truncated_by_the_kernel)


@pytest.mark.parametrize("notice", [False, True])
@pytest.mark.parametrize(("declared", "sent"), [(3, 2), (1, 0), (253, 252)])
def test_fewer_descriptors_than_declared(transport: str, declared: int, sent: int, notice: bool) -> None:
    """What a security module that drops them looks like."""
    with bare_pair(transport) as (channel, bare), numbered_handle(1) as handle:
        inject(bare, message_by_hand(transport, declared, [handle.fileno()] * sent, notice))
        with pytest.raises(DescriptorsLostError) as caught:
            channel.recv(timeout=5)
        assert (caught.value.expected, caught.value.received) == (declared, sent)
        del caught
        inject(bare, message_by_hand(transport, 1, [handle.fileno()], notice=True))
        assert channel.recv(timeout=5) == "by hand"


@pytest.mark.parametrize("notice", [False, True])
@pytest.mark.parametrize(("declared", "sent"), [(0, 1), (2, 3), (1, 253)])
def test_more_descriptors_than_declared(transport: str, declared: int, sent: int, notice: bool) -> None:
    """The peer lies: the channel is closed, and so is everything that came."""
    with bare_pair(transport) as (channel, bare), numbered_handle(1) as handle:
        inject(bare, message_by_hand(transport, declared, [handle.fileno()] * sent, notice))
        with pytest.raises(ProtocolError):
            channel.recv(timeout=5)
        assert channel.closed
        with contextlib.suppress(ConnectionResetError):  # where something of it was still unread
            assert bare.recv(1) == b""


SO_PASSRIGHTS = 83  # Linux 6.16; missing from the socket module


def test_receiver_that_refuses_descriptors(transport: str) -> None:
    """SO_PASSRIGHTS switched off at the receiver: the sender hears of it."""
    with bare_pair(transport) as (channel, bare), numbered_handle(1) as handle:
        try:
            bare.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError:
            pytest.skip("this kernel has no SO_PASSRIGHTS (Linux 6.16)")
        with pytest.raises(AccessDeniedError):
            channel.send([handle], timeout=1)
        assert not handle.closed


# in one message


def _as_many_descriptors_as_allowed(transport: str, excess: int) -> None:
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (70_000, 70_000))
    except (OSError, ValueError):  # not allowed to raise the hard limit: then with a lower bound
        wire.MAX_DESCRIPTORS = 4000
        set_limit(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    a, b = fdshare.Pipe(transport=transport)
    with a, b, numbered_handle(42) as original:
        handles = [FdHandle.dup(original) for _ in range(wire.MAX_DESCRIPTORS + excess)]
        if excess:
            with pytest.raises(MessageTooLargeError, match="MAX_DESCRIPTORS is") as caught:
                a.send(handles, timeout=5)
            assert isinstance(caught.value, ValueError)
            del caught
            a.send("goes on")
            assert b.recv() == "goes on"
        else:
            a.send(handles, timeout=20)
            received = b.recv(timeout=20)
            assert len(received) == len(handles)
            for handle in received:
                handle.close()
        for handle in handles:
            handle.close()


@pytest.mark.parametrize("excess", [0, 1], ids=["as_many_as_allowed", "one_more"])
def test_most_descriptors_of_one_message(transport: str, excess: int) -> None:
    checked_child(_as_many_descriptors_as_allowed, transport, excess)


def _with_a_small_send_buffer(size: int, count: int) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with Channel(ours) as a, Channel(theirs) as b:
        send_numbered(a, count, size)
        check_arrived(b.recv(timeout=5), count, size)
        a.send_bytes(pattern(size))
        assert b.recv_bytes() == pattern(size)


@requires_seqpacket
@pytest.mark.parametrize("count", [0, 1, 300])
@pytest.mark.parametrize("size", [0, 1000, 4000, 20_000, 60_000, 100_000])
def test_packet_over_the_send_buffer_goes_another_way(size: int, count: int) -> None:
    """EMSGSIZE is the kernel's business with us, never the user's."""
    _with_a_small_send_buffer(size, count)


def test_waiting_for_what_is_in_flight_is_not_busy(transport: str) -> None:
    """A sender that waits for room lets the processor go."""
    a, b = fdshare.Pipe(transport=transport)
    a.max_inflight = LARGE
    a.send(bytearray(LARGE))
    before = os.times()
    with a, b:
        with pytest.raises(TimeoutError):
            a.send(bytearray(LARGE), timeout=0.5)
        after = os.times()
    assert after.user + after.system - before.user - before.system < 0.25


def _fill(channel: Channel, message: Callable[[int], Any]) -> int:
    count = 0
    try:
        while True:
            channel.send(message(count), timeout=0)
            count += 1
    except TimeoutError:
        return count


def test_full_channel_empties_in_order(transport: str) -> None:
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        count = _fill(a, lambda n: (n, "x" * 1000))
        assert count > 10
        wait_until(lambda: b.poll(0))
        assert [b.recv(timeout=5)[0] for _ in range(count)] == list(range(count))
        assert not b.poll()


@requires_seqpacket
def test_flow_of_descriptors_leaves_no_notice_behind() -> None:
    """However often the channel was full just between a notice and its packet: each would cost a look for room for ever."""
    a, b = fdshare.Pipe(transport="seqpacket")

    def send() -> None:
        with numbered_handle(1) as handle:
            for _ in range(1000):
                a.send(handle)

    with a, b, running(send, closing=(a, b)):
        for _ in range(1000):
            b.recv().close()
        assert not b._transport._noticed  # type: ignore[attr-defined]


@requires_seqpacket
def test_notices_of_what_another_reader_took_cost_no_more_for_being_many() -> None:
    a, b = fdshare.Pipe(transport="seqpacket")
    beside = fdshare.Channel(socket.socket(fileno=os.dup(b.fileno())))
    with a, b, beside, numbered_handle(1) as handle:
        for _ in range(1000):
            a.send(handle)
            assert b.poll(5)  # takes the notice
            beside.recv().close()
        assert len(b._transport._noticed) == 1  # type: ignore[attr-defined]  # one kind, one look for room
        for _ in range(1000):  # and each packet whose notice went elsewhere is one fewer to wait for
            a.send(handle)
            assert beside.poll(5)
            b.recv().close()
        assert not b._transport._noticed  # type: ignore[attr-defined]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to go where there is no /proc")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_room_is_seen_without_proc(transport: str) -> None:
    checked_child(_receive_without_proc, transport)


def _receive_without_proc(transport: str) -> None:
    ours, theirs = fdshare.Pipe(transport=transport)
    with ours, theirs, numbered_handle(7) as handle, tempfile.TemporaryDirectory() as empty:
        many = [FdHandle.dup(handle) for _ in range(300)]
        root = os.open("/", os.O_RDONLY)
        os.chroot(empty)
        try:
            with running(lambda: ours.send(many)):
                received = theirs.recv(timeout=20)
            assert len(received) == 300
            resource.setrlimit(resource.RLIMIT_NOFILE, (received[-1].fileno() + 10,) * 2)
            with running(lambda: ours.send(many)):
                with pytest.raises(FdLimitError):
                    theirs.recv(timeout=20)
                for one in received:
                    one.close()
                received = theirs.recv(timeout=20)
            assert read_number(received[-1]) == 7
        finally:
            os.fchdir(root)
            os.chroot(".")
            os.close(root)
            for one in (*many, *received):
                one.close()
