"""A hostile peer on a typed channel: only typed errors, nothing unpickled, nothing left open, nobody kept waiting."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers import SOCKET_TYPES, inject
from typed_messages import DESCRIPTORS, Empty, Handles, Sockets

from fdshare import (
    Channel,
    DecodeError,
    DescriptorsLostError,
    FdHandle,
    FdShareError,
    PeerClosedError,
    ProtocolError,
    TypedCodec,
    memory,
    wire,
)
from fdshare.codec import Outgoing
from fdshare.rights import _SO_PASSRIGHTS, open_numbers
from fdshare.transports import MAX_NOTICED

needs_memfd = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory files here")

CODEC = TypedCodec(Handles, Empty, recv_fds=4, max_bytes=1 << 20)
NOTHING = TypedCodec(Empty, max_bytes=1000)
GOOD = msgspec.msgpack.encode(["Empty"])


@contextlib.contextmanager
def hostile(transport: str, codec: TypedCodec = CODEC) -> Iterator[tuple[Channel, socket.socket]]:
    """A typed channel, and the bare socket at the other end of it."""
    ours, bare = socket.socketpair(socket.AF_UNIX, SOCKET_TYPES[transport])
    bare.settimeout(20)
    with bare, Channel(ours, codec=codec) as channel:
        yield channel, bare


def write(
    bare: socket.socket, payload: bytes, fds: list[int] | None = None, *, end: bytes = b"\x01", **header: Any
) -> None:
    """Send one message with a header of one's own; what it says of sizes and counts is the truth unless told otherwise."""
    fds = fds or []
    said = {"type": wire.MESSAGE, "descriptors": len(fds), "payload_size": len(payload), **header}
    packet = wire._LAYOUT.pack(
        said["type"], said.get("flags", 0), 0, said["descriptors"], said.get("buffers", 0), 0,
        said["payload_size"], said.get("segment_size", 0), said.get("nonce", 0),
    )  # fmt: skip
    if bare.type == socket.SOCK_SEQPACKET:
        inject(bare, [(packet + payload, fds)])
        return
    inject(bare, [(packet, [])])
    rest = payload + end
    inject(bare, [(rest[:1], fds), *([(rest[1:], [])] if rest[1:] else [])])


def check_goes_on(channel: Channel, bare: socket.socket) -> None:
    write(bare, GOOD)
    assert channel.recv(timeout=10) == Empty()


def check_closed(channel: Channel, bare: socket.socket) -> None:
    assert channel.closed
    with pytest.raises((BrokenPipeError, ConnectionError)):
        while True:
            bare.send(b"x" * 100)


# --- no pickle ----------------------------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_bare_pickle_closes_the_channel(tmp_path: Path) -> None:
    """On a channel with pickles such a packet would be unpickled at once."""
    with hostile("seqpacket") as (channel, bare):
        bare.send(pickle.dumps(Bomb(tmp_path / "bomb"), 5))
        with pytest.raises(ProtocolError, match="not a packet of this protocol"):
            channel.recv()
        check_closed(channel, bare)
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("kind", [wire.MESSAGE, wire.BYTES])
def test_pickle_in_a_packet_is_not_unpickled(transport: str, tmp_path: Path, kind: int) -> None:
    with hostile(transport) as (channel, bare):
        for protocol in range(6):
            write(bare, pickle.dumps(Bomb(tmp_path / "bomb"), protocol), type=kind)
            with pytest.raises(DecodeError):
                channel.recv(timeout=10)
        check_goes_on(channel, bare)
    assert not (tmp_path / "bomb").exists()


@needs_memfd
def test_pickle_in_a_segment_is_not_unpickled(transport: str, tmp_path: Path) -> None:
    data = pickle.dumps([Bomb(tmp_path / "bomb"), bytes(100_000)], 5)
    with hostile(transport) as (channel, bare), sealed(data) as segment:
        send_segment(bare, segment, len(data))
        with pytest.raises(DecodeError):
            channel.recv(timeout=10)
        check_goes_on(channel, bare)
    assert not (tmp_path / "bomb").exists()


def test_pickled_channel_is_no_way_in(tmp_path: Path) -> None:
    """A channel that came in a message speaks the typed codec, whatever its sender thinks."""
    evil, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with evil, theirs, hostile("seqpacket", DESCRIPTORS) as (channel, bare):
        write(bare, msgspec.msgpack.encode(["Sockets", None, 0]), [theirs.fileno()])
        arrived = channel.recv(timeout=10)
        assert isinstance(arrived, Sockets)
        assert arrived.channel is not None
        with arrived.channel as inner:
            evil.send(pickle.dumps(Bomb(tmp_path / "bomb"), 5))
            with pytest.raises(ProtocolError):
                inner.recv()
    assert not (tmp_path / "bomb").exists()


