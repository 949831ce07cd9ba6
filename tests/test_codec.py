"""The codec alone: objects to packets and back, through bytes and duplicated descriptors, without a socket."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fdshare
from fdshare import parcel
from fdshare.codec import INLINE_BUFFER, Incoming, Outgoing, PickleCodec
from fdshare.errors import DecodeError, FdShareError, NotSendableError
from fdshare.handle import FdHandle, move
from fdshare.testing import leak_check, numbered_handle, read_number
from fdshare.wire import MAX_INLINE, PICKLE_MARK

codec = PickleCodec()


def arrived(encoded: bytes | Outgoing) -> Incoming:
    """What the other side gets: the same bytes, its own descriptors, its own memory."""
    if isinstance(encoded, bytes):
        return Incoming(encoded)
    buffers = [memoryview(bytes(b) if b.readonly else bytearray(b)) for b in encoded.buffers]
    return Incoming(b"".join(encoded.payload), [FdHandle.dup(fd) for fd in encoded.fds], buffers)


def round_trip(obj: Any) -> Any:
    encoded = codec.encode(obj)
    message = arrived(encoded)
    if isinstance(encoded, Outgoing):
        encoded.sent()
    return codec.decode(message)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


@given(plain)
def test_small_message_is_one_pickle(obj: object) -> None:
    encoded = codec.encode(obj)
    assert isinstance(encoded, bytes)
    assert encoded[0] == PICKLE_MARK
    assert codec.decode(Incoming(encoded)) == obj
    assert codec.decode(Incoming(pickle.dumps(obj))) == obj


@pytest.mark.parametrize(
    "size", [0, 1, INLINE_BUFFER - 1, INLINE_BUFFER, MAX_INLINE - 100, MAX_INLINE, 5_000_000]
)
@pytest.mark.parametrize("kind", [bytes, bytearray, str])
def test_every_size(kind: type, size: int) -> None:
    obj = "x" * size if kind is str else kind(b"x" * size)
    encoded = codec.encode({"part": obj})
    assert isinstance(encoded, Outgoing) or len(encoded) <= MAX_INLINE
    result = round_trip({"part": obj})["part"]
    assert result == obj
    assert type(result) is kind


def test_arrays_travel_outside_the_pickle_and_arrive_writable() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(100_000, dtype="int64")
    frozen = array.copy()
    frozen.flags.writeable = False
    encoded = codec.encode([array, frozen, array[:10]])
    assert isinstance(encoded, Outgoing)
    assert [b.nbytes for b in encoded.buffers] == [800_000, 800_000]
    assert sum(map(len, encoded.payload)) < 2000
    encoded.failed()
    first, second, small = round_trip([array, frozen, array[:10]])
    assert (first == array).all()
    assert (second == frozen).all()
    assert (small == array[:10]).all()
    assert first.flags.writeable
    assert not second.flags.writeable
    first[0] = 7
    assert array[0] == 0


def test_one_array_twice_is_one_buffer_and_one_object() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.ones(100_000)
    encoded = codec.encode((array, array))
    assert isinstance(encoded, Outgoing)
    assert len(encoded.buffers) == 1
    encoded.failed()
    first, second = round_trip((array, array))
    assert first is second


def test_descriptors_are_borrowed_in_order_each_once() -> None:
    handles = [numbered_handle(i) for i in range(5)]
    encoded = codec.encode({"a": handles, "again": handles[2]})
    assert isinstance(encoded, Outgoing)
    assert encoded.fds == [handle.fileno() for handle in handles]
    message = arrived(encoded)
    encoded.sent()
    result = codec.decode(message)
    assert result["again"] is result["a"][2]
    assert [read_number(handle) for handle in result["a"]] == list(range(5))
    for handle in handles:
        handle.close()


def test_moved_is_closed_when_sent_and_kept_when_not() -> None:
    with numbered_handle(1) as handle:
        encoded = codec.encode([move(handle)])
        assert isinstance(encoded, Outgoing)
        encoded.failed()
        assert not handle.closed
        encoded = codec.encode([move(handle)])
        assert isinstance(encoded, Outgoing)
        message = arrived(encoded)
        encoded.sent()
        assert handle.closed
        assert read_number(codec.decode(message)[0]) == 1


def test_encoding_changes_nothing() -> None:
    """An encoded message that is never sent leaves what it was to move with its owner."""
    with numbered_handle(1) as handle, leak_check():
        for _ in range(3):
            encoded = codec.encode({"moved": move(handle), "big": bytearray(MAX_INLINE)})
            del encoded
        assert not handle.closed


@pytest.mark.parametrize("size", [100, 80_000, INLINE_BUFFER - 1, 2 * MAX_INLINE])
def test_sealed_message_is_a_copy(size: int) -> None:
    """A parcel waits: its sender may close and change what it sent."""
    handle, data = numbered_handle(9), bytearray(b"a" * size)
    sealed = parcel.seal(codec.encode((handle, pickle.PickleBuffer(data))), 1)
    handle.close()
    data[:] = b"b" * size
    here, there = fdshare.Pipe()
    with here, there:
        parcel.send(here, sealed)
        received, content = there.recv(timeout=10)
    assert read_number(received) == 9
    assert bytes(content) == b"a" * size
    assert isinstance(sealed, parcel.Parcel)
    sealed.close()


def test_closures_and_lambdas_travel() -> None:
    with numbered_handle(3) as handle:
        function = round_trip(lambda: handle)
        assert function() is not handle
        assert read_number(function()) == 3
    base = 10
    assert round_trip({"f": lambda n: n + base})["f"](1) == 11


class Job:
    def __init__(self, log: object) -> None:
        self.log = log


class SlottedJob:
    __slots__ = ("log",)

    def __init__(self, log: object) -> None:
        self.log = log


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda bad: bad, "message"),
        (lambda bad: [1, 2, bad], "message[2]"),
        (lambda bad: {"jobs": [0, 1, 2, Job(bad)]}, "message['jobs'][3].log"),
        (lambda bad: {"jobs": (SlottedJob([bad]),)}, "message['jobs'][0].log[0]"),
        (lambda bad: {("key", 1): {"deep": [[[bad]]]}}, "message[('key', 1)]['deep'][0][0][0]"),
        (lambda bad: Job(move(bad)), "message.log"),
    ],
    ids=["itself", "list", "object", "slots", "deep", "moved"],
)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside_descriptors"])
def test_unsendable_object_is_named_with_its_path(build: Any, path: str, beside: bool) -> None:
    bad = threading.Lock()
    with numbered_handle(1) as handle, leak_check(closed=True):
        message = build(bad)
        if beside:
            message, path = [handle, message], path.replace("message", "message[1]", 1)
        with pytest.raises(NotSendableError) as caught:
            codec.encode(message)
        assert caught.value.path == path
        assert caught.value.type_name == "_thread.lock"
        assert path in str(caught.value)
        assert isinstance(caught.value, TypeError)
        assert isinstance(caught.value, pickle.PicklingError)
        assert not handle.closed


def test_closed_handle_is_refused() -> None:
    handle = numbered_handle(1)
    handle.close()
    with pytest.raises(NotSendableError, match=r"message\[0\].*closed"):
        codec.encode([handle])


def test_endless_structure_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(NotSendableError):
        codec.encode(deep)
    while deep:  # freed from the outside in: recursively it would overflow the C stack
        deep = deep[0]


def test_codec_goes_on_after_a_failure() -> None:
    """The encoder that failed half-way leaves nothing for the next message."""
    with numbered_handle(1) as handle:
        for _ in range(20):
            with pytest.raises(NotSendableError):
                codec.encode([handle, move(handle), bytearray(MAX_INLINE), threading.Lock()])
            assert isinstance(codec.encode("clean"), bytes)
        assert not handle.closed


class Explodes:
    """Pickles well, and raises ``error`` when it is rebuilt."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> tuple[Any, ...]:
        return _explode, (self.error,)


