"""Malformed messages under a typed channel, by the thousand, and by the million in the soak run.

Each gives a typed error, or a message that is valid to the last field: whatever comes through must be what the codec itself
would send.  No descriptor stays, and no memory beyond the bound is taken.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import resource
import socket
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import attrs
import msgspec
import pytest
from helpers import SOCKET_TYPES, TRANSPORTS, Piece, capture, close_pieces, inject, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_fuzz import Stranger, damage
from typed_messages import (
    Declared,
    Empty,
    Everything,
    Files,
    Handles,
    Mode,
    Point,
    Positive,
    Private,
    Sockets,
    Tree,
)

from fdshare import (
    Channel,
    ClosedError,
    DecodeError,
    Descriptor,
    DescriptorsLostError,
    FdHandle,
    FdLimitError,
    PeerClosedError,
    Pipe,
    ProtocolError,
    TypedCodec,
    wire,
)
from fdshare.codec import Incoming, Outgoing
from fdshare.rights import open_numbers
from fdshare.testing import checked_child, numbered_handle

CLASSES = (Everything, Point, Private, Tree, Positive, Empty, Handles, Files, Sockets, Declared)
CODEC = TypedCodec(*CLASSES, max_bytes=1 << 20, max_items=10_000, max_fds=8)

REFUSED = 3_000
"""Messages that must be refused in the default run, for each transport."""

SOAK_RUNS, SOAK_REFUSED = 4, 125_000
"""Together, over both transports: a million."""

MEMORY = 2 << 30
"""Bytes of address space for a run; what it really takes is held against GROWTH."""

GROWTH = 48 << 10
"""KiB by which a run may grow: the messages are up to a mebibyte, in text that may take four, and in ten thousand objects."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 255, 2**31, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, 1.5, float("nan"), float("inf"), "", "get", "RED", "\U0001f600", "x" * 300, b"", b"\xff" * 40),
    *([], {}, [None], {"a": 1}, [[]], "Everything", ["Empty"], ["Point", 1, 2.0], [0, 1], [1, "x"]),
    msgspec.msgpack.Ext(1, b"x"),
)

CLAIMS = (
    b"\xdd\xff\xff\xff\xff",
    b"\xdc\xff\xff",
    b"\xdf\x7f\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xdb\x10\x00\x00\x00",
    b"\xc9\xff\xff\xff\xff",
)

TYPED = (DecodeError, ProtocolError, DescriptorsLostError)


def messages(stranger: Stranger) -> Iterator[Any]:
    """Valid messages, whose descriptors are borrowed."""
    yield Everything()
    yield Everything(
        True, -5, 1.5, "text é", b"bytes", None, "x", mode=Mode.READ | Mode.WRITE, numbers=[1, 2, 3], names=("a", "b"),
        tags={"x", "y"}, fixed=frozenset({1, 2}), table={"a": [Point(1, 2.0)]}, places={(1, 2): b"x"}, either=[b"x"],
        point=Point(3, 4.0),
    )  # fmt: skip
    yield Private(secret="s")
    yield Positive(1)
    yield Empty()
    yield Tree("root", [Tree("a", [Tree("b")]), Tree("c")], Tree("d"))
    yield Everything(data=bytes(70_000))
    yield Everything(data=bytes(200_000))
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(numbered_handle(i)) for i in range(4)]
        reader = stack.enter_context(open(__file__, "rb"))
        text = stack.enter_context(open(__file__, encoding="utf-8"))
        here, there = Pipe(codec=CODEC)
        stack.enter_context(here)
        stack.enter_context(there)
        directory = stack.enter_context(FdHandle(os.open("/", os.O_RDONLY)))
        yield Handles(handles[0], handles)
        yield Files(binary=reader, reader=reader, text=text)
        yield Sockets(stranger.sockets[0], here)
        yield Declared(anything=directory, directory=directory)


def samples(transport: str, stranger: Stranger) -> list[list[Piece]]:
    """One message of each kind, as a channel sends it."""
    found = []
    for message in messages(stranger):
        ours, bare = socket.socketpair(socket.AF_UNIX, SOCKET_TYPES[transport])
        bare.settimeout(20)
        with bare, Channel(ours, codec=CODEC) as channel:
            channel.send(message)
            found.append(capture(bare))
    return found


def payload_of(pieces: list[Piece]) -> bytes:
    data = b"".join(data for data, _ in pieces)
    start = 0
    while data[start] == wire.NOTICE:
        start += wire.HEADER_SIZE
    header = wire.unpack(data[start:])
    return data[start + wire.HEADER_SIZE :][: header.inline_size]


def change(tree: Any, choose: random.Random) -> Any:
    """Return a tree of MessagePack values with one place changed."""
    if isinstance(tree, list) and tree and choose.random() < 0.85:
        place = choose.randrange(len(tree))
        match choose.randrange(8):
            case 0:
                return [*tree[:place], *tree[place + 1 :]]
            case 1:
                return [*tree[:place], choose.choice(VALUES), *tree[place:]]
            case 2:
                return [*tree, *tree[place:]]
            case _:
                return [*tree[:place], change(tree[place], choose), *tree[place + 1 :]]
    if choose.random() < 0.02:
        for _ in range(choose.choice([3, 30, 300])):
            tree = [tree]
        return tree
    return choose.choice(VALUES)