def test_bytes_are_bounded_too(transport: str) -> None:
    with hostile(transport, NOTHING) as (channel, bare):
        write(bare, b"raw", type=wire.BYTES)
        assert channel.recv_bytes(timeout=10) == b"raw"
        write(bare, bytes(1001), type=wire.BYTES)
        with pytest.raises(DecodeError, match="max_bytes is 1000"):
            channel.recv_bytes(timeout=10)
        check_goes_on(channel, bare)


# --- too much -----------------------------------------------------------------------------------------------------------


def test_too_many_bytes_are_dropped(transport: str) -> None:
    with hostile(transport, NOTHING) as (channel, bare):
        write(bare, bytes(50_000))
        with pytest.raises(DecodeError, match="50000 bytes arrived; max_bytes is 1000"):
            channel.recv(timeout=10)
        check_goes_on(channel, bare)


@pytest.mark.parametrize("notice", [False, True])
def test_too_many_descriptors_are_dropped(transport: str, notice: bool) -> None:
    with hostile(transport) as (channel, bare):
        for count in (5, 6, 50, 253):
            if notice and transport == "seqpacket":
                bare.send(wire.pack(wire.NOTICE, 0, count))
            write(bare, GOOD, [0] * count)
            with pytest.raises(DecodeError, match="4 are allowed"):
                channel.recv(timeout=10)
        check_goes_on(channel, bare)


def test_descriptors_that_are_not_declared_close_the_channel(transport: str) -> None:
    for count in (1, 5, 253):
        with hostile(transport) as (channel, bare):
            write(bare, GOOD, [0] * count, descriptors=0)
            with pytest.raises(ProtocolError):
                channel.recv(timeout=10)
            check_closed(channel, bare)


def test_declared_descriptors_that_do_not_come(transport: str) -> None:
    with hostile(transport) as (channel, bare):
        write(bare, msgspec.msgpack.encode(["Handles", 0, [1]]), [0], descriptors=2)
        with pytest.raises(DescriptorsLostError):
            channel.recv(timeout=10)
        check_goes_on(channel, bare)


def test_flood_never_takes_more_descriptors_than_allowed() -> None:
    """The kernel itself closes what does not fit into the control buffer: a flood of 253 finds this process with room for 30."""
    if not hasattr(resource, "RLIMIT_NOFILE") or not os.path.isdir("/proc/self/fd"):
        pytest.skip("no way to count descriptors here")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with hostile("seqpacket") as (channel, bare):
        for _ in range(3):
            write(bare, GOOD, [0] * 253)
        write(bare, msgspec.msgpack.encode(["Handles", 0, []]), [0])
        highest = max(open_numbers())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 30, limits[1]))
        try:
            for _ in range(3):
                with pytest.raises(DecodeError):
                    channel.recv(timeout=10)
            channel.recv(timeout=10).one.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_zero_allowed_means_zero(transport: str) -> None:
    """Where the kernel has it, the sender is refused; elsewhere what came is closed."""
    for codec in (NOTHING, TypedCodec(Handles, Empty, recv_fds=0)):
        with hostile(transport, codec) as (channel, bare):
            try:
                channel._transport.sock.getsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS)
                refused = True
            except OSError:
                refused = False
            if refused:
                with pytest.raises(PermissionError):
                    socket.send_fds(bare, [b"x"], [0])
            else:
                write(bare, GOOD, [0])
                with pytest.raises(DecodeError):
                    channel.recv(timeout=10)
            check_goes_on(channel, bare)