def _explode(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("on purpose"),
        ImportError("no such module"),
        MemoryError(),
        RecursionError(),
        OSError(24, "EMFILE"),
    ],
)
@pytest.mark.parametrize("where", ["first", "last"])
def test_message_that_cannot_be_rebuilt(error: Exception, where: str) -> None:
    """A typed error, and every descriptor of the message is closed, those already rebuilt into objects too."""
    with numbered_handle(1) as handle, open("/dev/null") as file, leak_check():
        parts = [handle, file, Explodes(error)]
        encoded = codec.encode(parts[::-1] if where == "first" else parts)
        message = arrived(encoded)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ResourceWarning)
            with pytest.raises(DecodeError, match=type(error).__name__) as caught:
                codec.decode(message)
        assert caught.value.__cause__ is not None
        assert isinstance(caught.value, pickle.UnpicklingError)
        assert all(h.closed for h in message.handles)
        del caught


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_interrupt_while_rebuilding_closes_and_passes(error: BaseException) -> None:
    with numbered_handle(1) as handle, leak_check():
        message = arrived(codec.encode([handle, Explodes(error)]))
        with pytest.raises(type(error)):
            codec.decode(message)
        assert all(h.closed for h in message.handles)


def test_descriptors_nobody_took_are_closed() -> None:
    """The sender's class decides what it keeps of what came with it."""
    with leak_check():
        message = Incoming(pickle.dumps("no descriptor mentioned"), [numbered_handle(i) for i in range(3)])
        assert codec.decode(message) == "no descriptor mentioned"
        assert all(handle.closed for handle in message.handles)


