"""Messages that are one handle or one socket: the short way gives what the long one gives."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

import fdshare
from fdshare import Channel, DecodeError, FdHandle, NotSendableError, alone
from fdshare.codec import Incoming, Outgoing, PickleCodec
from fdshare.testing import checked_child, leak_check, numbered_handle, read_number

codec = PickleCodec()


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alone, "_pickles", {})
    monkeypatch.setattr(alone, "_rebuilders", {})


def encoded(obj: Any) -> Outgoing:
    out = codec.encode(obj)
    assert isinstance(out, Outgoing)
    return out


def test_pickle_known_by_heart_is_the_one_that_pickle_writes() -> None:
    with numbered_handle(1) as handle, socket.socket() as sock:
        for obj in (handle, sock):
            first, second = encoded(obj), encoded(obj)
            assert bytes(first.payload[0]) == second.payload[0]
            assert first.fds == second.fds == [obj.fileno()]
            first.failed()
            second.failed()
        assert len(alone._pickles) == 2


def test_handles_and_sockets_arrive_the_first_time_and_later(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    for number in range(3):
        with numbered_handle(number) as handle:
            a.send(handle)
        with b.recv() as received:
            assert type(received) is FdHandle
            assert read_number(received) == number
    one, other = socket.socketpair()
    with one, other:
        for _ in range(3):
            a.send(one)
            with b.recv() as received:
                assert (received.family, received.type, received.proto) == (one.family, one.type, one.proto)
                assert received.gettimeout() is None
                received.send(b"x")
                assert other.recv(9) == b"x"


@pytest.mark.parametrize("timeout", [None, 0.0, 1.5])
def test_timeout_is_kept(pair: tuple[Channel, Channel], timeout: float | None) -> None:
    a, b = pair
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(timeout)
        found = []
        for message in (sock, [sock], sock, sock):
            a.send(message)
            received = b.recv()
            with received[0] if type(received) is list else received as arrived:
                found.append((arrived.gettimeout(), arrived.type))
        assert found == [(timeout, socket.SOCK_DGRAM)] * 4


def test_moved_and_nested_ones_take_the_long_way(pair: tuple[Channel, Channel]) -> None:
    a, b = pair
    for number in range(3):
        handle = numbered_handle(number)
        a.send(fdshare.move(handle))
        assert handle.closed
        with b.recv() as received:
            assert read_number(received) == number
        with numbered_handle(number) as handle:
            a.send([handle, handle])
        one, two = b.recv()
        with one:
            assert one is two
            assert read_number(one) == number


def test_closed_ones_are_refused_also_when_known() -> None:
    with numbered_handle(1) as handle, socket.socket() as sock:
        for obj in (handle, sock):
            encoded(obj).failed()
            encoded(obj).failed()
    for obj in (handle, sock):
        with pytest.raises(NotSendableError, match="closed"):
            codec.encode(obj)


def test_what_was_not_declared_is_refused_and_closed() -> None:
    with socket.socket() as sock, numbered_handle(1) as handle, FdHandle.dup(sock) as other:
        for obj, false in ((handle, other), (sock, handle)):
            with leak_check():
                out = encoded(obj)
                for _ in range(2):
                    arrived = Incoming(bytes(out.payload[0]), [FdHandle.dup(false)])
                    with pytest.raises(DecodeError):
                        codec.decode(arrived)
                    assert all(h.closed for h in arrived.handles)
                out.failed()
                del arrived


def test_socket_of_another_type_is_refused() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams, socket.socket() as stream:
        encoded(stream).failed()
        out = encoded(stream)
        with leak_check(), pytest.raises(DecodeError, match="type"):
            codec.decode(Incoming(out.payload[0], [FdHandle.dup(datagrams)]))
        out.failed()


def test_what_is_remembered_is_bounded() -> None:
    with socket.socket() as sock:
        for number in range(1, alone._MAX_KNOWN + 50):
            sock.settimeout(number)
            encoded(sock).failed()
        assert len(alone._pickles) <= alone._MAX_KNOWN
        assert len(alone._rebuilders) <= alone._MAX_KNOWN
        out = encoded(sock)
        with codec.decode(Incoming(bytes(out.payload[0]), [FdHandle.dup(sock)])) as received:
            assert received.type == socket.SOCK_STREAM
        out.failed()


def test_other_messages_with_one_descriptor_are_left_alone() -> None:
    with numbered_handle(7) as handle:
        for message in ({"it": handle}, [handle], (handle, 1)):
            out = encoded(message)
            assert alone.rebuilder(out.payload[0]) is None
            out.failed()
    assert alone.rebuilder(b"") is None
    assert alone.rebuilder(b"\x80\x05\x95" + bytes(8) + alone._GLOBAL + b"garbage") is None
    assert alone.rebuilder(bytes(1000)) is None


def _with_a_way_of_its_own() -> None:
    with socket.socket() as sock:
        encoded(sock).failed()
        encoded(sock).failed()
        fdshare.register(socket.socket, reduce=lambda s: (str, ("mine",)))
        assert codec.decode(Incoming(codec.encode(sock))) == "mine"


def test_what_the_user_registers_comes_first() -> None:
    checked_child(_with_a_way_of_its_own)


def test_subclasses_are_not_taken_for_their_base(pair: tuple[Channel, Channel]) -> None:
    class Mine(socket.socket):
        pass

    a, _ = pair
    with socket.socket() as sock, Mine(fileno=os.dup(sock.fileno())) as mine:
        encoded(sock).failed()
        with pytest.raises(NotSendableError):
            a.send(mine)
