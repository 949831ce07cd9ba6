"""TypedCodec without descriptors: what travels, what is refused at the sender and where, what no class may declare."""

import itertools
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Optional, TypeVar, Union

import attrs
import msgspec
import pytest
from helpers import LARGE, QUICK_METHODS, TRANSPORTS
from hypothesis import given
from hypothesis import strategies as st
from typed_messages import (
    VALUES,
    Color,
    Empty,
    Everything,
    Mode,
    Point,
    Port,
    Positive,
    Private,
    Tree,
)

from fdshare import (
    Channel,
    DecodeError,
    FdHandle,
    Listener,
    MessageTooLargeError,
    NotSendableError,
    Pipe,
    ProtocolError,
    TypedCodec,
    connect,
    move,
)
from fdshare.codec import Incoming, Outgoing, PickleCodec
from fdshare.typed.values import MAX_HASHED

# In this module annotations are no strings.

T = TypeVar("T")


@attrs.define
class Plain:
    old: Optional[int] = None  # noqa: UP045 -- the old spelling is the test
    union: Union[int, str] = 0  # noqa: UP007 -- the old spelling is the test
    listed: typing.List[int] = attrs.field(factory=list)  # noqa: UP006 -- the old spelling is the test


def there_and_back(codec: TypedCodec, message: object) -> Any:
    encoded = codec.encode(message)
    if isinstance(encoded, Outgoing):
        assert not encoded.fds
        encoded = b"".join(encoded.payload)
    return codec.decode(Incoming(encoded))


def depth_of(tree: Tree) -> int:
    return 1 + max(map(depth_of, tree.children), default=0)


# --- what travels -----------------------------------------------------------------------------------------------------

FULL = Everything(
    False, -5, math.inf, "Ünïcode 😀", b"\x00\xff", None, "there", Color.BLUE, Mode.READ | Mode.WRITE, 3,
    [1, 2, 3], ("a", "b"), (7, "seven"), {"x", "y"}, frozenset({-1, 2**63}),
    {"a": [Point(1, 2.5)], "": []}, {(1, 2): b"x", (2, 1): b""}, [b"either"], Point(0, -0.0), Port(80),
)  # fmt: skip


@pytest.mark.parametrize(
    "message", [FULL, Everything(), Point(2**64 - 1, 1e300), Empty(), Positive(1), Private(secret="s")]
)
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_message_arrives_equal(message: object, transport: str) -> None:
    here, there = Pipe(codec=VALUES, transport=transport)
    with here, there:
        here.send(message)
        arrived = there.recv(timeout=10)
    assert arrived == message
    assert type(arrived) is type(message)


def test_every_value_keeps_its_type() -> None:
    arrived = there_and_back(VALUES, FULL)
    for field in attrs.fields(Everything):
        assert type(getattr(arrived, field.name)) is type(getattr(FULL, field.name)), field.name


@pytest.mark.parametrize("message", [Plain(), Plain(3, "s", [1]), Plain(None, 5)])
def test_annotations_that_are_no_strings(message: Plain) -> None:
    assert there_and_back(TypedCodec(Plain), message) == message


def test_an_integer_for_a_float_arrives_as_one() -> None:
    """As type checkers have it; it loses nothing."""
    arrived = there_and_back(VALUES, Point(1, 5))
    assert arrived == Point(1, 5.0)
    assert type(arrived.y) is float


def test_nan_arrives_as_nan() -> None:
    assert math.isnan(there_and_back(VALUES, Point(1, math.nan)).y)


def test_class_that_holds_itself() -> None:
    tree = Tree("root", [Tree("a", [Tree("b")]), Tree("c")], next=Tree("d"))
    assert there_and_back(VALUES, tree) == tree


def test_init_runs_and_derives() -> None:
    assert there_and_back(VALUES, Private(secret="quiet")).derived == "QUIET"


