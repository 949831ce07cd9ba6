"""The hello as bytes, and what two ends hear from each other where they do not fit."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import selectors
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers import LARGE, SOCKET_TYPES, TRANSPORTS, requires_seqpacket
from hypothesis import given
from hypothesis import strategies as st

from fdshare import (
    AccessDeniedError,
    BytesCodec,
    Channel,
    ChannelSet,
    ClosedError,
    DecodeError,
    DescriptorsLostError,
    Listener,
    MessageTooLargeError,
    PeerClosedError,
    ProtocolError,
    TypedCodec,
    connect,
    hello,
    wait,
    wire,
)
from fdshare.hello import Hello
from fdshare.testing import numbered_handle, read_number

PICKLE = Hello("pickle")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


# bytes


def test_layout() -> None:
    """As docs/wire.md has it, byte by byte."""
    data = Hello("bytes", descriptors=7, packet=70_000, size=1 << 33).data
    assert data == b"fdshare\0\x01\x01\x01\x05" + struct.pack("<IIIQ", 7, 70_000, 0, 1 << 33) + b"bytes"
    assert hello.pack_refusal("no") == b"fdshare\0\x02\x01\x01\x02" + bytes(20) + b"no"


def test_begins_like_no_packet() -> None:
    assert PICKLE.data[0] not in (
        wire.MESSAGE,
        wire.BYTES,
        wire.NOTICE,
        wire.PICKLE_MARK,
        *pickle.dumps(0)[:1],
    )
    assert hello.HELLO_SIZE <= wire.HEADER_SIZE  # a stream's parser can go on with what was read for a hello


@given(
    st.builds(
        Hello,
        st.text(max_size=60),
        st.integers(0, 2**32 - 1),
        st.integers(wire.ALWAYS_INLINE, 2**32 - 1),
        st.integers(0, 2**64 - 1),
    )
)
def test_what_is_packed_is_unpacked(theirs: Hello) -> None:
    ours = Hello(theirs.codec)
    shown = "".join(c if c.isprintable() else "?" for c in theirs.codec)
    if shown == theirs.codec:
        assert hello.unpack(theirs.data, ours) == theirs
    for size in range(len(theirs.data)):
        assert hello.is_hello(theirs.data[:size])
        assert 0 < hello.missing(theirs.data[:size]) <= len(theirs.data) - size
    assert hello.missing(theirs.data) == 0


@given(st.binary(max_size=400))
def test_anything_else_is_a_protocol_error(data: bytes) -> None:
    for text in (data, PICKLE.data[:8] + data, PICKLE.data[:12] + data):
        if text != PICKLE.data:
            with pytest.raises((ProtocolError, AccessDeniedError)):
                hello.unpack(text, PICKLE)


def test_long_texts() -> None:
    with pytest.raises(ValueError, match="MAX_TEXT"):
        Hello("x" * 256)
    with pytest.raises(AccessDeniedError) as caught:
        hello.unpack(hello.pack_refusal("é" * 200), PICKLE)
    assert str(caught.value).endswith("é" * 127)
    with pytest.raises(AccessDeniedError, match=r"\?\[2J"):
        hello.unpack(hello.pack_refusal("\x1b[2J"), PICKLE)


# two ends


def both(path: str, transport: str, server: Any, client: Any) -> Iterator[tuple[Channel, Channel]]:
    with (
        Listener(path, transport=transport, codec=server) as listener,
        connect(path, transport=transport, codec=client) as there,
        listener.accept() as here,
    ):
        yield here, there


def other_codec(end: Channel) -> None:
    with pytest.raises(ProtocolError, match="same codec") as caught:
        end.recv(timeout=20)
    assert "'pickle'" in str(caught.value)
    assert "'bytes'" in str(caught.value)
    assert end.closed
    with pytest.raises(ClosedError):
        end.recv()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("server_first", [False, True])
@pytest.mark.parametrize("client_pickles", [False, True])
def test_codecs_differ(path: str, transport: str, server_first: bool, client_pickles: bool) -> None:
    """Both ends say so, whoever looks first, and whatever was sent before is not decoded."""
    codecs = (BytesCodec(), None) if client_pickles else (None, BytesCodec())
    for here, there in both(path, transport, *codecs):
        there.send(b"sent at once")
        for end in (here, there) if server_first else (there, here):
            assert end.poll(20)
            other_codec(end)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_codecs_differ_and_the_client_only_sends(path: str, transport: str) -> None:
    for here, there in both(path, transport, None, BytesCodec()):
        other_codec(here)
        with pytest.raises(ProtocolError, match="same codec"):
            for _ in range(2):  # a stream's socket takes one more
                there.send(b"x", timeout=20)


@requires_seqpacket
def test_typed_codecs_differ(path: str) -> None:
    import attrs

    @attrs.frozen
    class One:
        a: int

    @attrs.frozen
    class Two:
        a: str

    for here, there in both(path, "seqpacket", TypedCodec(One), TypedCodec(Two)):
        for end in (here, there):
            with pytest.raises(ProtocolError, match="same codec"):
                end.recv(timeout=20)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_limits_differ(path: str, transport: str) -> None:
    """What the other side does not take is an error of the sender, and not sent; once its hello has come."""
    few = BytesCodec(max_bytes=LARGE + 10, max_fds=1)
    for here, there in both(path, transport, few, BytesCodec()):
        here.send(b"hello")
        assert there.recv() == (b"hello", [])
        with numbered_handle(3) as handle:
            with pytest.raises(MessageTooLargeError, match="the peer takes 1"):
                there.send((b"two", [handle, handle]))
            with pytest.raises(MessageTooLargeError, match=str(LARGE + 10)):
                there.send(bytes(LARGE + 11))
            for size in (0, 1000, LARGE + 10):
                there.send((bytes(size), [handle]))
                data, handles = here.recv()
                assert data == bytes(size)
                handles[0].close()
            here.send((b"one", [handle]))
            assert read_number(there.recv()[1][0]) == 3


def bare(path: str, transport: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, SOCKET_TYPES[transport])
    sock.settimeout(20)
    sock.connect(path)
    return sock


def version(lowest: int, highest: int) -> bytes:
    return Hello("pickle", lowest=lowest, highest=highest).data


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (version(2, 9), "versions 2 to 9"),
        (Hello("pickle", packet=4096).data, "packets of 4096"),
        (b"GET / HTTP/1.1\r\n\r\n", "did not say hello"),
        (pickle.dumps("a message without hello"), "did not say hello"),
        (PICKLE.data[:8] + b"\x07" + PICKLE.data[9:], "unknown kind"),
        (PICKLE.data[:-6] + b"\xff" * 6, "UTF-8"),
        (hello.pack_refusal("because"), "because"),
    ],
    ids=["version", "packet", "http", "message", "kind", "utf8", "refusal"],
)
def test_client_does_not_fit(path: str, transport: str, early: bool, data: bytes, message: str) -> None:
    """The server's receive says so, and the client has the server's hello."""
    with Listener(path, transport=transport) as listener, bare(path, transport) as client:
        if early:
            client.sendall(data)
        with listener.accept() as server:
            if not early:
                client.sendall(data)
            for _ in range(2):
                with pytest.raises(
                    (ProtocolError, AccessDeniedError, ClosedError), match=f"{message}|closed"
                ):
                    server.recv(timeout=20)
        try:
            assert client.recv(1000) == PICKLE.data
        except ConnectionResetError:  # what it had sent was not read to its end
            assert transport == "seqpacket"
            assert client.recv(1000) == PICKLE.data


@requires_seqpacket
def test_client_of_more_versions(path: str) -> None:
    """One that speaks this version too is welcome."""
    with Listener(path) as listener, bare(path, "seqpacket") as client:
        client.sendall(version(1, 9))
        client.sendall(pickle.dumps("of the future"))
        with listener.accept() as server:
            assert server.recv() == "of the future"
            assert client.recv(1000) == PICKLE.data


@requires_seqpacket
def test_hello_with_descriptors(path: str) -> None:
    with (
        Listener(path) as listener,
        bare(path, "seqpacket") as client,
        listener.accept() as server,
        numbered_handle(1) as handle,
    ):
        socket.send_fds(client, [PICKLE.data], [handle.fileno()])
        with pytest.raises(ProtocolError, match="descriptors"):
            server.recv(timeout=20)


def test_hello_on_a_stream_in_single_bytes(path: str) -> None:
    with (
        Listener(path, transport="stream") as listener,
        bare(path, "stream") as client,
        listener.accept() as server,
    ):
        for byte in PICKLE.data:
            assert not server.poll()
            client.sendall(bytes([byte]))
        assert not server.poll()
        payload = pickle.dumps("after all")
        client.sendall(bytes(wire.frame(wire.pack(wire.MESSAGE, payload_size=len(payload)), [payload])))
        assert server.recv(timeout=20) == "after all"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_client_dies_in_the_middle(path: str, transport: str) -> None:
    with Listener(path, transport=transport) as listener:
        for data in (b"", PICKLE.data[:20] if transport == "stream" else b""):
            with bare(path, transport) as client:
                client.sendall(data)
            with listener.accept() as server:
                for _ in range(2):
                    with pytest.raises(PeerClosedError):
                        server.recv(timeout=20)


# a server that is not fdshare's Listener


@pytest.fixture(params=TRANSPORTS)
def foreign(path: str, request: pytest.FixtureRequest) -> Iterator[tuple[str, socket.socket]]:
    with socket.socket(socket.AF_UNIX, SOCKET_TYPES[request.param]) as listener:
        listener.bind(path)
        listener.listen()
        yield request.param, listener


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (version(2, 9), ProtocolError, "versions 2 to 9"),
        (Hello("bytes").data, ProtocolError, "same codec"),
        (hello.pack_refusal("because"), AccessDeniedError, "because"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100), ProtocolError, "."),
        (b"fdshare\0" + bytes(30), ProtocolError, "."),
    ],
    ids=["version", "codec", "refusal", "http", "zeros"],
)
@pytest.mark.parametrize("by", ["recv", "send"])
def test_server_does_not_fit(
    path: str,
    foreign: tuple[str, socket.socket],
    answer: bytes,
    error: type[Exception],
    message: str,
    by: str,
) -> None:
    transport, listener = foreign
    with connect(path, transport=transport) as client:
        server, _ = listener.accept()
        with server:
            assert server.recv(1000) == PICKLE.data
            server.sendall(answer)
        if by == "recv":
            with pytest.raises(error, match=message):
                client.recv(timeout=20)
        elif b"HTTP" not in answer:  # that is no answer to look for
            with pytest.raises(error, match=message):
                client.send("x")


def test_server_that_says_the_same_hello(path: str, foreign: tuple[str, socket.socket]) -> None:
    """It may be left out, and it may be said."""
    transport, listener = foreign
    with connect(path, transport=transport) as client:
        server, _ = listener.accept()
        with server, Channel(server) as channel:
            assert server.recv(1000) == PICKLE.data
            server.sendall(PICKLE.data)
            assert not client.poll(0.01)
            channel.send("message")
            assert client.recv(timeout=20) == "message"


# who is refused


def stranger(*_: object) -> bool:
    return False


def broken(*_: object) -> bool:
    raise ZeroDivisionError("a policy's bug")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("allow", [stranger, broken])
@pytest.mark.parametrize("by", ["recv", "send", "poll"])
def test_refused_client_is_told_and_the_next_one_is_served(
    path: str, transport: str, allow: Callable[..., bool], by: str
) -> None:
    answers = [allow, lambda peer: True]
    with (
        Listener(path, transport=transport, allow=lambda peer: answers.pop(0)(peer)) as listener,
        connect(path, transport=transport) as refused,
        connect(path, transport=transport) as welcome,
        listener.accept() as server,
    ):
        if by == "poll":
            assert refused.poll(20)
        for _ in range(2):
            with pytest.raises(AccessDeniedError, match=rf"uid {os.geteuid()} .* is not admitted$") as caught:
                refused.send("hello?") if by == "send" else refused.recv()
            assert caught.value.errno == errno.EACCES
        welcome.send(1)
        assert server.recv() == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("by", ["recv", "send", "poll", "nothing"])
def test_whoever_waits_for_a_refused_client_is_told(path: str, transport: str, by: str) -> None:
    """Also after the refusal itself was read off the socket."""
    with (
        Listener(path, transport=transport, allow=stranger) as listener,
        connect(path, transport=transport) as refused,
        ChannelSet([refused]) as many,
        selectors.DefaultSelector() as selector,
    ):
        selector.register(refused, selectors.EVENT_READ)
        with pytest.raises(TimeoutError):
            listener.accept(0.0)
        if by == "poll":
            assert refused.poll(20)
        elif by != "nothing":
            with pytest.raises(AccessDeniedError):
                refused.send("hello?") if by == "send" else refused.recv()
        for _ in range(2):
            assert many.select(20) == wait([refused], 20) == [refused]
            assert [key.fileobj for key, _ in selector.select(20)] == [refused]
            with pytest.raises(AccessDeniedError):
                refused.recv()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_whoever_waits_for_a_peer_of_another_codec_is_told(path: str, transport: str) -> None:
    """That peer is still there and says no more, and the hello itself was read while accepting, or by poll."""
    for here, there in both(path, transport, BytesCodec(), None):
        with ChannelSet([here, there]) as many:
            assert there.poll(20)
            for _ in range(2):
                assert many.select(20) == wait([here, there], 20) == [here, there]
            other_codec(here)
            assert many.select(20) == [there]
            other_codec(there)
            assert many.select(0) == []


def test_accept_ends_in_time_although_refused_ones_come(path: str) -> None:
    with Listener(path, allow=stranger) as listener:
        clients = [connect(path) for _ in range(3)]
        with pytest.raises(TimeoutError):
            listener.accept(0.0)
        for client in clients:
            with client, pytest.raises(AccessDeniedError):
                client.recv(timeout=20)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_client_refuses_its_server(path: str, transport: str) -> None:
    """It says so before it has sent anything else, and the server hears it."""
    with Listener(path, transport=transport) as listener:
        with pytest.raises(AccessDeniedError, match="not trusted here"):
            connect(path, transport=transport, allow=stranger)
        with listener.accept() as server:
            assert server.poll(20)
            with pytest.raises(AccessDeniedError, match=r"is not admitted$"):
                server.recv()


# garbage


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("side", ["client", "server"])
def test_garbage_in_place_of_a_hello(path: str, transport: str, side: str) -> None:
    """Whatever comes, in whatever pieces, with a descriptor or without: an error of its own type, and nothing is left open."""
    random = Random(f"{transport} {side}")
    kind = SOCKET_TYPES[transport]
    errors = (ProtocolError, AccessDeniedError, PeerClosedError, DecodeError, DescriptorsLostError)
    with contextlib.ExitStack() as stack:
        if side == "client":
            foreign = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
            foreign.bind(path)
            foreign.listen()
        else:
            listener = stack.enter_context(Listener(path, transport=transport, codec=BytesCodec()))
        handle = stack.enter_context(numbered_handle(1))
        for _ in range(300):
            with socket.socket(socket.AF_UNIX, kind) as bare_end:
                if side == "client":
                    channel = connect(path, transport=transport, codec=BytesCodec())
                    bare_end.close()
                    bare_end, _ = foreign.accept()
                else:
                    bare_end.connect(path)
                with bare_end:
                    garbage = bytearray(Hello("bytes").data + random.randbytes(random.randrange(60)))
                    for _ in range(random.randrange(4)):
                        garbage[random.randrange(len(garbage))] = random.randrange(256)
                    del garbage[random.randrange(len(garbage) + 1) :]
                    cut = random.randrange(len(garbage) + 1)
                    for part in (garbage[:cut], garbage[cut:]):
                        if part:
                            fds = [handle.fileno()] * random.choice([0, 0, 1])
                            socket.send_fds(bare_end, [part], fds)
                    if side == "server":
                        channel = listener.accept(0.0)
                with channel, pytest.raises(errors):
                    while True:
                        for received in channel.recv(timeout=20)[1]:
                            received.close()
