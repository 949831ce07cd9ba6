"""Large messages: one sealed segment each, private to the receiver, bounded in flight, and refused where it cannot be trusted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    LARGE,
    QUICK_METHODS,
    SOCKET_TYPES,
    bare_pair,
    capture,
    close_pieces,
    requires_proc,
    requires_seqpacket,
    requires_unread_count,
    running,
    wait_until,
)

import fdshare
from fdshare import (
    Channel,
    ClosedError,
    MessageTooLargeError,
    NoSpaceError,
    PeerClosedError,
    memory,
    recycle,
    wire,
)
from fdshare.rights import open_numbers
from fdshare.testing import LeakCheck, checked_child, leak_check, numbered_handle, pattern, read_number

MIB = 1 << 20


@pytest.fixture
def pair(transport: str, segments: str) -> Iterator[tuple[Channel, Channel]]:
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        yield a, b


def open_descriptors() -> int:
    return len(open_numbers())


def segment_mappings() -> int:
    """How many segments this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:fdshare")


# what arrives


@pytest.mark.parametrize("size", [MIB, 5 * MIB + 123])
def test_what_arrives_is_writable_and_private(pair: tuple[Channel, Channel], size: int) -> None:
    a, b = pair
    content = bytearray(pattern(size))
    a.send(content)
    a.send(content)
    first, second = b.recv(), b.recv()
    first[:] = bytes(size)
    assert first == bytes(size)
    assert second == pattern(size)
    assert content == pattern(size)


def test_a_later_change_at_the_sender_does_not_reach_the_receiver(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    content = bytearray(pattern(MIB))
    a.send(content)
    content[:] = bytes(MIB)
    assert b.recv() == pattern(MIB)


def _overwrite(channel: Channel) -> None:
    with channel:
        for array in channel:
            array[:] = 0
            channel.send(int(array.sum()))


@pytest.mark.parametrize("method", QUICK_METHODS)
def test_a_write_in_another_process_does_not_reach_the_sender(
    pair: tuple[Channel, Channel], method: str
) -> None:
    numpy = pytest.importorskip("numpy")
    a, b = pair
    array = numpy.arange(MIB)
    with contextlib.closing(a), fdshare_child(_overwrite, b, a, method) as child:
        for _ in range(3):
            a.send(array)
            assert a.recv(timeout=30) == 0
        assert (array == numpy.arange(MIB)).all()
        a.close()
        child.result(30)


@contextlib.contextmanager
def fdshare_child(target: Any, far: Channel, near: Channel, method: str) -> Iterator[Any]:
    from fdshare.testing import Child

    with Child(target, far, method=method, unwanted=(near,)) as child:
        far.close()
        yield child


@pytest.mark.parametrize(
    "make",
    [
        lambda numpy: numpy.arange(1_000_000, dtype="<i8"),
        lambda numpy: numpy.asfortranarray(numpy.arange(1_000_000.0).reshape(1000, 1000)),
        lambda numpy: numpy.arange(2_000_000).reshape(2000, 1000)[::2, ::2],
        lambda numpy: numpy.zeros(100_000, dtype=[("name", "S20"), ("value", "f8")]),
        lambda numpy: numpy.array("2020-01-01", dtype="M8[s]") + numpy.arange(100_000),
        lambda numpy: numpy.empty((0, 5)),
        lambda numpy: numpy.arange(100_000, dtype=">u2"),
        lambda numpy: numpy.arange(200_000, dtype="c16"),
    ],
    ids=["flat", "fortran", "strided", "structured", "dates", "empty", "big_endian", "complex"],
)
def test_arrays_of_every_shape(pair: tuple[Channel, Channel], make: Any) -> None:
    numpy = pytest.importorskip("numpy")
    a, b = pair
    array = make(numpy)
    a.send(array)
    received = b.recv()
    assert received.dtype == array.dtype
    assert received.shape == array.shape
    assert (received == array).all()
    assert received.flags.writeable
    assert received.flags.f_contiguous == array.flags.f_contiguous or not array.flags.contiguous


def test_arrays_are_aligned(pair: tuple[Channel, Channel]) -> None:
    numpy = pytest.importorskip("numpy")
    a, b = pair
    a.send([numpy.zeros(size, "u1") for size in (200_001, 140_003, 199_999, 1 << 20)])
    for array in b.recv():
        assert array.ctypes.data % wire.PAGE == 0


# what it costs


def test_no_descriptor_is_held_by_what_arrived(pair: tuple[Channel, Channel]) -> None:
    """A thousand live arrays are no descriptor more than none."""
    numpy = pytest.importorskip("numpy")
    a, b = pair
    before = open_descriptors()
    arrays = []
    for i in range(200):
        a.send(numpy.full(LARGE, i, "u1"))
        arrays.append(b.recv())
        recycle.give_up()
        assert open_descriptors() == before
    assert [int(array[-1]) for array in arrays] == list(range(200))


@requires_proc
def test_mapping_goes_with_the_last_view() -> None:
    numpy = pytest.importorskip("numpy")
    a, b = fdshare.Pipe()
    with a, b:
        before = segment_mappings()
        a.send([numpy.zeros(MIB), numpy.zeros(MIB)])
        first, second = b.recv()
        tail = second[-1:]
        assert segment_mappings() > before
        del first, second
        assert segment_mappings() > before
        assert tail[0] == 0
        del tail
        assert segment_mappings() == before
        a.send(pattern(MIB))  # a bytes object is its own memory: nothing stays mapped for it
        content = b.recv()
        assert segment_mappings() == before
        assert len(content) == MIB


@requires_proc
def test_a_message_nobody_takes_leaves_no_mapping() -> None:
    a, b = fdshare.Pipe()
    before = segment_mappings()
    with a, b:
        a.send(bytearray(MIB))
        with leak_check():
            assert b.poll(5)
    assert segment_mappings() == before


@pytest.mark.parametrize("arrays", [1, 2, 50, 500])
def test_one_descriptor_however_many_arrays(transport: str, segments: str, arrays: int) -> None:
    numpy = pytest.importorskip("numpy")
    with bare_pair(transport) as (channel, bare):
        channel.send({i: numpy.zeros(wire.MAX_INLINE, "u1") for i in range(arrays)})
        pieces = capture(bare)
        assert sum(len(fds) for _, fds in pieces) == 1
        assert sum(len(data) for data, _ in pieces) <= wire.PACKET_SIZE + 1
        close_pieces(pieces)


def test_segment_of_a_pure_payload_is_one_descriptor(transport: str, segments: str) -> None:
    """A payload that is large without any buffer: a list of many small things."""
    with bare_pair(transport) as (channel, bare):
        channel.send(list(range(200_000)))
        pieces = capture(bare)
        assert sum(len(fds) for _, fds in pieces) == 1
        close_pieces(pieces)
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        a.send(list(range(200_000)))
        assert b.recv() == list(range(200_000))


@requires_seqpacket
def test_segment_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recycle, "ENABLED", False)
    with bare_pair("seqpacket") as (channel, bare):
        channel.send(bytearray(4 * MIB))
        pieces = capture(bare)
        (fd,) = [fd for _, fds in pieces for fd in fds]
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL):
            assert seals & seal
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        close_pieces(pieces)