def test_closing_an_undecoded_message_closes_its_descriptors() -> None:
    message = Incoming(b"", [numbered_handle(1)])
    message.close()
    assert message.handles[0].closed


class Nested:
    """Decodes another message while it is being rebuilt itself."""

    def __init__(self, inner: bytes, handle: FdHandle) -> None:
        self.inner, self.handle = inner, handle

    def __reduce__(self) -> tuple[Any, ...]:
        return _decode_nested, (self.inner, self.handle)


def _decode_nested(inner: bytes, handle: FdHandle) -> tuple[Any, FdHandle]:
    return codec.decode(Incoming(inner)), handle


def test_decoding_inside_decoding() -> None:
    with numbered_handle(1) as handle, numbered_handle(2) as other:
        inner = pickle.dumps("inner")
        (decoded, received), last = round_trip([Nested(inner, handle), other])
        assert decoded == "inner"
        assert (read_number(received), read_number(last)) == (1, 2)


@given(st.data())
def test_any_bytes_decode_or_raise_a_typed_error(data: st.DataObject) -> None:
    """Garbage, and valid pickles with a byte changed or cut off; descriptors are closed or handed over."""
    with numbered_handle(1) as handle:
        valid = b"".join(codec.encode({"a": [handle, "text", 12345], "b": handle}).payload)  # type: ignore[union-attr]
        damaged = bytearray(data.draw(st.just(valid) | st.binary(max_size=50)))
        if damaged:
            for _ in range(data.draw(st.integers(0, 2))):
                damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
            damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
        if _runs_code(damaged):
            return
        message = Incoming(bytes(damaged), [FdHandle.dup(handle)])
        kept: list[FdHandle] = list(message.handles)
        try:
            codec.decode(message)
        except FdShareError:
            assert all(h.closed for h in kept)
        for h in kept:
            h.close()
        del message
        gc.collect(0)


def _runs_code(pickled: bytes | bytearray) -> bool:
    """Whether it names another function than ours: unpickling is for trusted peers, a fuzzer's luck is not."""
    import pickletools

    try:
        named = [arg for op, arg, _ in pickletools.genops(bytes(pickled)) if isinstance(arg, str)]
    except Exception:  # noqa: BLE001 -- pickletools raises anything for garbage
        return False
    return not set(named) <= {"a", "b", "text", "fdshare.reducers", "take"}


def test_descriptor_index_out_of_range_is_a_decode_error() -> None:
    with numbered_handle(1) as handle:
        encoded = codec.encode([handle])
        assert isinstance(encoded, Outgoing)
        with pytest.raises(DecodeError, match="descriptor 0 of a message that has 0"):
            codec.decode(Incoming(b"".join(encoded.payload)))


def test_descriptor_of_another_format_is_a_decode_error() -> None:
    """The sender declares what it sends; the receiver looks."""
    with numbered_handle(1) as handle:
        encoded = codec.encode([handle])
        assert isinstance(encoded, Outgoing)
        message = Incoming(b"".join(encoded.payload), [FdHandle(os.open("/", os.O_RDONLY))])
        with pytest.raises(DecodeError, match="declared as"):
            codec.decode(message)
        assert message.handles[0].closed


def test_pickle_with_descriptors_outside_a_message_is_refused() -> None:
    with numbered_handle(1) as handle:
        encoded = codec.encode([handle])
        assert isinstance(encoded, Outgoing)
        with pytest.raises(DecodeError, match="outside its channel"):
            pickle.loads(b"".join(encoded.payload))


def test_threads_encode_at_the_same_time() -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with numbered_handle(number) as handle:
                for i in range(200):
                    encoded = codec.encode([number, i, handle])
                    assert isinstance(encoded, Outgoing)
                    message = arrived(encoded)
                    encoded.sent()
                    a, b, received = codec.decode(message)
                    assert (a, b) == (number, i)
                    received.close()
        except BaseException as error:  # noqa: BLE001 -- asserted below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors


def test_one_failing_close_of_what_was_moved_stops_neither_the_others_nor_the_send(
    caplog: pytest.LogCaptureFixture,
) -> None:
    closed: list[str] = []

    def fail() -> None:
        raise OSError("no space left for what was buffered")

    out = Outgoing()
    out._consumed = [fail, lambda: closed.append("second")]
    out.sent()
    assert closed == ["second"]
    assert "no space left" in caplog.text