@pytest.mark.parametrize("size", [0, 1, 65_536, 122_880, LARGE, 3 << 20])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_large_message(size: int, transport: str) -> None:
    here, there = Pipe(codec=VALUES, transport=transport)
    data = bytes(range(256)) * (size // 256)
    with here, there:
        here.send(Everything(data=data), timeout=10)
        assert there.recv(timeout=10).data == data


def test_local_classes_know_each_other() -> None:
    @attrs.define
    class Inner:
        value: int

    @attrs.define
    class Outer:
        inner: "Inner"

    assert there_and_back(TypedCodec(Outer, Inner), Outer(Inner(3))) == Outer(Inner(3))


values = st.builds(
    Everything,
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False),
    st.text(),
    st.binary(),
    st.none(),
    st.none() | st.text(),
    st.sampled_from(Color),
    st.sampled_from([Mode(0), Mode.READ, Mode.WRITE, Mode.READ | Mode.WRITE]),
    st.sampled_from(["get", "put", 3]),
    st.lists(st.integers(-(2**63), 2**64 - 1)),
    st.lists(st.text()).map(tuple),
    st.tuples(st.integers(0, 9), st.text()),
    st.sets(st.text()),
    st.frozensets(st.integers(-9, 9)),
    st.dictionaries(st.text(), st.lists(st.builds(Point, st.integers(0, 9), st.floats(allow_nan=False)))),
    st.dictionaries(st.tuples(st.integers(0, 9), st.integers(0, 9)), st.binary()),
    st.none() | st.integers(0, 9) | st.text() | st.lists(st.binary()),
    st.none() | st.builds(Point, st.integers(0, 9), st.floats(allow_nan=False)),
    st.integers(0, 65535),
)


@given(values)
def test_any_message_arrives_equal(message: Everything) -> None:
    assert there_and_back(VALUES, message) == message


# --- refused at the sender, with the place ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "path", "reason"),
    [
        (3, "message", "expected Empty or Everything"),
        ({"a": 1}, "message", "expected"),
        (Plain(), "message", "expected"),
        (Point, "message", "expected"),
        (Everything(count="5"), "message.count", "expected int"),
        (Everything(count=True), "message.count", "expected int"),
        (Everything(count=1.0), "message.count", "expected int"),
        (Everything(count=2**64), "message.count", "2**64"),
        (Everything(count=-(2**63) - 1), "message.count", "2**63"),
        (Everything(yes=1), "message.yes", "expected bool"),
        (Everything(ratio="1"), "message.ratio", "expected float"),
        (Everything(ratio=True), "message.ratio", "expected float"),
        (Everything(ratio=2**60 + 1), "message.ratio", "expected float"),
        (Everything(text=b"x"), "message.text", "expected str"),
        (Everything(text="\udcff"), "message.text", "os.fsencode"),
        (Everything(data=bytearray(b"x")), "message.data", "expected bytes"),
        (Everything(nothing=0), "message.nothing", "expected None"),
        (Everything(maybe=1), "message.maybe", "expected str"),
        (Everything(color="r"), "message.color", "expected Color"),
        (Everything(mode=1), "message.mode", "expected Mode"),
        (Everything(verb="post"), "message.verb", "one of 'get', 'put', 3"),
        (Everything(verb=3.0), "message.verb", "one of"),
        (Everything(numbers=[1, 2, "3"]), "message.numbers[2]", "expected int"),
        (Everything(numbers=(1, 2)), "message.numbers", "expected list"),
        (Everything(names=["a"]), "message.names", "expected tuple"),
        (Everything(pair=(1, 2)), "message.pair[1]", "expected str"),
        (Everything(pair=(1,)), "message.pair", "a tuple of 2"),
        (Everything(tags=frozenset()), "message.tags", "expected set"),
        (Everything(tags={1}), "message.tags{...}", "expected str"),
        (Everything(table={1: []}), "message.table.keys()[1]", "expected str"),
        (Everything(table={"a": [Point(1, 1.0), Point("x", 1.0)]}), "message.table['a'][1].x", "expected int"),
        (Everything(either=b"x"), "message.either", "expected int or list or str"),
        (Everything(either=["x"]), "message.either[0]", "expected bytes"),
        (Everything(point=(1, 2.0)), "message.point", "expected Point"),
        (Tree("a", [Tree("b"), Tree(5)]), "message.children[1].name", "expected str"),
        (Everything(fixed=frozenset(range(MAX_HASHED + 1))), "message.fixed", "MAX_HASHED"),
    ],
)  # fmt: skip
def test_wrong_type_is_refused_with_its_place(message: object, path: str, reason: str) -> None:
    with pytest.raises(NotSendableError) as info:
        VALUES.encode(message)
    assert info.value.path == path
    assert reason in str(info.value.reason)
    assert path in str(info.value)