@requires_seqpacket
@pytest.mark.usefixtures("only_files")
def test_file_segment_leaves_nothing_in_the_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name is gone before the first byte is written, and so is its directory."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with bare_pair("seqpacket") as (channel, bare):
        channel.send(bytearray(MIB))
        assert list(tmp_path.iterdir()) == []
        pieces = capture(bare)
        (fd,) = [fd for _, fds in pieces for fd in fds]
        assert os.fstat(fd).st_nlink == 0
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
        close_pieces(pieces)


def test_descriptors_beside_a_segment(pair: tuple[Channel, Channel]) -> None:
    """252 and the segment's own fill a packet; one more goes into a bundle."""
    a, b = pair
    for count in (1, 251, 252, 253, 254, 600):
        handles = [numbered_handle(i) for i in range(count)]
        a.send([bytearray(MIB), handles])
        for handle in handles:
            handle.close()
        content, received = b.recv()
        assert len(content) == MIB
        assert [read_number(handle) for handle in received] == list(range(count))


# what is in flight


@requires_unread_count
def test_producer_waits_for_the_receiver(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.max_inflight = 4 * MIB
    content = bytearray(MIB - 4096)
    for _ in range(4):
        a.send(content, timeout=5)
    for _ in range(2):
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            a.send(content, timeout=0.1)
        assert 0.1 <= time.monotonic() - begin < 5
    b.recv()
    a.send(content, timeout=5)
    with pytest.raises(TimeoutError):
        a.send(content, timeout=0)
    a.send("a small message passes", timeout=5)
    for _ in range(5):
        b.recv(timeout=5)
    for _ in range(4):
        a.send(content, timeout=5)


@requires_unread_count
def test_what_timed_out_was_not_sent(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.max_inflight = MIB
    a.send([1, bytearray(MIB)])
    with numbered_handle(1) as handle:
        with pytest.raises(TimeoutError):
            a.send([2, bytearray(MIB), fdshare.move(handle)], timeout=0.05)
        assert not handle.closed
    a.send("end")
    assert b.recv()[0] == 1
    assert b.recv() == "end"


@requires_unread_count
def test_blocked_producer_goes_on_when_the_receiver_reads(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.max_inflight = 2 * MIB
    sent: list[int] = []

    def produce() -> None:
        for i in range(20):
            a.send([i, bytearray(MIB - 4096)])
            sent.append(i)

    with running(produce, closing=pair):
        for i in range(20):
            wait_until(lambda i=i: len(sent) == min(20, i + 2))  # type: ignore[misc]
            assert b.recv(timeout=20)[0] == i


@requires_unread_count
def test_one_message_over_the_bound_passes(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.max_inflight = MIB
    for _ in range(3):
        a.send(bytearray(10 * MIB), timeout=5)
        with pytest.raises(TimeoutError):
            a.send(bytearray(MIB), timeout=0.02)
        assert len(b.recv()) == 10 * MIB


@requires_unread_count
def test_bound_holds_for_threads_together(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    a.max_inflight = 4 * MIB
    passed: list[int] = []

    def produce() -> None:
        with contextlib.suppress(TimeoutError):
            for i in range(4):
                a.send(bytearray(MIB - 4096), timeout=0.3)
                passed.append(i)

    with running(*[produce] * 4, closing=pair):
        pass
    assert len(passed) == 4
    for _ in range(4):
        b.recv(timeout=5)


@requires_unread_count
@pytest.mark.parametrize(("who", "error"), [("a", ClosedError), ("b", PeerClosedError)])
def test_producer_that_waits_hears_of_a_close(
    pair: tuple[Channel, Channel], who: str, error: type[Exception]
) -> None:
    a, b = pair
    a.max_inflight = MIB
    a.send(bytearray(MIB))
    blocked = threading.Event()

    def produce() -> None:
        blocked.set()
        with pytest.raises(error):
            a.send(bytearray(MIB))

    with running(produce, closing=pair):
        blocked.wait()
        (a if who == "a" else b).close()


def test_delivery_to_another_process_counts(pair: tuple[Channel, Channel]) -> None:
    numpy = pytest.importorskip("numpy")
    a, b = pair
    a.max_inflight = 2 * MIB
    with contextlib.closing(a), fdshare_child(_sum_of_lengths, b, a, "fork") as child:
        for _ in range(30):
            a.send(numpy.ones(MIB, "u1"), timeout=20)
        a.close()
        assert child.result(30) == 30 * MIB


def _sum_of_lengths(channel: Channel) -> int:
    with channel:
        return sum(len(message) for message in channel)


# no space


def _over_file_size_limit(transport: str, segments: str) -> None:
    memory.HAVE_PIPE_SIZE, memory.HAVE_MEMFD = segments == "pipe", segments != "file"
    a, b = fdshare.Pipe(transport=transport)
    with a, b, numbered_handle(5) as handle:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
        with leak_check(closed=True):
            for message in (
                bytearray(4 * MIB),
                [handle, bytearray(2 * MIB)],
                [fdshare.move(handle), bytes(2 * MIB)],
                "x" * 2 * MIB,
            ):
                with pytest.raises(NoSpaceError) as caught:
                    a.send(message)
                assert caught.value.errno == errno.EFBIG
                assert isinstance(caught.value, OSError)
                del caught
        assert not handle.closed
        # Nothing of it was sent, and what fits still goes.
        a.send([fdshare.move(handle), bytearray(MIB // 2)])
        received, content = b.recv(timeout=5)
        assert read_number(received) == 5
        assert len(content) == MIB // 2
        assert handle.closed
        assert not b.poll()


def test_no_space_for_a_segment_by_file_size_limit(transport: str, segments: str) -> None:
    checked_child(_over_file_size_limit, transport, segments)


@contextlib.contextmanager
def small_file_system(folder: Path) -> Iterator[Path]:
    """A tmpfs of 1 MiB; needs root."""
    if os.geteuid():
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1M,mode=0700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("only_files")
def test_no_space_on_a_full_file_system(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_file_system(tmp_path) as small:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        a, b = fdshare.Pipe(transport=transport)
        with a, b:
            with LeakCheck(closed=True), pytest.raises(NoSpaceError) as caught:
                a.send(bytearray(4 * MIB))
            assert caught.value.errno == errno.ENOSPC
            assert list(small.iterdir()) == []
            a.send(bytearray(MIB // 2))
            assert len(b.recv(timeout=5)) == MIB // 2
            assert not b.poll()
            # Its space is free again when the message was taken.
            a.send(bytearray(MIB // 2))
            assert len(b.recv(timeout=5)) == MIB // 2


def test_bounds_are_checked_before_memory_is_spent(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")

    def spend(parts: object, user: object) -> Any:
        pytest.fail("a segment was written for a message that is over a bound")

    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        with monkeypatch.context() as patch:
            patch.setattr(memory, "write_segment", spend)
            patch.setattr(wire, "MAX_BUFFERS", 3)
            with pytest.raises(MessageTooLargeError, match="MAX_BUFFERS"):
                a.send([numpy.zeros(MIB) for _ in range(4)])
            patch.setattr(wire, "MAX_SEGMENT", 3 * MIB)
            with pytest.raises(MessageTooLargeError, match="MAX_SEGMENT"):
                a.send(bytearray(4 * MIB))
        a.send("goes on")
        assert b.recv() == "goes on"


@requires_seqpacket
def test_socket_types_are_the_ones_of_the_channels() -> None:
    for transport, type in SOCKET_TYPES.items():
        a, b = fdshare.Pipe(transport=transport)
        with a, b, socket.socket(fileno=os.dup(a.fileno())) as sock:
            assert sock.type == type
