"""What a typed message may cost its receiver, in time and in memory, whatever its sender makes of it."""

from __future__ import annotations

import enum
import gc
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TextIO

import attrs
import msgspec
import pytest

from fdshare import (
    Channel,
    DecodeError,
    Descriptor,
    FdHandle,
    MessageTooLargeError,
    NotSendableError,
    Pipe,
    TypedCodec,
)
from fdshare.codec import Incoming, Outgoing
from fdshare.typed.costs import MAX_HASHED
from fdshare.typed.flags import MOST_KEPT

Pair = tuple[int, int]


@attrs.frozen
class Keys:
    table: dict[Pair, int] = attrs.field(factory=dict)
    pairs: set[Pair] = attrs.field(factory=set)
    triples: set[tuple[int, int, str]] = attrs.field(factory=set)
    maybe: set[Pair | None] = attrs.field(factory=set)
    either: set[Pair | int] = attrs.field(factory=set)
    inner: set[frozenset[Pair]] = attrs.field(factory=set)
    many: list[set[Pair]] = attrs.field(factory=list)
    numbers: list[set[int]] = attrs.field(factory=list)
    ratios: list[set[float]] = attrs.field(factory=list)


CODEC = TypedCodec(Keys)


def decode(codec: TypedCodec, cls: type, **values: Any) -> Any:
    """Decode a message that no honest end would have encoded."""
    fields = [values.get(a.name, []) for a in attrs.fields(cls)]
    return codec.decode(Incoming(msgspec.msgpack.encode([cls.__name__, *fields])))


# --- hashes ---------------------------------------------------------------------------------------------------------------

_BITS = sys.hash_info.width
_ALL = (1 << _BITS) - 1
_TURN, _P1, _P2, _P5 = (
    (31, 11400714785074694791, 14029467366897019727, 2870177450012600261)
    if _BITS == 64
    else (13, 2654435761, 2246822519, 374761393)
)
"""Of xxHash, by which CPython hashes tuples."""


def _rotated(value: int, bits: int) -> int:
    return (value << bits | value >> (_BITS - bits)) & _ALL


def clashing_pairs() -> Iterator[list[int]]:
    """Yield pairs whose hashes are one."""
    wanted = _rotated(0x12345678 * pow(_P1, -1, _ALL + 1) & _ALL, _BITS - _TURN)
    first = 0
    while True:
        first += 1
        state = _rotated((_P5 + first * _P2) & _ALL, _TURN) * _P1 & _ALL
        second = (wanted - state) * pow(_P2, -1, _ALL + 1) & _ALL
        second -= (second >> (_BITS - 1)) << _BITS
        if abs(second) < sys.hash_info.modulus and second != -1:
            yield [first, second]


def clashing(count: int) -> list[list[int]]:
    source = clashing_pairs()
    found = [next(source) for _ in range(count)]
    assert len({hash(tuple(pair)) for pair in found}) == 1, "CPython hashes tuples in another way now"
    return found


FORMS: dict[str, Callable[[list[list[int]]], dict[str, Any]]] = {
    "dict": lambda pairs: {"table": [[pair, 0] for pair in pairs]},
    "set": lambda pairs: {"pairs": pairs},
    "with_text": lambda pairs: {"triples": [[*pair, "same"] for pair in pairs]},
    "optional": lambda pairs: {"maybe": pairs},
    "alternative": lambda pairs: {"either": [[1, pair] for pair in pairs]},
    "many_sets": lambda pairs: {"many": [pairs[i : i + 500] for i in range(0, len(pairs), 500)] * 4},
    "frozensets": lambda pairs: {"inner": [[*pairs[:60], pairs[i]] for i in range(60, 260)]},
}


@pytest.mark.parametrize("form", FORMS)
def test_keys_of_one_hash_are_refused_before_they_are_compared(form: str) -> None:
    values = FORMS[form](clashing(4096))
    before = time.thread_time()
    with pytest.raises(DecodeError, match="hashes are equal"):
        decode(CODEC, Keys, **values)
    assert time.thread_time() - before < 1.0


@pytest.mark.parametrize("field", ["numbers", "ratios"])
def test_hashed_numbers_are_bounded_for_the_whole_message(field: str) -> None:
    number = int if field == "numbers" else float
    largest = [number(i << 32) for i in range(MAX_HASHED)]
    assert len(getattr(decode(CODEC, Keys, **{field: [largest]}), field)[0]) == MAX_HASHED
    with pytest.raises(DecodeError, match="MAX_HASHED"):
        decode(CODEC, Keys, **{field: [largest, largest]})
    small = [[number(j) for j in range(10)] for _ in range(4000)]  # more than MAX_HASHED of them, and no cost
    assert len(getattr(decode(CODEC, Keys, **{field: small}), field)) == 4000


def test_points_around_the_origin_travel() -> None:
    """Hashes of -1 and -2 are equal, so some of theirs are: of as many as an honest sender has."""
    points = {(x, y) for x in range(-50, 50) for y in range(-50, 50)}
    message = Keys(pairs=points)
    encoded = CODEC.encode(message)
    assert CODEC.decode(Incoming(encoded if isinstance(encoded, bytes) else encoded.payload[0])) == message


