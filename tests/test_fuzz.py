"""Wrong bytes and wrong descriptors under a channel: only typed errors, and nothing left over.

Each run is a child process whose memory is bounded: a pickle of wrong bytes may well ask for 64 GiB.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import random
import resource
import socket
import struct
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from helpers import LARGE, Piece, bare_pair, capture, close_pieces, inject
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdshare import ClosedError, FdHandle, FdLimitError, FdShareError, PeerClosedError, memory, wire
from fdshare.rights import open_numbers
from fdshare.testing import checked_child, numbered_handle, pattern

ROUNDS = 1500
MEMORY = 4 << 30  # bytes of address space for a run
NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    253,
    254,
    0x7F,
    0xFF,
    0xFFFF,
    65_537,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**44,
    2**63,
    2**64 - 1,
)


class Stranger:
    """Descriptors of every sort, to be sent where another was meant."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        left, right = socket.socketpair()
        datagram, packet = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        unsealed = os.memfd_create("stranger", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(unsealed, 1 << 20)
        self.sockets = [left, right, datagram, packet]
        self.numbers = [reader, writer, unsealed, os.open("/", os.O_RDONLY), os.open("/dev/null", os.O_RDWR)]

    def pick(self, choose: random.Random) -> int:
        return choose.choice([*self.numbers, *(sock.fileno() for sock in self.sockets)])

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        for number in self.numbers:
            os.close(number)


def samples(transport: str) -> list[list[Piece]]:
    """One message of each kind, as a channel sends it."""
    found = []
    handles = [numbered_handle(i) for i in range(5)]
    many = [FdHandle.dup(0) for _ in range(300)]
    memory.HAVE_PIPE_SIZE = False  # what is in a pipe can be read once: no sample for a thousand rounds
    reader, writer = os.pipe()
    with open(reader, "rb") as r, open(writer, "wb") as w:
        for message in (
            {"plain": [1, 2.5, "text", None]},
            handles,
            [r, w, {"again": handles[0]}],
            bytearray(pattern(LARGE)),
            bytes(5_000),
            ([bytearray(pattern(LARGE))] * 3, handles),
            [pickle.PickleBuffer(bytearray(LARGE)), pickle.PickleBuffer(bytes(LARGE)), handles[0]],
            many,
        ):
            with bare_pair(transport) as (channel, bare):
                channel.send(message)
                found.append(capture(bare))
        with bare_pair(transport) as (channel, bare):
            channel.send_bytes(b"bytes")
            found.append(capture(bare))
        for memory.HAVE_PIPE_SIZE, memory.HAVE_MEMFD in ((False, False), (True, True)):
            with bare_pair(transport) as (channel, bare):
                channel.send(bytearray(LARGE))
                found.append(capture(bare))
    for handle in handles + many:
        handle.close()
    return found


def damage(pieces: list[Piece], choose: random.Random, stranger: Stranger) -> list[Piece]:
    """Return the pieces of a message with one to three things wrong."""
    pieces = [(data, list(fds)) for data, fds in pieces]
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        if not pieces:
            break
        index = choose.randrange(len(pieces))
        data, fds = pieces[index]
        match choose.randrange(11):
            case 0 | 1 | 2 if data:  # a wrong byte, near the start more often
                place = choose.randrange(min(len(data), choose.choice([4, 48, 200, len(data)])))
                data = data[:place] + bytes([choose.randrange(256)]) + data[place + 1 :]
            case 3 if len(data) >= wire.HEADER_SIZE:  # a wrong number in the header, or in the table after it
                size, layout = choose.choice([(4, "<I"), (8, "<Q")])
                place = choose.randrange(0, min(len(data) - size, 64) + 1, 4)
                number = choose.choice(NUMBERS) % (1 << 8 * size)
                data = data[:place] + struct.pack(layout, number) + data[place + size :]
            case 4:
                data = data[: choose.randrange(len(data) + 1)]
            case 5:
                data += choose.randbytes(choose.choice([1, 8, 100]))
            case 6:
                fds = fds[: choose.randrange(len(fds) + 1)]
            case 7:
                fds = [*fds, stranger.pick(choose)][:253]
            case 8 if fds:
                fds[choose.randrange(len(fds))] = stranger.pick(choose)
            case 9:
                pieces.insert(choose.randrange(len(pieces) + 1), (data, fds))
                continue
            case _:
                del pieces[index]
                continue
        pieces[index] = (data, fds)
    return pieces


def receive_everything(transport: str, pieces: list[Piece]) -> list[str]:
    """Put the pieces under a channel and receive until its end; return what came, by type."""
    outcomes = []
    with bare_pair(transport) as (channel, bare):
        bare.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # full: that is the end of it, then
            inject(bare, [(data, fds) for data, fds in pieces if data])
        bare.shutdown(socket.SHUT_WR)
        while True:
            try:
                message = channel.recv(timeout=10)
                outcomes.append(type(message).__name__)
                del message
            except (PeerClosedError, ClosedError):
                return outcomes
            except FdShareError as error:
                outcomes.append(type(error).__name__)
                if isinstance(
                    error, FdLimitError
                ):  # declares more than this process may have, so it stays queued
                    return outcomes


def bound_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    warnings.simplefilter(
        "ignore"
    )  # of messages that are dropped unread, and of what wrong pickles bring about


def open_descriptors() -> set[str]:
    return set(open_numbers())


def _fuzz(transport: str, seed: int, rounds: int) -> dict[str, int]:
    bound_memory()
    choose = random.Random(seed)
    counts: dict[str, int] = {}
    stranger = Stranger()
    messages = samples(transport)
    receive_everything(transport, messages[0])
    before = open_descriptors()
    for round in range(rounds):
        pieces = damage(choose.choice(messages), choose, stranger)
        if choose.random() < 0.3:
            pieces += choose.choice(messages)
        what = f"round {round} of seed {seed}: {[(data[:80].hex(), len(data), fds) for data, fds in pieces]}"
        try:
            for outcome in receive_everything(transport, pieces):
                counts[outcome] = counts.get(outcome, 0) + 1
        except Exception as error:
            raise AssertionError(f"not a typed error: {what}") from error
        if open_descriptors() != before:
            gc.collect()
            assert open_descriptors() == before, what
    stranger.close()
    for message in messages:
        close_pieces(message)
    return counts


def test_damaged_messages(transport: str) -> None:
    """Messages of a real channel with bytes, lengths, descriptors and whole packets wrong."""
    counts = checked_child(_fuzz, transport, 1, ROUNDS)
    # The fuzzer gets past the first check: every layer has refused something, and something has passed.
    assert counts["ProtocolError"] > 50, counts
    assert counts["DecodeError"] > 50, counts
    assert counts["DescriptorsLostError"] > 10, counts
    assert counts["dict"] > 10, counts


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2, 8))
def test_damaged_messages_for_long(transport: str, seed: int) -> None:
    checked_child(_fuzz, transport, seed, 40_000, timeout=850)