def test_huge_claims_take_no_memory(transport: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with hostile(transport) as (channel, bare):
        for claim in (
            b"\xdd\xff\xff\xff\xff",
            b"\x92\xa7Handles\xdd\xff\xff\xff\xff",
            b"\xc6\xff\xff\xff\xff",
            b"\x93\xa7Handles\xc0\xdd\x7f\xff\xff\xff",
        ):
            write(bare, claim + bytes(100))
            with pytest.raises(DecodeError):
                channel.recv(timeout=10)
        check_goes_on(channel, bare)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 20_000


def test_deep_nesting_is_refused() -> None:
    with hostile("seqpacket", DESCRIPTORS) as (channel, bare):
        write(bare, b"\x91" * 60_000)
        with pytest.raises(DecodeError):
            channel.recv(timeout=10)


# --- segments -------------------------------------------------------------------------------------------------------------

SEALS = 15  # seal, shrink, grow, write


@contextlib.contextmanager
def sealed(data: bytes, seals: int = SEALS, size: int | None = None) -> Iterator[int]:
    """A memory file."""
    with FdHandle(os.memfd_create("segment", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)) as handle:
        os.write(handle.fileno(), data)
        if size is not None:
            os.ftruncate(handle.fileno(), size)
        if seals:
            fcntl.fcntl(handle.fileno(), fcntl.F_ADD_SEALS, seals)
        yield handle.fileno()


def send_segment(bare: socket.socket, fd: int, size: int, more: int = 0, **header: Any) -> None:
    flags = wire.SEGMENT | wire.IN_SEGMENT | more
    said = {"payload_size": size, "segment_size": size, "descriptors": 0, "flags": flags, **header}
    write(bare, b"", [fd], **said)


@needs_memfd
def test_sealed_segment_is_taken(transport: str) -> None:
    with hostile(transport) as (channel, bare), sealed(GOOD) as segment:
        send_segment(bare, segment, len(GOOD))
        assert channel.recv(timeout=10) == Empty()


@needs_memfd
@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK | 16])
def test_segment_that_could_still_change_is_refused(transport: str, seals: int) -> None:
    with hostile(transport) as (channel, bare), sealed(GOOD, seals) as segment:
        send_segment(bare, segment, len(GOOD))
        with pytest.raises(DecodeError, match="not sealed"):
            channel.recv(timeout=10)
        check_goes_on(channel, bare)


@needs_memfd
def test_segment_shorter_than_it_says(transport: str) -> None:
    with hostile(transport) as (channel, bare), sealed(GOOD) as segment:
        send_segment(bare, segment, 100_000)
        with pytest.raises(DecodeError, match="7 bytes"):
            channel.recv(timeout=10)
        check_goes_on(channel, bare)


@needs_memfd
def test_sparse_segment_takes_no_pages() -> None:
    """Mapped, its holes would become pages on the account of the receiver, and stay as long as the sender keeps the file."""
    size = 1 << 20
    with hostile("seqpacket") as (channel, bare), sealed(GOOD, size=size) as segment:
        before = os.fstat(segment).st_blocks
        send_segment(bare, segment, size)
        with pytest.raises(DecodeError):
            channel.recv(timeout=10)
        assert os.fstat(segment).st_blocks == before


@needs_memfd
def test_segment_over_the_bound_is_not_looked_at(transport: str) -> None:
    with hostile(transport) as (channel, bare), sealed(b"", size=1 << 40) as segment:
        send_segment(bare, segment, 1 << 40)
        with pytest.raises(DecodeError, match="max_bytes"):
            channel.recv(timeout=10)
        check_goes_on(channel, bare)


@needs_memfd
@pytest.mark.parametrize(
    ("more", "header"),
    [
        (wire.FILE, {}),
        (wire.LEASED, {}),
        (0, {"flags": wire.SEGMENT, "payload_size": 0}),
        (0, {"segment_size": 1 << 20}),
        (0, {"buffers": 1, "payload_size": 1000, "segment_size": 2000}),
    ],
)
def test_segment_of_another_kind_closes_the_channel(
    transport: str, more: int, header: dict[str, Any]
) -> None:
    with hostile(transport) as (channel, bare), sealed(bytes(5000)) as segment:
        send_segment(bare, segment, 1000, more, **header)
        with pytest.raises(ProtocolError):
            channel.recv(timeout=10)
        check_closed(channel, bare)


@needs_memfd
def test_pipe_that_never_delivers_keeps_nobody(transport: str) -> None:
    reader, writer = map(FdHandle, os.pipe())
    with reader, writer:
        for more, error in ((wire.FILE, ProtocolError), (0, DecodeError)):
            with hostile(transport) as (channel, bare):
                send_segment(bare, reader.fileno(), 100_000, more)
                with pytest.raises(error):
                    channel.recv()  # without a timeout


@pytest.mark.parametrize("without", ["HAVE_MEMFD"])
def test_system_without_memory_files_copies(
    transport: str, without: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, without, False)
    (tmp_path / "segment").write_bytes(GOOD)
    reader, writer = map(FdHandle, os.pipe())
    with (
        FdHandle(os.open(tmp_path / "segment", os.O_RDONLY)) as file,
        hostile(transport) as (channel, bare),
        reader,
        writer,
    ):
        send_segment(bare, file.fileno(), len(GOOD), wire.FILE)
        assert channel.recv(timeout=10) == Empty()
        os.write(writer.fileno(), GOOD)
        send_segment(bare, reader.fileno(), len(GOOD), wire.FILE)
        with pytest.raises(DecodeError, match="not a regular file"):
            channel.recv()
        check_goes_on(channel, bare)