def wrap(transport: str, payload: bytes, fds: list[int], choose: random.Random) -> list[Piece]:
    """Return the pieces that carry ``payload``, with a header that fits it."""
    count = len(fds)
    if choose.random() < 0.05:
        count = choose.choice([0, 1, 2, 3, 8, 9, 100, 254, wire.MAX_DESCRIPTORS])
    if choose.random() < 0.03 and fds:  # in a segment, or what is said to be one
        size = choose.choice([0, 1, 1000, 1 << 20, 1 << 40])
        flags = choose.choice([5, 5, 5, 13, 21, 7, 1])
        header = wire._LAYOUT.pack(1, flags, 0, max(count - 1, 0), 0, 0, size, size, 0)
        payload = b""
    else:
        header = wire._LAYOUT.pack(1, 0, 0, count, 0, 0, len(payload), 0, 0)
    if transport == "seqpacket":
        payload = payload[:150_000]  # what a socket takes at all
        notice = [(wire.pack(wire.NOTICE, 0, min(count, 300)), [])] if choose.random() < 0.3 else []
        return [*notice, (header + payload, fds)]
    rest = payload + bytes([choose.random() > 0.02])
    return [(header, []), (rest[:1], fds), (rest[1:], [])]


def malformed(
    transport: str,
    wholes: list[list[Piece]],
    plain: list[tuple[bytes, list[int]]],
    choose: random.Random,
    stranger: Stranger,
) -> list[Piece]:
    """Return the pieces of a message with something wrong."""
    kind = choose.randrange(100)
    if kind < 15:  # at the level of packets and frames
        return damage(choose.choice(wholes), choose, stranger)
    payload, fds = choose.choice(plain)
    fds = list(fds)
    if kind < 55:  # a tree that is MessagePack still
        tree = msgspec.msgpack.decode(payload)
        for _ in range(choose.choice([1, 1, 2, 3])):
            tree = change(tree, choose)
        payload = msgspec.msgpack.encode(tree)
    elif kind < 75:  # bytes
        changed = bytearray(payload)
        for _ in range(choose.choice([1, 1, 2, 8])):
            changed[choose.randrange(len(changed))] = choose.randrange(256)
        payload = bytes(changed)
    elif kind < 80:
        payload = payload[: choose.randrange(len(payload))]
    elif kind < 85:
        place = choose.randrange(len(payload))
        payload = payload[:place] + choose.choice(CLAIMS) + payload[place:]
    elif kind < 90:
        payload = choose.randbytes(choose.choice([0, 1, 5, 50, 500]))
    elif kind < 93:
        payload = b"\x91" * choose.choice([10, 100, 2000, 60_000])
    else:  # the message is good, its descriptors are not
        fds = [stranger.pick(choose) for _ in range(choose.choice([0, 1, 1, 2, 3, 7, 9, 60]))]
    if fds and choose.random() < 0.2:
        fds[choose.randrange(len(fds))] = stranger.pick(choose)
    return wrap(transport, payload, fds, choose)