def test_subclass_is_refused() -> None:
    """It would arrive as its base."""

    class Loud(str):
        pass

    @attrs.frozen
    class Point3(Point):
        z: int = 0

    for message in (Everything(text=Loud("x")), Everything(point=Point3(1, 2.0)), Point3(1, 2.0)):
        with pytest.raises(NotSendableError):
            VALUES.encode(message)


def test_move_of_plain_values_is_the_value() -> None:
    assert there_and_back(VALUES, move(Everything(text="x"))) == Everything(text="x")


def test_channel_goes_on_after_a_refusal() -> None:
    here, there = Pipe(codec=VALUES)
    with here, there:
        with pytest.raises(NotSendableError):
            here.send(Everything(count="5"))  # type: ignore[arg-type]  # the point
        here.send(Empty())
        assert there.recv(timeout=10) == Empty()


# --- bounds -------------------------------------------------------------------------------------------------------------


def test_too_many_bytes_are_refused_at_the_sender() -> None:
    codec = TypedCodec(Everything, max_bytes=1000)
    there_and_back(codec, Everything(data=bytes(800)))
    with pytest.raises(MessageTooLargeError, match="max_bytes is 1000"):
        codec.encode(Everything(data=bytes(1000)))


def test_too_many_items_are_refused_at_the_sender() -> None:
    codec = TypedCodec(Everything, max_items=1000)
    there_and_back(codec, Everything(numbers=[1] * 900, data=bytes(100_000)))
    with pytest.raises(MessageTooLargeError, match="max_items"):
        codec.encode(Everything(numbers=[1] * 1000))


def nested(depth: int) -> Tree:
    tree = Tree("leaf")
    for _ in range(depth - 1):
        tree = Tree("branch", [tree])
    return tree


def test_depth_is_bounded_on_both_sides() -> None:
    """A tree of n takes two levels each, a class and a list."""
    codec, deeper = TypedCodec(Tree, max_depth=20), TypedCodec(Tree, max_depth=250)
    assert depth_of(there_and_back(codec, nested(10))) == 10
    for depth in (11, 100, 5000):
        with pytest.raises(MessageTooLargeError, match="max_depth"):
            codec.encode(nested(depth))
    encoded = deeper.encode(nested(11))
    assert isinstance(encoded, bytes)
    with pytest.raises(DecodeError, match="max_depth"):
        codec.decode(Incoming(encoded))
    assert depth_of(there_and_back(deeper, nested(125))) == 125


def test_a_loop_is_refused_at_the_sender() -> None:
    tree = Tree("loop")
    tree.next = tree
    with pytest.raises(MessageTooLargeError, match="max_depth"):
        VALUES.encode(tree)


@pytest.mark.parametrize(
    "bounds",
    [
        {"max_bytes": 0},
        {"max_items": 0},
        {"max_depth": 0},
        {"max_depth": 251},
        {"max_fds": -1},
        {"recv_fds": 1 << 20},
        {"send_fds": 1.5},
    ],
)
def test_senseless_bounds_are_refused(bounds: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bounds))):
        TypedCodec(Empty, **bounds)