@needs_memfd
def test_typed_channel_sends_no_pipes(transport: str) -> None:
    """Which its receiver would refuse; a pickling channel takes one where it is faster."""
    with hostile(transport, DESCRIPTORS) as (channel, bare):
        channel._send_slowly(Outgoing([bytes(100_000)]), wire.MESSAGE, 10)
        channel._send_slowly(Outgoing([bytes(100_000)]), wire.MESSAGE, 10)  # not into an empty queue
        seen = bytearray()
        while len(seen) < wire.HEADER_SIZE * 2:
            data, fds, _, _ = socket.recv_fds(bare, 200_000, 4)
            seen += data[-wire.HEADER_SIZE :]
            for fd in fds:
                with FdHandle(fd) as segment:
                    assert segment.kind == "memfd"
                    assert fcntl.fcntl(segment.fileno(), fcntl.F_GET_SEALS) & SEALS == SEALS
            if fds:
                break


# --- bundles ------------------------------------------------------------------------------------------------------------


def test_bundle_for_what_fits_into_a_packet_closes_the_channel(transport: str) -> None:
    left, right = socket.socketpair()
    with left, right, hostile(transport) as (channel, bare):
        write(bare, GOOD, [left.fileno()], descriptors=3, flags=wire.BUNDLE)
        with pytest.raises(ProtocolError, match="bundle"):
            channel.recv(timeout=10)


def test_bundle_over_the_bound_is_not_opened(transport: str) -> None:
    """Nor does it stay queued for want of room, as one of a trusted peer would."""
    left, right = socket.socketpair()
    with left, right, hostile(transport) as (channel, bare):
        right.send(b"x")
        if transport == "seqpacket":
            bare.send(wire.pack(wire.NOTICE, wire.BUNDLE, wire.MAX_DESCRIPTORS))
        write(bare, GOOD, [left.fileno()], descriptors=wire.MAX_DESCRIPTORS, flags=wire.BUNDLE)
        with pytest.raises(DecodeError, match="4 are allowed"):
            channel.recv(timeout=10)
        assert left.recv(10) == b"x"
        check_goes_on(channel, bare)


def test_bundle_without_descriptors_does_not_go_on_for_ever(transport: str) -> None:
    """Its other end could bring bytes as fast as they are read."""
    left, right = socket.socketpair()
    with left, right, hostile(transport, TypedCodec(Handles, Empty, recv_fds=1000)) as (channel, bare):
        right.send(bytes(100_000))
        write(bare, GOOD, [left.fileno()], descriptors=900, flags=wire.BUNDLE)
        with pytest.raises(DescriptorsLostError):
            channel.recv(timeout=10)
        assert len(left.recv(1 << 20)) > 90_000
        check_goes_on(channel, bare)


# --- time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("call", ["recv", "poll"])
def test_flood_of_notices_keeps_nobody_past_a_deadline(typed: bool, call: str) -> None:
    ours, bare = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    notice = wire.pack(wire.NOTICE, 0, 1)
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                bare.send(notice)
            except TimeoutError:
                pass
            except OSError:
                return

    bare.settimeout(0.1)
    thread = threading.Thread(target=flood)
    with bare, Channel(ours, codec=CODEC if typed else None) as channel:
        thread.start()
        try:
            start = time.monotonic()
            if call == "poll":
                assert not channel.poll(0.3)
            else:
                with pytest.raises(TimeoutError):
                    channel.recv(timeout=0.3)
            assert time.monotonic() - start < 10
            assert len(channel._transport._noticed) <= MAX_NOTICED  # type: ignore[attr-defined]  # of SEQPACKET
        finally:
            stop.set()
            thread.join(20)


def test_half_a_frame_keeps_nobody_past_a_deadline() -> None:
    with hostile("stream") as (channel, bare):
        bare.send(wire.pack(wire.MESSAGE, payload_size=100) + b"half")
        with pytest.raises(TimeoutError):
            channel.recv(timeout=0.05)
        bare.shutdown(socket.SHUT_WR)
        with pytest.raises(PeerClosedError):
            channel.recv(timeout=10)


def test_given_up_frames_are_dropped_and_bounded_too() -> None:
    with hostile("stream", NOTHING) as (channel, bare):
        for size in (10, 5000):
            write(bare, bytes(size), end=b"\x00")
        check_goes_on(channel, bare)


def test_other_end_dies_in_the_middle(transport: str) -> None:
    with hostile(transport) as (channel, bare):
        bare.send(wire.pack(wire.MESSAGE, payload_size=100)[:20])
        bare.close()
        with pytest.raises(FdShareError):
            channel.recv(timeout=10)