# anything at all

numbers = st.sampled_from(NUMBERS) | st.integers(0, 300)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    fields = [draw(st.sampled_from([1, 2, 3]) | numbers) % 256, draw(st.integers(0, 15) | numbers) % 256]
    fields += [
        draw(st.just(0) | numbers) % 65536,
        draw(numbers) % 2**32,
        draw(numbers) % 2**32,
        draw(st.just(0) | numbers) % 2**32,
    ]
    return struct.pack("<BBHIIIQQQ", *fields, draw(numbers), draw(numbers), draw(numbers))


pickles = st.sampled_from([pickle.dumps("text"), pickle.dumps([1, 2]), b"\x80\x05", b"\x80\x05N", b"N.", b""])
contents = (
    st.binary(max_size=60)
    | pickles
    | st.builds(bytes.__add__, headers(), pickles | st.binary(max_size=300))
    | headers()
)
piece_lists = st.lists(st.tuples(contents, st.integers(0, 4)), max_size=5)


def _anything(transport: str, examples: int) -> int:
    bound_memory()
    done = 0
    stranger = Stranger()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(piece_lists, st.integers(0, 9))
    def check(pieces: list[tuple[bytes, int]], offset: int) -> None:
        nonlocal done
        sorts = [*stranger.numbers, *(sock.fileno() for sock in stranger.sockets)]
        before = open_descriptors()
        receive_everything(
            transport, [(data, [sorts[(offset + i) % len(sorts)] for i in range(n)]) for data, n in pieces]
        )
        if open_descriptors() != before:
            gc.collect()
            assert open_descriptors() == before
        done += 1

    check()
    stranger.close()
    return done


def test_anything_at_all(transport: str) -> None:
    """Packets and streams of hypothesis's making."""
    assert checked_child(_anything, transport, 200) >= 150


@pytest.mark.parametrize(
    "data", [b"\x80\x05", b"\x03" + bytes(39), b"\x01" + bytes(39), b"\x02" + bytes(39), b"garbage"]
)
def test_other_calls_meet_garbage_too(transport: str, data: bytes) -> None:
    calls: list[Callable[[Any], object]] = [
        lambda channel: channel.recv_bytes(),
        lambda channel: channel.recv_bytes_into(bytearray(100)),
        lambda channel: channel.poll(0.01) and channel.recv(),
        lambda channel: list(channel),
    ]
    for call in calls:
        with bare_pair(transport) as (channel, bare):
            inject(bare, [(data, [])])
            bare.shutdown(socket.SHUT_WR)
            with contextlib.suppress(FdShareError):
                call(channel)