def test_classes_deeper_than_max_depth_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="nested 5 levels"):
        TypedCodec(Everything, max_depth=3)


@attrs.define
class Bounded:
    few: Annotated[list[int], msgspec.Meta(max_length=3)] = attrs.field(factory=list)
    percent: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    name: Annotated[str, msgspec.Meta(pattern="^[a-z]*$")] = ""


def test_bounds_of_msgspec_hold_on_both_sides() -> None:
    codec = TypedCodec(Bounded)
    assert there_and_back(codec, Bounded([1, 2, 3], 100, "abc")) == Bounded([1, 2, 3], 100, "abc")
    for wrong in (Bounded([1, 2, 3, 4]), Bounded([], 101), Bounded([], -1), Bounded([], 0, "A")):
        with pytest.raises(NotSendableError):
            codec.encode(wrong)
        name, few, percent, text = "Bounded", wrong.few, wrong.percent, wrong.name
        with pytest.raises(DecodeError):
            codec.decode(Incoming(msgspec.msgpack.encode([name, few, percent, text])))


# --- refused on arrival ---------------------------------------------------------------------------------------------------


@attrs.define
class Small:
    number: int
    name: str
    ratio: float = 0.0


SMALL = TypedCodec(Small, Point, Positive, Everything, Tree)


@pytest.mark.parametrize(
    "wire",
    [
        ["Small", 1, "x"],  # missing
        ["Small", 1, "x", 0.5, 0],  # added
        ["Small", "1", "x", 0.5],
        ["Small", 1.0, "x", 0.5],
        ["Small", True, "x", 0.5],
        ["Small", None, "x", 0.5],
        ["Small", 1, b"x", 0.5],
        ["Small", 1, 5, 0.5],
        ["Small", 1, "x", 1],  # no integer for a float
        ["Small", 1, "x", "0.5"],
        ["Small", 1, "x", None],
        ["Smell", 1, "x", 0.5],
        [0, 1, "x", 0.5],
        [None],
        [],
        {},
        {"number": 1, "name": "x", "ratio": 0.5},
        None,
        "Small",
        b"Small",
        ["Positive", 0],  # its own validator
        ["Point", 1, 2.0, 3],
        msgspec.Raw(msgspec.msgpack.encode(["Small", 1, "x", 0.5]) + b"\x00"),  # something behind it
        msgspec.Raw(msgspec.msgpack.encode(["Small", 1, "x", 0.5])[:-1]),
        msgspec.Raw(b""),
        msgspec.Raw(b"\xc1"),
        msgspec.Raw(b"\x94\xa5Small\x01\xa1\xff\xca\x00\x00\x00\x00"),  # not UTF-8
        msgspec.Raw(b"\xdd\xff\xff\xff\xff\xa5Small"),
        msgspec.Raw(b"\x94\xa5Small\x01\xdb\xff\xff\xff\xff"),
        msgspec.msgpack.Ext(1, b"x"),
        ["Small", msgspec.msgpack.Ext(-1, bytes(4)), "x", 0.5],
    ],
    ids=itertools.count(),
)
def test_anything_else_is_a_decode_error(wire: Any) -> None:
    data = bytes(wire) if isinstance(wire, msgspec.Raw) else msgspec.msgpack.encode(wire)
    with pytest.raises(DecodeError):
        SMALL.decode(Incoming(data))


def packed(**changed: Any) -> bytes:
    """Return the bytes of an Everything with some places changed, as a foreign program would send it."""
    plain: dict[str, Any] = msgspec.msgpack.decode(b"".join([VALUES.encode(Everything())]))  # type: ignore[list-item]
    places = {field.name: place + 1 for place, field in enumerate(attrs.fields(Everything))}
    for name, value in changed.items():
        plain[places[name]] = value  # type: ignore[index]
    return msgspec.msgpack.encode(plain)