def close_all(value: Any) -> None:
    """Close every descriptor in a received message."""
    if attrs.has(type(value)) and not isinstance(value, FdHandle | Descriptor):
        for field in attrs.fields(type(value)):
            close_all(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            close_all(item)
    elif hasattr(value, "close"):
        value.close()


def check_valid(message: Any) -> None:
    """Check that the codec would have sent this very message."""
    assert type(message) in CLASSES
    encoded = CODEC.encode(message)
    if isinstance(encoded, Outgoing):
        encoded.failed()


class Target:
    """A typed channel that is replaced when it was closed, and what it made of the messages."""

    def __init__(self, transport: str) -> None:
        self.type = SOCKET_TYPES[transport]
        self.counts: dict[str, int] = {}
        self._open()

    def _open(self) -> None:
        ours, self.bare = socket.socketpair(socket.AF_UNIX, self.type)
        self.bare.setblocking(False)
        self.channel = Channel(ours, codec=CODEC)

    def close(self) -> None:
        self.bare.close()
        self.channel.close()

    def feed(self, pieces: list[Piece], last: bool) -> int:
        """Put pieces in and receive what comes out; return how many messages were refused."""
        refused, delivered = 0, False
        with contextlib.suppress(BlockingIOError):
            inject(self.bare, [(data, fds) for data, fds in pieces if data])
        if last:
            self.bare.shutdown(socket.SHUT_WR)
        while True:
            try:
                message = self.channel.recv(timeout=10 if last else 0)
                name = type(message).__name__
                check_valid(message)
                close_all(message)
                del message
                delivered = True
            except TYPED as error:
                name = type(error).__name__
                refused += 1
            except FdLimitError:
                raise AssertionError(
                    "a typed channel refuses what it does not allow, and keeps it not"
                ) from None
            except (TimeoutError, PeerClosedError, ClosedError):
                break
            self.counts[name] = self.counts.get(name, 0) + 1
        if last or self.channel.closed:
            self.close()
            self._open()
        return refused or (not delivered)


def _await_numbers(expected: set[int], what: str) -> None:
    """Wait until these descriptors are open and no others: what a stranger had queued is closed off this thread."""
    gc.collect()
    try:
        wait_until(lambda: set(open_numbers()) == expected)
    except AssertionError as error:
        raise AssertionError(what) from error


def _fuzz(transport: str, seed: int, target: int) -> dict[str, int]:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    warnings.simplefilter("ignore")  # of messages that are dropped unread
    choose = random.Random(seed)
    stranger = Stranger()
    wholes = samples(transport, stranger)
    plain = []
    for pieces in wholes:
        payload = payload_of(pieces)
        if payload:
            plain.append((payload, [fd for _, fds in pieces for fd in fds]))
    under = Target(transport)
    refused, round, before, grown = 0, 0, None, 0
    while refused < target:
        round += 1
        pieces = malformed(transport, wholes, plain, choose, stranger)
        what = f"round {round} of seed {seed}: {[(data[:80].hex(), len(data), fds) for data, fds in pieces]}"
        try:
            # A stream that is out of step would take the next message for its rest.
            refused += under.feed(pieces, last=transport == "stream" or round % 50 == 0)
        except Exception as error:
            raise AssertionError(f"not a typed error: {what}") from error
        if round % 50 == 0:
            if before is not None and set(open_numbers()) != before:
                _await_numbers(before, what)
            before = set(open_numbers())
        if round == 500:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    under.close()
    stranger.close()
    for pieces in wholes:
        close_pieces(pieces)
    if grown:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < grown + GROWTH
    return under.counts


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_malformed_messages(transport: str) -> None:
    counts = checked_child(_fuzz, transport, 1, REFUSED)
    # The fuzzer gets past the first check: every layer has refused something, and something has passed.
    assert counts["DecodeError"] > 1000, counts
    assert counts["ProtocolError"] > 50, counts
    assert counts["DescriptorsLostError"] > 5, counts
    assert counts["Everything"] > 10, counts
    assert counts["Handles"] > 5, counts


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("seed", range(2, 2 + SOAK_RUNS))
def test_a_million_malformed_messages(transport: str, seed: int) -> None:
    checked_child(_fuzz, transport, seed, SOAK_REFUSED, timeout=3500)


# anything at all, straight into the codec

leaves = st.sampled_from(
    [value for value in VALUES if not isinstance(value, msgspec.msgpack.Ext)]
) | st.integers(-(2**63), 2**64 - 1)
trees = st.recursive(
    leaves | st.text(max_size=8) | st.binary(max_size=8) | st.floats(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=30,
)
names = st.sampled_from([cls.__name__ for cls in CLASSES])
near = st.builds(lambda name, fields: [name, *fields], names, st.lists(trees, max_size=24))
payloads = st.binary(max_size=200) | st.builds(msgspec.msgpack.encode, trees | near)


def _anything(examples: int) -> int:
    done = 0
    stranger = Stranger()
    sorts = [*stranger.numbers, *(sock.fileno() for sock in stranger.sockets)]

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(payloads, st.lists(st.sampled_from(sorts), max_size=9))
    def check(payload: bytes, fds: list[int]) -> None:
        nonlocal done
        before = set(open_numbers())
        try:
            message = CODEC.decode(Incoming(payload, [FdHandle.dup(fd) for fd in fds]))  # type: ignore[arg-type]  # a converter
        except DecodeError:
            pass
        else:
            check_valid(message)
            close_all(message)
        _await_numbers(before, "after all of them")
        done += 1

    check()
    stranger.close()
    return done


def test_anything_at_all() -> None:
    """Payloads and descriptors of hypothesis's making."""
    assert checked_child(_anything, 250) >= 200


@given(st.binary(max_size=80), st.integers(1, 40), st.integers(1, 8))
def test_scan_never_fails_otherwise(data: bytes, max_items: int, max_depth: int) -> None:
    from fdshare.typed.codec import scan

    for payload in (data, memoryview(data)):
        with contextlib.suppress(DecodeError):
            scan(payload, max_items, max_depth)


@given(trees)
def test_scan_counts_right(tree: Any) -> None:
    """Against a count of what msgspec makes of it."""
    from fdshare.typed.codec import scan

    def size(value: Any) -> tuple[int, int]:
        """Return the number of values, and the depth."""
        if not isinstance(value, list | dict):
            return 1, 0
        inner = value if isinstance(value, list) else [*value, *value.values()]
        sizes = [size(item) for item in inner]
        return 1 + sum(items for items, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)

    data = msgspec.msgpack.encode(tree)
    items, depth = size(tree)
    scan(data, items, depth)
    for fewer, shallower in ((items - 1, depth), (items, depth - 1)):
        if shallower >= 0:
            with pytest.raises(DecodeError):
                scan(data, fewer, shallower)


def test_struct_sizes() -> None:
    """The header that the fuzzer writes is the one of the protocol."""
    assert struct.calcsize("<BBHIIIQQQ") == wire.HEADER_SIZE