def test_sender_is_held_to_the_same_bounds() -> None:
    clash = {(a, b) for a, b in clashing(2000)}
    with pytest.raises(NotSendableError, match="hashes are equal") as caught:
        CODEC.encode(Keys(many=[clash]))
    assert caught.value.path == "message.many[0]"
    numbers = set(range(MAX_HASHED))
    with pytest.raises(NotSendableError, match="MAX_HASHED"):
        CODEC.encode(Keys(numbers=[numbers, numbers]))
    with pytest.raises(MessageTooLargeError, match="max_items"):
        CODEC.encode(Keys(numbers=[set() for _ in range(CODEC.max_items // 2)]))


# --- memory -----------------------------------------------------------------------------------------------------------------


@attrs.frozen
class Containers:
    sets: list[set[int]] = attrs.field(factory=list)
    fixed: list[frozenset[int]] = attrs.field(factory=list)
    dicts: list[dict[int, int]] = attrs.field(factory=list)
    words: set[str] = attrs.field(factory=set)


CONTAINERS = TypedCodec(Containers)


@pytest.mark.parametrize(
    ("field", "one", "counts"),
    [
        ("sets", [], 3),
        ("sets", [1, 2], 7),
        ("fixed", [1], 5),
        ("dicts", [], 2),
        ("dicts", [[1, 2]], 5),
    ],
)
def test_containers_count_for_the_memory_they_take(field: str, one: list[Any], counts: int) -> None:
    most = (CONTAINERS.max_items - 10) // counts
    assert len(getattr(decode(CONTAINERS, Containers, **{field: [one] * most}), field)) == most
    with pytest.raises(DecodeError, match="max_items"):
        decode(CONTAINERS, Containers, **{field: [one] * (most + 10)})


def test_text_beside_a_set_does_not_count_by_its_bytes() -> None:
    """Values are counted where bytes alone do not tell that there are few."""
    words = [f"{i:0500}" for i in range(250)]
    assert len(decode(CONTAINERS, Containers, words=words).words) == 250


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs to know the most memory taken")
def test_message_takes_no_more_memory_than_the_page_says() -> None:
    for field, one, counts in (
        ("sets", [], 3),
        ("sets", [1, 2, 3, 4, 5], 13),
        ("dicts", [[1, 2]], 5),
        ("sets", [], 1),
    ):
        payload = [[one] * ((CONTAINERS.max_items - 10) // counts) if a.name == field else []
                   for a in attrs.fields(Containers)]  # fmt: skip
        data = msgspec.msgpack.encode(["Containers", *payload])
        reader, writer = os.pipe()
        if not os.fork():
            try:
                os.write(writer, str(_most_taken(data)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader) as file:
            taken = int(file.read())
        os.wait()
        assert taken < 5 * len(data) + 100 * CONTAINERS.max_items


def _most_taken(data: bytes) -> int:
    def high_water() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = high_water()
    try:
        CONTAINERS.decode(Incoming(data))
    except DecodeError:
        pass
    return high_water() - before


# --- combinations of flags ------------------------------------------------------------------------------------------------------


def _letters() -> dict[str, int]:
    return {f"BIT{n}": 1 << n for n in range(24)}


FLAGS: dict[str, Any] = {
    "Flag": lambda: enum.Flag("Rights", _letters()),
    "IntFlag": lambda: enum.IntFlag("Rights", _letters()),
    "KEEP": lambda: enum.Flag("Rights", _letters(), boundary=enum.KEEP),
    "IntFlag_STRICT": lambda: enum.IntFlag("Rights", _letters(), boundary=enum.STRICT),
    "CONFORM": lambda: enum.Flag("Rights", _letters(), boundary=enum.CONFORM),
    "EJECT": lambda: enum.Flag("Rights", _letters(), boundary=enum.EJECT),
}


@pytest.mark.parametrize("sort", FLAGS)
def test_combinations_of_flags_do_not_stay(sort: str) -> None:
    cls = FLAGS[sort]()
    ask = attrs.make_class("Ask", {"rights": attrs.field(type=list[cls])})
    codec = TypedCodec(ask)
    for first in range(0, 6000, 2000):
        arrived = decode(codec, ask, rights=list(range(first + 1, first + 2001)))
        assert [member.value for member in arrived.rights] == list(range(first + 1, first + 2001))
        assert all(type(member) is cls for member in arrived.rights)
        kept = [~member & cls.BIT3 | cls.BIT9 for member in arrived.rights]
        del arrived, kept
    gc.collect()
    assert len(cls._value2member_map_) <= 24
    alive = sum(isinstance(obj, cls) for obj in gc.get_objects())
    assert alive <= 48 + 2 * MOST_KEPT  # members, what their inversions are, and the latest


@pytest.mark.parametrize("sort", FLAGS)
def test_combinations_behave_as_ever(sort: str) -> None:
    cls = FLAGS[sort]()
    before = cls.BIT0 | cls.BIT1
    TypedCodec(attrs.make_class("Ask", {"rights": attrs.field(type=cls)}))
    TypedCodec(attrs.make_class("Other", {"rights": attrs.field(type=cls)}))
    assert cls(3) is before
    after = cls.BIT2 | cls.BIT5
    assert cls(36) is after
    assert after == cls.BIT5 | cls.BIT2
    assert cls(36) in {after}
    assert cls.BIT2 in after
    assert [member.name for member in after] == ["BIT2", "BIT5"]
    assert after & cls.BIT2 is cls.BIT2
    assert ~(~after) == after
    assert cls["BIT2"] is cls(4) is cls.BIT2
    assert len(cls) == 24


def test_combinations_count_for_the_memory_they_take() -> None:
    cls: Any = FLAGS["Flag"]()
    ask = attrs.make_class("Ask", {"rights": attrs.field(type=list[cls])})
    codec = TypedCodec(ask, max_items=5000)
    assert len(decode(codec, ask, rights=[3] * 4000).rights) == 4000  # one object
    with pytest.raises(DecodeError, match="max_items"):
        decode(codec, ask, rights=list(range(1, 4001)))


# --- descriptors ---------------------------------------------------------------------------------------------------------------


@attrs.frozen
class Texts:
    strict: Annotated[TextIO, Descriptor(errors="strict")]
    lenient: Annotated[TextIO, Descriptor(errors="replace")]


@attrs.frozen
class Other:
    number: int


SMALL, BIG = TypedCodec(Other, max_bytes=100), TypedCodec(Other, max_bytes=1 << 20)


@attrs.frozen
class Channels:
    control: Annotated[Channel, Descriptor(codec=SMALL)]
    bulk: Annotated[Channel, Descriptor(codec=BIG)]


def test_one_place_cannot_stand_for_two_declarations(tmp_path: Path) -> None:
    """Those that the name of the codec does not tell apart, since they are each end's own."""
    (tmp_path / "file").write_bytes(b"\xff")
    codec = TypedCodec(Texts, Channels)
    here, there = Pipe(codec=SMALL)
    with open(tmp_path / "file") as text, here, there:
        for name, fd in (("Texts", text.fileno()), ("Channels", here.fileno())):
            with pytest.raises(DecodeError, match="stands for both"):
                codec.decode(Incoming(msgspec.msgpack.encode([name, 0, 0]), [FdHandle.dup(fd)]))
        encoded = codec.encode(Texts(text, text))
        assert isinstance(encoded, Outgoing)
        assert len(encoded.fds) == 2  # as it is sent: each has its own
        arrived = codec.decode(Incoming(encoded.payload[0], [FdHandle.dup(fd) for fd in encoded.fds]))
        encoded.failed()
        with arrived.strict, arrived.lenient:
            assert arrived.lenient.errors == "replace"
            assert arrived.lenient.read() == "\N{REPLACEMENT CHARACTER}"


@attrs.frozen
class Files:
    binary: BinaryIO | None = None
    text: TextIO | None = None
    raw: io.FileIO | None = None
    reader: io.BufferedReader | None = None
    handle: Annotated[FdHandle, Descriptor(kinds={"file"})] | None = None
    made_up: Annotated[FdHandle, Descriptor(kinds={"pseudo"})] | None = None
    anything: FdHandle | None = None


FILES = TypedCodec(Files)
MADE_UP = ["/proc/self/mem", "/proc/self/status", "/proc/sys/kernel/ostype", "/sys/kernel/uevent_seqnum"]


def decode_file(field: str, path: str) -> Any:
    with open(path, "rb") as file:
        handle = FdHandle.dup(file)
    fields = [0 if a.name == field else None for a in attrs.fields(Files)]
    return getattr(FILES.decode(Incoming(msgspec.msgpack.encode(["Files", *fields]), [handle])), field)


@pytest.mark.parametrize("path", MADE_UP)
def test_file_that_the_kernel_makes_up_is_no_regular_file(path: str) -> None:
    """Reading it can wait for its process, and can be an order to the kernel."""
    if not os.access(path, os.R_OK):
        pytest.skip(f"needs {path}")
    for field in ("binary", "text", "raw", "reader", "handle"):
        with pytest.raises(DecodeError, match="pseudo"):
            decode_file(field, path)
    for field in ("made_up", "anything"):
        decode_file(field, path).close()
    with open(path, "rb") as file, pytest.raises(NotSendableError, match="pseudo"):
        FILES.encode(Files(binary=file))


def test_empty_files_are_regular_files(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for field in ("binary", "text", "raw", "reader", "handle"):
        decode_file(field, str(tmp_path / "empty")).close()
    if hasattr(os, "memfd_create"):
        with open(os.memfd_create("empty", os.MFD_CLOEXEC), "rb") as empty:
            decode_file("binary", f"/proc/self/fd/{empty.fileno()}").close()
    if os.access("/dev/shm", os.W_OK):
        name = f"/dev/shm/fdshare-test-{os.getpid()}"
        open(name, "w").close()
        try:
            decode_file("binary", name).close()
        finally:
            os.unlink(name)