@pytest.mark.parametrize(
    "changed",
    [
        {"tags": ["a", "a"]},  # twice
        {"fixed": [1, 1]},
        {"table": [["a", []], ["a", []]]},
        {"places": [[[1, 2], b""], [[1, 2], b""]]},
        {"places": [[[1, 2, 3], b""]]},
        {"places": {(1, 2): b""}},
        {"table": {"a": []}},
        {"table": [["a"]]},
        {"pair": [1, "a", 2]},
        {"color": "r"},  # the value, not the name
        {"color": "PURPLE"},
        {"mode": 4},
        {"mode": -1},
        {"mode": 2**64 - 1},
        {"verb": "post"},
        {"verb": 4},
        {"either": [9, 1]},
        {"either": [0, "x", 1]},
        {"either": [0]},
        {"either": 5},
        {"point": ["Everything"]},
        {"point": [1, 2.0]},
        {"fixed": list(range(MAX_HASHED + 1))},
    ],
    ids=repr,
)
def test_wrong_places_are_decode_errors(changed: dict[str, Any]) -> None:
    assert VALUES.decode(Incoming(packed())) == Everything()
    with pytest.raises(DecodeError):
        VALUES.decode(Incoming(packed(**changed)))


def test_keys_that_collide_take_no_quadratic_time() -> None:
    """Multiples of 2**61 - 1 all hash to 0; within 64 bits there are few, so other collisions must be bounded too."""
    clashing = [i << 40 for i in range(MAX_HASHED)]
    decoded = VALUES.decode(Incoming(packed(fixed=clashing)))
    assert len(decoded.fixed) == MAX_HASHED


@pytest.mark.parametrize("name", ["Z" * 100_000, "\x1b[31m\n", "Point\n" * 1000])
def test_error_is_short_and_printable_whatever_was_sent(name: str) -> None:
    with pytest.raises(DecodeError) as info:
        VALUES.decode(Incoming(msgspec.msgpack.encode([name, 1])))
    shown = "".join(traceback.format_exception(info.value))
    assert len(str(info.value)) < 600
    assert str(info.value).isprintable()
    assert "\x1b" not in shown
    assert name not in shown


def test_a_pickle_is_never_unpickled() -> None:
    called = []

    class Bomb:
        def __reduce__(self) -> Any:
            return called.append, (1,)

    encoded = PickleCodec().encode([called.append, 1])
    data = encoded if isinstance(encoded, bytes) else b"".join(encoded.payload)
    for payload in (pickle.dumps(Bomb(), 5), data, b"\x80\x05."):
        with pytest.raises(DecodeError):
            VALUES.decode(Incoming(payload))
    assert not called


# --- what no class may declare ---------------------------------------------------------------------------------------------


def declared(annotation: Any) -> type:
    return attrs.make_class("Declared", {"field": attrs.field(type=annotation)})


class Base(Generic[T]):
    pass


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Any, "cannot be checked"),
        (object, "cannot be checked"),
        (list, "of what"),
        (dict, "of what"),
        (Sequence[int], "cannot be checked"),
        (complex, "cannot be checked"),
        (type, "cannot be checked"),
        (T, "generic"),
        (list[Any], "cannot be checked"),
        (dict[str, Any], "cannot be checked"),
        (dict[list[int], int], "hashable"),
        (set[list[int]], "hashable"),
        (set[Point], "hashable"),
        (set[FdHandle], "hashable"),
        (Literal[b"x"], "literals"),
        (list[int] | list[str], "more than one"),
        (str | Literal["a"], "more than one"),
        (Annotated[int, "note"] | complex, "cannot be checked"),
        ("Nowhere", "cannot be resolved"),
        (memoryview, "cannot be checked"),
        (bytearray, "cannot be checked"),
    ],
)
def test_field_that_cannot_be_checked_is_refused_at_once(annotation: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        TypedCodec(declared(annotation))


def test_field_without_a_type_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="cannot be checked"):
        TypedCodec(attrs.make_class("Untyped", ["field"]))


