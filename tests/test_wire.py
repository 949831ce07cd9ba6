"""The wire format as bytes alone: layout, bounds, and a parser that survives every cut and every wrong byte."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdshare import wire
from fdshare.errors import MessageTooLargeError, ProtocolError
from fdshare.wire import (
    BUNDLE,
    BYTES,
    FILE,
    HEADER_SIZE,
    IN_SEGMENT,
    MAX_BUFFERS,
    MAX_DESCRIPTORS,
    MAX_FDS_PER_PACKET,
    MAX_INLINE,
    MAX_SEGMENT,
    MESSAGE,
    NOTICE,
    SEGMENT,
    Header,
    StreamParser,
    align,
    frame,
    pack,
    pack_table,
    unpack,
    unpack_table,
)


@st.composite
def headers(draw: st.DrawFn, types: tuple[int, ...] = (MESSAGE, BYTES)) -> Header:
    """Headers that a correct sender may write."""
    has_segment = draw(st.booleans())
    flags = 0
    buffers = payload = segment = 0
    if has_segment:
        flags |= SEGMENT | draw(st.sampled_from([0, IN_SEGMENT])) | draw(st.sampled_from([0, FILE]))
        segment = draw(st.integers(0, MAX_SEGMENT))
        buffers = draw(st.integers(0, 100))
    bound = segment if flags & IN_SEGMENT else MAX_INLINE
    payload = draw(st.integers(min(8 * buffers, bound), bound))
    buffers = min(buffers, payload // 8)
    descriptors = draw(st.integers(0, MAX_DESCRIPTORS))
    if descriptors + has_segment > MAX_FDS_PER_PACKET:
        flags |= BUNDLE
    return Header(
        draw(st.sampled_from(types)),
        flags,
        descriptors,
        buffers,
        payload,
        segment,
        draw(st.integers(0, 2**64 - 1)),
    )


@given(headers(types=(MESSAGE, BYTES, NOTICE)))
def test_header_survives_the_wire(header: Header) -> None:
    data = pack(*header)
    assert len(data) == HEADER_SIZE
    assert unpack(data) == header
    assert unpack(memoryview(data + b"what follows")) == header


def test_layout_is_what_the_module_says() -> None:
    """The wire format itself: changing it breaks peers of another version."""
    data = pack(MESSAGE, SEGMENT | FILE, 0x0102, 1, 8, 0x1122334455, 0x0807060504030201)
    assert data.hex() == "01090000020100000100000000000000080000000000000055443322110000000102030405060708"
    assert HEADER_SIZE == 40


@given(headers())
def test_header_is_never_taken_for_a_pickle(header: Header) -> None:
    assert pack(*header)[0] < wire.PICKLE_MARK


@pytest.mark.parametrize(
    ("field", "value"),
    [("descriptors", MAX_DESCRIPTORS + 1), ("buffers", MAX_BUFFERS + 1), ("segment_size", MAX_SEGMENT + 1)],
)
def test_sender_stays_inside_the_bounds(field: str, value: int) -> None:
    arguments: dict[str, Any] = {"flags": SEGMENT | BUNDLE, field: value}
    with pytest.raises(MessageTooLargeError, match=rf"{value} .*MAX_\w+ is {value - 1}"):
        pack(MESSAGE, **arguments)


def raw(
    type: int = MESSAGE, flags: int = 0, zero: int = 0, fds: int = 0, buffers: int = 0, zero2: int = 0, payload: int = 0,
    segment: int = 0,
) -> bytes:  # fmt: skip
    """A header as a wrong or hostile peer may write it."""
    return struct.pack("<BBHIIIQQQ", type, flags, zero, fds, buffers, zero2, payload, segment, 0)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "shorter than its header"),
        (raw()[:-1], "shorter than its header"),
        (raw(type=0), "not a packet of this protocol"),
        (raw(type=4), "not a packet of this protocol"),
        (raw(type=0x7F), "not a packet of this protocol"),
        (raw(flags=32), "not a packet of this protocol"),
        (raw(zero=1), "not a packet of this protocol"),
        (raw(zero2=1), "not a packet of this protocol"),
        (raw(flags=BUNDLE, fds=MAX_DESCRIPTORS + 1), "over a bound"),
        (raw(flags=SEGMENT, buffers=MAX_BUFFERS + 1, payload=MAX_INLINE), "over a bound"),
        (raw(flags=SEGMENT, segment=MAX_SEGMENT + 1), "over a bound"),
        (raw(segment=1), "a segment that it does not have"),
        (raw(buffers=1, payload=8), "a segment that it does not have"),
        (raw(flags=IN_SEGMENT), "a segment that it does not have"),
        (raw(flags=FILE), "a segment that it does not have"),
        (raw(flags=SEGMENT | IN_SEGMENT, payload=11, segment=10), "a payload of 11 bytes in a segment of 10"),
        (raw(payload=MAX_INLINE + 1), "MAX_INLINE"),
        (raw(payload=2**64 - 1), "MAX_INLINE"),
        (raw(fds=MAX_FDS_PER_PACKET + 1), "without a bundle"),
        (raw(fds=MAX_FDS_PER_PACKET, flags=SEGMENT), "without a bundle"),
        (
            raw(flags=SEGMENT, buffers=2, payload=15, segment=9),
            "a table of 2 buffers in a payload of 15 bytes",
        ),
    ],
)
def test_wrong_header_is_a_protocol_error(data: bytes, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        unpack(data)


@given(st.binary(min_size=0, max_size=60) | headers().map(lambda header: pack(*header)), st.data())
def test_any_bytes_are_a_header_or_a_protocol_error(data: bytes, more: st.DataObject) -> None:
    """With a byte or two of a valid one changed, too; and what is accepted is canonical."""
    damaged = bytearray(data)
    for _ in range(more.draw(st.integers(0, 2)) if data else 0):
        damaged[more.draw(st.integers(0, len(data) - 1))] = more.draw(st.integers(0, 255))
    try:
        header = unpack(bytes(damaged))
    except ProtocolError:
        return
    assert pack(*header) == damaged[:HEADER_SIZE]
    assert header.inline_size <= MAX_INLINE
    assert header.carried <= MAX_FDS_PER_PACKET


# the buffer table


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 30))
def test_alignment(offset: int, size: int) -> None:
    start = align(offset, size)
    assert start >= offset
    assert start - offset < wire.PAGE
    assert start % (wire.PAGE if size >= wire.PAGE else wire.ALIGNMENT) == 0


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.booleans()), max_size=20), st.sampled_from([0, IN_SEGMENT])
)
def test_table_survives_the_wire(sizes: list[tuple[int, bool]], in_segment: int) -> None:
    views = [memoryview(bytes(n) if readonly else bytearray(n)) for n, readonly in sizes]
    payload = pack_table(views) + b"the pickle"
    end = 1_000_000
    header = Header(MESSAGE, SEGMENT | in_segment, 0, len(views), len(payload), end, 0)
    table = unpack_table(header, memoryview(payload))
    assert [(size, readonly) for _, size, readonly in table] == sizes
    position = len(payload) if in_segment else 0
    for start, size, _ in table:
        assert start >= position
        position = start + size
    assert position <= end


def test_empty_table() -> None:
    assert unpack_table(Header(MESSAGE, 0, 0, 0, 5, 0, 0), memoryview(b"12345")) == []


@pytest.mark.parametrize("entries", [[101], [50, 60], [2**63 - 1], [2**63 - 1] * 3, [2**64 - 1], [1, 2**62]])
def test_table_past_the_segment_is_a_protocol_error(entries: list[int]) -> None:
    payload = struct.pack(f"<{len(entries)}Q", *entries)
    header = Header(MESSAGE, SEGMENT, 0, len(entries), len(payload), 100, 0)
    with pytest.raises(ProtocolError, match="in a segment of 100"):
        unpack_table(header, memoryview(payload))


@pytest.mark.parametrize("length", [0, 7, 8, 15])
def test_table_cut_short_is_a_protocol_error(length: int) -> None:
    """The header has promised more payload than came."""
    header = Header(MESSAGE, SEGMENT, 0, 2, 16, 100, 0)
    with pytest.raises(ProtocolError):
        unpack_table(header, memoryview(bytes(length)))


# the stream parser


def a_frame(type: int, payload: bytes, descriptors: int = 0) -> bytes:
    return bytes(frame(pack(type, 0, descriptors, 0, len(payload)), [payload]))


def parse(data: bytes, cuts: list[int]) -> list[tuple[int, bytes | None]]:
    """Feed ``data`` in pieces that end at ``cuts``, never more than the parser wants, as a transport does."""
    parser = StreamParser()
    frames: list[tuple[int, bytes | None]] = []
    position = 0
    while position < len(data):
        end = min([position + parser.wanted, len(data), *(cut for cut in cuts if cut > position)])
        parser, result = parser.fed(data[position:end])
        position = end
        if result is not None:
            header, payload = result
            frames.append((header.type, None if payload is None else bytes(payload)))
            assert parser.idle
    assert parser.idle
    return frames


@given(
    st.lists(st.tuples(st.sampled_from([MESSAGE, BYTES]), st.binary(max_size=60)), max_size=5),
    st.lists(st.integers(1, 500), max_size=40),
)
def test_frames_come_out_whole_however_they_are_cut(
    messages: list[tuple[int, bytes]], cuts: list[int]
) -> None:
    data = b"".join(a_frame(type, payload) for type, payload in messages)
    assert parse(data, cuts) == messages


def test_one_byte_at_a_time() -> None:
    messages = [(MESSAGE, b""), (BYTES, b"x"), (MESSAGE, bytes(1000))]
    data = b"".join(a_frame(type, payload) for type, payload in messages)
    assert parse(data, list(range(len(data)))) == messages


def test_frame_that_was_given_up_has_no_payload_and_the_next_is_whole() -> None:
    given_up = a_frame(MESSAGE, b"never finish")[:-1] + b"\0"
    assert parse(given_up + a_frame(MESSAGE, b"next"), []) == [(MESSAGE, None), (MESSAGE, b"next")]


def test_wanted_never_reaches_into_the_next_frame() -> None:
    parser = StreamParser()
    assert (parser.idle, parser.wanted) == (True, HEADER_SIZE)
    header = pack(MESSAGE, 0, 3, 0, 10)
    parser, _ = parser.fed(header[:39])
    assert (parser.idle, parser.wanted) == (False, 1)
    parser, _ = parser.fed(header[39:])
    assert parser.header is not None
    assert (parser.header.descriptors, parser.wanted) == (3, 11)
    with pytest.raises(ProtocolError, match="frame lacks 11"):
        parser.fed(bytes(12))
    # the parser is a value: what failed has changed nothing
    _, frame_ = parser.fed(b"0123456789\x01")
    assert frame_ is not None
    assert bytes(frame_[1] or b"") == b"0123456789"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (pack(NOTICE), "a notice on a stream"),
        (b"\x80\x05" + bytes(38), "not a packet of this protocol"),
        (pack(MESSAGE) + b"\x02", "without its final byte"),
        (bytes(40), "not a packet of this protocol"),
    ],
    ids=["notice", "pickle", "final byte", "zeros"],
)
def test_wrong_stream_is_a_protocol_error(data: bytes, what: str) -> None:
    with pytest.raises(ProtocolError, match=what):
        parse(data, [])


@given(st.binary(max_size=300), st.lists(st.integers(1, 300), max_size=5))
def test_any_stream_gives_frames_or_a_protocol_error(data: bytes, cuts: list[int]) -> None:
    data = a_frame(BYTES, b"good") + data
    parser = StreamParser()
    position = 0
    try:
        while position < len(data):
            end = min([position + parser.wanted, len(data), *(cut for cut in cuts if cut > position)])
            parser, _ = parser.fed(data[position:end])
            position = end
    except ProtocolError:
        pass
