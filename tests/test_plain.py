"""BytesCodec: bytes and descriptors, and nothing that could be executed."""

from __future__ import annotations

import array
import os
import pickle
from typing import Any

import pytest
from helpers import LARGE, TRANSPORTS, bare_pair, requires_seqpacket

from fdshare import (
    BytesCodec,
    Channel,
    DecodeError,
    FdHandle,
    MessageTooLargeError,
    NotSendableError,
    Pipe,
    ProtocolError,
    wire,
)
from fdshare.testing import numbered_handle, pattern, read_number, room_for


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [0, 1, 1000, wire.ALWAYS_INLINE, wire.ALWAYS_INLINE + 1, LARGE])
@pytest.mark.parametrize("count", [0, 1, 3, 253])
def test_round_trip(transport: str, size: int, count: int) -> None:
    near, far = Pipe(transport=transport, codec=BytesCodec())
    with near, far, room_for(1500):
        content, handles = pattern(size), [numbered_handle(i) for i in range(count)]
        near.send((content, handles))
        data, received = far.recv(timeout=20)
        assert (type(data), data) == (bytes, content)
        assert [read_number(handle) for handle in received] == list(range(count))
        for handle in handles:
            handle.close()


def test_a_thousand_descriptors() -> None:
    near, far = Pipe(codec=BytesCodec(max_fds=1000))
    with near, far, room_for(3500), numbered_handle(1) as handle:
        near.send((b"", [handle] * 1000))
        _, received = far.recv()
        assert len(received) == 1000
        for copy in received:
            copy.close()


@pytest.mark.parametrize(
    "data",
    [
        b"abc",
        bytearray(b"abc"),
        memoryview(b"abc"),
        memoryview(b"aXbXcX")[::2],
        memoryview(array.array("b", b"abc")),
    ],
)
def test_bytes_like(data: Any) -> None:
    near, far = Pipe(codec=BytesCodec())
    with near, far:
        near.send(data)
        near.send((data, ()))
        assert far.recv() == far.recv() == (b"abc", [])


def test_descriptors_of_any_kind_are_duplicated(tmp_path: Any) -> None:
    near, far = Pipe(codec=BytesCodec())
    path = tmp_path / "file"
    path.write_bytes(b"content")
    with near, far, path.open("rb") as file, FdHandle.dup(file) as handle:
        near.send((b"", [file, handle, file.fileno(), near, file]))
        _, received = far.recv()
        assert [one.kind for one in received] == ["file", "file", "file", "socket", "file"]
        assert len({one.fileno() for one in received} | {file.fileno()}) == 6
        assert not file.closed
        for one in received:
            one.close()


@pytest.mark.parametrize(
    "message", ["text", None, 3, (b"",), (b"", None), (b"", [], []), ("", []), {b"": b""}]
)
def test_what_is_no_such_message(message: Any) -> None:
    near, far = Pipe(codec=BytesCodec())
    with near, far:
        with pytest.raises(NotSendableError, match="BytesCodec takes bytes"):
            near.send(message)
        near.send(b"next")
        assert far.recv()[0] == b"next"


def test_what_is_no_descriptor() -> None:
    near, far = Pipe(codec=BytesCodec())
    with near, far, numbered_handle(1) as handle:
        for wrong, error in (("x", TypeError), (-1, ValueError), (None, TypeError)):
            with pytest.raises(NotSendableError) as caught:
                near.send((b"", [handle, wrong]))
            assert caught.value.path == "message[1][1]"
            assert isinstance(caught.value.__cause__, error)
        with pytest.raises(NotSendableError, match="closed before it was sent"):
            near.send((b"", [os.sysconf("SC_OPEN_MAX") - 1]))


def test_bounds_of_the_sender() -> None:
    near, far = Pipe(codec=BytesCodec(max_bytes=10, max_fds=1))
    with near, far, numbered_handle(1) as handle:
        with pytest.raises(MessageTooLargeError, match="max_bytes is 10"):
            near.send(bytes(11))
        with pytest.raises(MessageTooLargeError, match="max_fds is 1"):
            near.send((b"", [handle, handle]))


def test_bounds_of_the_receiver() -> None:
    """What is over them is dropped with its descriptors, and the next message comes."""
    near, far = Pipe(codec=BytesCodec())
    with Channel(far._transport.sock.dup(), codec=BytesCodec(max_bytes=10, max_fds=1)) as strict:
        far.close()
        with near, numbered_handle(1) as handle:
            for message in (bytes(11), bytes(LARGE), (b"", [handle, handle])):
                near.send(message)
                near.send((b"next", [handle]))
                with pytest.raises(DecodeError):
                    strict.recv()
                data, received = strict.recv()
                assert data == b"next"
                received[0].close()


@pytest.mark.parametrize(
    "bounds", [{"max_bytes": 0}, {"max_bytes": 1 << 45}, {"max_fds": -1}, {"max_fds": 40_000}]
)
def test_bounds_that_make_no_sense(bounds: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bounds))):
        BytesCodec(**bounds)


@requires_seqpacket
def test_a_pickle_is_not_unpickled() -> None:
    near, far = Pipe(codec=BytesCodec())
    with near, far:
        near.send(pickle.dumps("x"))
        assert far.recv() == (pickle.dumps("x"), [])
    with (
        bare_pair("seqpacket") as (plain, bare),
        Channel(plain._transport.sock.dup(), codec=BytesCodec()) as strict,
    ):
        bare.send(pickle.dumps("bare"))
        with pytest.raises(ProtocolError):
            strict.recv()