@pytest.mark.parametrize("given", [int, 3, dict[str, int], type("Bare", (), {})])
def test_what_is_no_attrs_class_is_refused_at_once(given: Any) -> None:
    with pytest.raises(TypeError, match="is not an attrs class"):
        TypedCodec(given)


def test_no_classes_and_two_of_one_name_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="needs the message classes"):
        TypedCodec()
    with pytest.raises(ValueError, match="two message classes are named Twin"):
        TypedCodec(attrs.make_class("Twin", []), attrs.make_class("Twin", []))


# --- the name --------------------------------------------------------------------------------------------------------------


def test_name_says_what_both_ends_must_agree_on() -> None:
    assert VALUES.name.startswith("typed:")
    assert len(VALUES.name) <= 64
    assert VALUES.name.isascii()
    assert TypedCodec(Tree, Point).name == TypedCodec(Point, Tree, max_bytes=5000, recv_fds=0).name
    different = [
        TypedCodec(Point),
        TypedCodec(Point, Empty),
        TypedCodec(declared(int)),
        TypedCodec(declared(str)),
        TypedCodec(declared(int | None)),
        TypedCodec(declared(Literal["a"])),
        TypedCodec(declared(Literal["b"])),
        TypedCodec(attrs.make_class("Declared", {"other": attrs.field(type=int)})),
    ]
    assert len({codec.name for codec in different}) == len(different)


def test_name_is_the_same_in_every_process() -> None:
    code = "import typed_messages as m; print(m.VALUES.name, m.DESCRIPTORS.name)"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    }
    assert len(runs) == 1
    assert runs.pop().split()[0] == VALUES.name


def test_codec_is_pickled_with_a_channel() -> None:
    codec = pickle.loads(pickle.dumps(TypedCodec(Point, Tree, max_bytes=100, recv_fds=0, send_fds=3)))
    assert (codec.name, codec.max_bytes, codec.recv_fds, codec.send_fds) == (
        TypedCodec(Point, Tree).name,
        100,
        0,
        3,
    )
    here, there = Pipe()
    with here, there:
        carried, other = Pipe(codec=codec)
        with other:
            here.send(move(carried))
            with there.recv(timeout=10) as arrived:
                assert isinstance(arrived, Channel)
                arrived.send(Point(1, 2.0))
                assert other.recv(timeout=10) == Point(1, 2.0)


def _answer(channel: Channel) -> None:
    with channel:
        message = channel.recv(timeout=20)
        channel.send(attrs.evolve(message, x=message.x + 1))


@pytest.mark.parametrize("method", QUICK_METHODS)
def test_other_process(method: str) -> None:
    """Its codec goes with the channel, into a process that is being started."""
    here, there = Pipe(codec=VALUES)
    with here:
        with there:
            process = multiprocessing.get_context(method).Process(target=_answer, args=(there,))
            process.start()
        here.send(Point(1, 2.0))
        assert here.recv(timeout=30) == Point(2, 2.0)
        process.join(30)


@pytest.mark.parametrize("other", [TypedCodec(Tree), TypedCodec(Point, Tree), None])
def test_other_classes_are_refused_by_the_hello(tmp_path: Path, other: TypedCodec | None) -> None:
    path = str(tmp_path / "s")
    with Listener(path, codec=TypedCodec(Point)) as listener, connect(path, codec=other) as here:  # noqa: SIM117 -- a line's length
        with listener.accept(10) as there:
            for channel in (here, there):
                with pytest.raises(ProtocolError, match="codec"):
                    channel.recv(timeout=10)


def test_importing_and_naming_it_needs_no_msgspec() -> None:
    code = (
        "import sys; sys.modules['msgspec'] = None\n"
        "import attrs, fdshare\n"
        "codec = fdshare.TypedCodec\n"
        "try: codec(attrs.make_class('C', []))\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    assert "fdshare[typed]" in run.stdout
