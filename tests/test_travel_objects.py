"""Objects of the user's that hold what travels: attrs, dataclasses, slots, closures, classes, and registered types."""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import enum
import functools
import io
import os
import re
import subprocess
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from travel import refusal, trip

from fdshare import Channel, FdHandle, Pipe, move, reducers, register
from fdshare.testing import leak_check, numbered_handle, read_number

ROOT = Path(__file__).resolve().parent.parent


# classes of every make ----------------------------------------------------------------------------------------------------


@attrs.define
class Defined:
    held: Any
    label: str = "label"


@attrs.frozen
class Frozen:
    held: Any
    label: str = "label"


@attrs.define(slots=False)
class WithDict:
    held: Any
    label: str = "label"


@dataclasses.dataclass
class Data:
    held: Any
    label: str = "label"


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenData:
    held: Any
    label: str = "label"


class Named(NamedTuple):
    held: Any
    label: str = "label"


class Plain:
    def __init__(self, held: Any, label: str = "label") -> None:
        self.held = held
        self.label = label


class SlotsBase:
    __slots__ = ("held",)


class Slots(SlotsBase):
    __slots__ = ("label",)

    def __init__(self, held: Any, label: str = "label") -> None:
        self.held = held
        self.label = label


class WithState(Plain):
    def __getstate__(self) -> Any:
        return [self.held, self.label]

    def __setstate__(self, state: Any) -> None:
        self.held, self.label = state


class WithReduce(Plain):
    def __reduce__(self) -> Any:
        return WithReduce, (self.held, self.label)


class WithNewArguments:
    def __new__(cls, held: Any, label: str = "label") -> WithNewArguments:
        self = super().__new__(cls)
        self.held, self.label = held, label  # type: ignore[attr-defined]
        return self

    def __getnewargs__(self) -> Any:
        return (self.held, self.label)  # type: ignore[attr-defined]

    def __getstate__(self) -> None:
        return None


class ListOf(list[Any]):
    @property
    def held(self) -> Any:
        return self[0]

    @property
    def label(self) -> str:
        return "label"


CLASSES = [
    Defined,
    Frozen,
    WithDict,
    Data,
    FrozenData,
    Named,
    Plain,
    Slots,
    WithState,
    WithReduce,
    WithNewArguments,
    lambda held: ListOf([held]),
    lambda held: types.SimpleNamespace(held=held, label="label"),
]
NAMES = [getattr(make, "__name__", "").strip("<>") or str(n) for n, make in enumerate(CLASSES)]


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("make", CLASSES, ids=NAMES)
def test_object_that_holds_a_file(make: Callable[[Any], Any], moved: bool, tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("w") as log:
        log.write("here, ")
        original = make({"log": [log]})
        received = trip(move(original) if moved else original)
        assert type(received) is type(original)
        assert received.label == "label"
        assert log.closed == moved
        with received.held["log"][0] as there:
            there.write("there")
    assert path.read_text() == "here, there"


@pytest.mark.parametrize(
    "container",
    [
        lambda h: collections.deque([h]),
        lambda h: collections.OrderedDict(a=h),
        lambda h: collections.defaultdict(list, a=h),
        lambda h: {h},
        lambda h: frozenset({h}),
        lambda h: {h: "key"},
        lambda h: (h, [h]),
        lambda h: types.MappingProxyType({"a": h}),
        lambda h: functools.partial(print, h),
        lambda h: h.fileno,
    ],
    ids=[
        "deque",
        "OrderedDict",
        "defaultdict",
        "set",
        "frozenset",
        "key",
        "tuple",
        "proxy",
        "partial",
        "method",
    ],
)
def test_container_of_handles(container: Callable[[Any], Any]) -> None:
    with numbered_handle(7) as handle:
        original = container(handle)
        received = trip(original)
        assert type(received) is type(original)
        found: Any = received
        if isinstance(received, functools.partial):
            found = received.args[0]
        elif isinstance(received, types.MethodType | types.BuiltinMethodType):
            found = received.__self__
        elif isinstance(received, dict | types.MappingProxyType):
            found = received.get("a") or next(iter(received))
        else:
            found = next(iter(received))
        assert read_number(found) == 7


class Colour(enum.Enum):
    RED = 1


def test_identity_and_cycles_across_objects() -> None:
    with numbered_handle(1) as handle:
        shared = Defined(handle)
        original = {"a": shared, "b": Data([shared, handle]), "c": Colour.RED}
        original["self"] = original
        received = trip(original)
        assert received["self"] is received
        assert received["b"].held[0] is received["a"]
        assert received["b"].held[1] is received["a"].held
        assert received["c"] is Colour.RED
        assert read_number(received["a"].held) == 1


# --- any structure -----------------------------------------------------------------------------------------------------

leaves = st.integers(0, 4) | st.none() | st.text(max_size=5) | st.binary(min_size=40_000, max_size=40_001)
structures = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        | st.builds(Defined, inner)
        | st.builds(Data, inner)
        | st.builds(Slots, inner)
    ),
    max_leaves=12,
)


def rebuilt(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    """Copy a structure, with every int in it replaced."""
    if isinstance(structure, int):
        return leaf(structure)
    if isinstance(structure, list | tuple):
        return type(structure)(rebuilt(item, leaf) for item in structure)
    if isinstance(structure, dict):
        return {key: rebuilt(item, leaf) for key, item in structure.items()}
    if isinstance(structure, Defined | Data | Slots):
        return type(structure)(rebuilt(structure.held, leaf))
    return structure


def flattened(structure: Any) -> Iterator[tuple[Any, Any]]:
    """Yield type and value of every node, depth first; handles as themselves."""
    yield type(structure), None if isinstance(structure, list | tuple | dict) else structure
    if isinstance(structure, list | tuple):
        for item in structure:
            yield from flattened(item)
    elif isinstance(structure, dict):
        for key, item in structure.items():
            yield key, None
            yield from flattened(item)
    elif isinstance(structure, Defined | Data | Slots):
        yield from flattened(structure.held)


@settings(max_examples=30)  # each runs several messages
@given(structures, st.sampled_from(["seqpacket", "stream"]), st.booleans())
def test_any_structure_keeps_shape_and_identity(structure: Any, transport: str, moved: bool) -> None:
    """The same handle in many places is one handle in those places; every other one is another."""
    handles = [numbered_handle(number) for number in range(5)]
    message = rebuilt(structure, handles.__getitem__)
    received = trip(move(message) if moved else message, transport)
    numbers: dict[FdHandle, int] = {}
    seen: dict[int, FdHandle] = {}
    for (type_there, there), (type_here, here) in zip(flattened(received), flattened(message), strict=True):
        assert type_there == type_here
        if type_here is FdHandle:
            if there not in numbers:
                numbers[there] = read_number(there)
            number = numbers[there]
            assert handles[number] is here
            assert seen.setdefault(number, there) is there
        elif not isinstance(here, Defined | Data | Slots):
            assert there == here
    used = {handle for _, handle in flattened(message) if isinstance(handle, FdHandle)}
    for handle in handles:
        assert handle.closed == (moved and handle in used)
        handle.close()


# functions ------------------------------------------------------------------------------------------------------------------


def test_closure_takes_its_file_along(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("one\ntwo\n")
    with open(tmp_path / "f") as file:
        counts = {"read": 0}

        def read_line() -> str:
            counts["read"] += 1
            return file.readline()

        received, again = trip([read_line, read_line])
        assert received is again
        assert [received(), received()] == ["one\n", "two\n"]
        assert counts == {"read": 0}  # a closure is copied like everything else
        received.__closure__[1].cell_contents.close()


def test_functions_of_all_kinds() -> None:
    with numbered_handle(1) as handle:
        base = 10

        def with_default(h: Any = handle, *, plus: int = 1) -> Any:
            return h, plus + base

        def factorial(n: int) -> int:
            return 1 if n == 0 else n * factorial(n - 1)

        def numbers() -> Iterator[int]:
            yield from range(base)

        class Local:
            held = 5

            def method(self) -> int:
                return self.held + base

        received: Any = trip(
            [with_default, lambda: handle, factorial, numbers, Local, Local(), Local().method, len, str.upper]
        )
        with_default_there, get_handle, factorial_there, numbers_there, local, instance, method, *builtin = (
            received
        )
        assert with_default_there()[0] is get_handle()
        assert with_default_there(plus=5)[1] == 15
        assert read_number(get_handle()) == 1
        assert factorial_there(5) == 120
        assert list(numbers_there()) == list(range(10))
        assert type(instance) is local
        assert instance.method() == method() == 15
        assert builtin == [len, str.upper]


def test_moved_closure_gives_its_file_away() -> None:
    handle = numbered_handle(2)
    function = trip(move(lambda: handle))
    assert handle.closed
    assert read_number(function()) == 2


def test_local_class_with_slots_and_a_file() -> None:
    @attrs.define
    class Local:
        held: Any

    with numbered_handle(3) as handle:
        received = trip(Local(handle))
        assert type(received).__name__ == "Local"
        assert read_number(received.held) == 3


def test_importable_functions_travel_by_name() -> None:
    assert trip(os.path.join) is os.path.join
    assert trip({"f": [rebuilt, Plain]}) == {"f": [rebuilt, Plain]}


def test_cloudpickle_comes_with_the_first_channel() -> None:
    """Not with the import, which stays light; and not later, when a process may have given up its files."""
    code = """
        import sys, fdshare
        before = "cloudpickle" in sys.modules
        here, there = fdshare.Pipe()
        print(before, "cloudpickle" in sys.modules)
        here.close(); there.close()
    """
    assert run_python("-c", textwrap.dedent(code)) == "False True\n"


def run_python(*arguments: str, folder: Path = ROOT) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert run.stderr == ""
    assert run.returncode == 0
    return run.stdout


MAIN = """
import multiprocessing, sys
import attrs
import fdshare
from worker import apply

@attrs.define
class Job:
    file: object
    factor: int

    def work(self):
        return [line.strip() * self.factor for line in self.file]

def shout(words):
    return [exclaim(word) for word in words]

def exclaim(word):
    return word.upper() + MARK

MARK = "!"

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = fdshare.Pipe()
    process = context.Process(target=apply, args=(theirs,))
    process.start()
    theirs.close()
    with ours, open("lines") as file:
        ours.send((shout, Job(file, 2)))
        print(*ours.recv(timeout=30))
    process.join()
"""
WORKER = """
def apply(channel):
    with channel:
        function, job = channel.recv(timeout=30)
        with job.file:
            channel.send(function(job.work()))
"""


@pytest.mark.parametrize("how", ["script", "module", "-c"])
def test_functions_and_classes_of_main(how: str, tmp_path: Path) -> None:
    """A script's own are found by name in a spawned child; those typed in somewhere travel by value."""
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "program.py").write_text(MAIN)
    (tmp_path / "lines").write_text("a\nb\n")
    arguments = {"script": ["program.py"], "module": ["-m", "program"], "-c": ["-c", MAIN]}[how]
    assert run_python(*arguments, folder=tmp_path) == "AA! BB!\n"


# registered types ------------------------------------------------------------------------------------------------------------


class Device:
    """Something with a descriptor of its own, as an extension module may have it."""

    def __init__(self, fd: int, label: str) -> None:
        self.fd = fd
        self.label = label

    def close(self) -> None:
        os.close(self.fd)


class SubDevice(Device):
    pass


def rebuild_device(handle: FdHandle, label: str) -> Device:
    return Device(handle.detach(), label)


@pytest.fixture
def calls() -> Iterator[list[Any]]:
    """Register Device; give the list of what was reduced."""
    reduced: list[Any] = []

    def reduce(device: Device) -> Any:
        reduced.append(device)
        return rebuild_device, (FdHandle.dup(device.fd), device.label)

    before = dict(reducers.known)
    register(Device, reduce=reduce)
    yield reduced
    reducers.known.clear()
    reducers.known.update(before)
    reducers.resolved.clear()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    (tmp_path / "device").write_bytes(b"content")
    device = Device(os.open(tmp_path / "device", os.O_RDONLY), "d")
    yield device
    device.close()


@pytest.fixture(autouse=True)
def _no_resource_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A warning in a destructor is not raised, only printed: keep it, and fail."""
    found: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: found.append(unraisable.exc_value))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        yield
    assert found == []


def test_registered_type_travels(calls: list[Any], device: Device) -> None:
    with leak_check():
        received = trip({"d": device, "again": [device]})
        assert received["d"] is received["again"][0]
        assert (type(received["d"]), received["d"].label) == (Device, "d")
        assert os.read(received["d"].fd, 10) == b"content"
        received["d"].close()
        assert calls == [device]


def test_duplicates_made_for_a_message_are_closed_with_it(calls: list[Any], device: Device) -> None:
    """Sent, refused half-way, encoded twice, or not sent at all: nobody has to think of them."""
    here, there = Pipe()
    with leak_check(), here, there:
        here.send([device, lambda: 1])  # pickle, then cloudpickle
        there.recv()[0].close()
        assert len(calls) >= 2
        refusal([device, (n for n in [])])
        there.close()
        with pytest.raises(BrokenPipeError):
            here.send([device])
        with pytest.raises(BrokenPipeError):
            here.send([device, bytes(1_000_000)])


def test_handle_that_a_registered_type_keeps_is_left_alone(calls: list[Any]) -> None:
    class Keeper:
        def __init__(self) -> None:
            self.handle = numbered_handle(4)

    register(Keeper, reduce=lambda keeper: (list, ([keeper.handle],)))
    keeper = Keeper()
    (received,) = trip(keeper)
    assert not keeper.handle.closed
    assert read_number(received) == 4
    register(Keeper, reduce=lambda keeper: (dict, ((("h", keeper.handle),),)))
    received = trip(move(keeper))["h"]
    assert keeper.handle.closed
    received.close()


def test_registration_is_of_exactly_that_type(calls: list[Any], device: Device) -> None:
    sub = SubDevice(device.fd, "s")
    error = refusal(["x", sub])
    assert error.path == "message[1]"
    assert "subclass of Device" in str(error)
    register(SubDevice, reduce=lambda sub: (str, (sub.label,)))
    assert trip(sub) == "s"


def test_registration_goes_before_everything_else(calls: list[Any]) -> None:
    """Over fdshare's own ways, the class's own pickling, and copyreg's."""

    class Own:
        def __reduce__(self) -> Any:
            return str, ("by the class",)

    assert trip(Own()) == "by the class"
    register(Own, reduce=lambda own: (str, ("by the registration",)))
    assert trip(Own()) == "by the registration"
    register(io.BytesIO, reduce=lambda file: (bytes, (file.getvalue(),)))
    assert trip(io.BytesIO(b"x")) == b"x"


@pytest.mark.parametrize(
    ("reduce", "error", "reason"),
    [
        (lambda device: 1 / 0, ZeroDivisionError, "division by zero"),
        (lambda device: None, Exception, "reduce"),
        (lambda device: (rebuild_device,), Exception, "reduce|tuple"),
        (lambda device: ("no function", ()), Exception, "callable"),
    ],
)
def test_registered_function_that_fails(
    reduce: Any, error: type[Exception], reason: str, calls: list[Any], device: Device
) -> None:
    register(Device, reduce=reduce)
    caught = refusal({"devices": [device]})
    assert caught.path == "message['devices'][0]"
    assert str(caught.type_name).endswith(".Device")
    assert isinstance(caught.__cause__, error)
    assert re.search(reason, str(caught.reason))


@pytest.mark.parametrize("arguments", [("Device", len), (Device(0, ""), len), (Device, None), (Device, "f")])
def test_only_classes_and_functions_are_registered(arguments: Any) -> None:
    with pytest.raises(TypeError, match="a class and a function"):
        register(arguments[0], reduce=arguments[1])


# subclasses of what travels ---------------------------------------------------------------------------------------------------


class MyFileIO(io.FileIO):
    pass


class MyReader(io.BufferedReader):
    pass


class MyWriter(io.BufferedWriter):
    pass


class MyRandom(io.BufferedRandom):
    pass


class MyText(io.TextIOWrapper):
    pass


class MyConnection(Connection):
    pass


class MyChannel(Channel):
    pass


class MyHandle(FdHandle):
    pass


def make_subclass(cls: type, path: Path) -> Any:
    if cls is MyText:
        return MyText(open(path, "r+b"))
    if cls in (MyConnection, MyHandle):
        return cls(os.open(path, os.O_RDWR))
    if cls is MyChannel:
        here, there = Pipe()
        there.close()
        return MyChannel(FdHandle.dup(here).to_socket()), here
    return cls(path, "r+") if cls is MyFileIO else cls(io.FileIO(path, "r+"))


@pytest.mark.parametrize(
    "cls",
    [MyFileIO, MyReader, MyWriter, MyRandom, MyText, MyConnection, MyChannel, MyHandle],
    ids=lambda c: c.__name__,
)
def test_subclass_is_refused_or_travels_and_never_becomes_its_base(cls: type, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"content")
    made = make_subclass(cls, path)
    thing, *others = made if isinstance(made, tuple) else (made,)
    error = refusal({"thing": [thing]})
    assert error.path == "message['thing'][0]"
    assert error.type_name == f"{cls.__module__}.{cls.__name__}"
    assert f"fdshare.register({cls.__name__}, reduce=...)" in str(error)
    before = dict(reducers.known)
    try:
        register(cls, reduce=lambda thing: (str, ("its own way",)))
        assert trip(thing) == "its own way"
    finally:
        reducers.known.clear()
        reducers.known.update(before)
        reducers.resolved.clear()
    for each in (thing, *others):
        each.close()


class KnowingFile(io.FileIO):
    """Says itself how it is pickled."""

    def __reduce_ex__(self, protocol: object) -> Any:  # since Python 3.12 files have one that refuses
        return KnowingFile.reopen, (self.name, self.tell())

    @classmethod
    def reopen(cls, name: str, position: int) -> KnowingFile:
        file = cls(name)
        file.seek(position)
        return file


class CopyregFile(io.FileIO):
    pass


def test_subclass_that_says_how_it_is_pickled_travels_so(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    copyreg.pickle(CopyregFile, lambda file: (CopyregFile, (file.name,)))  # type: ignore[arg-type,return-value]
    for cls in (KnowingFile, CopyregFile):
        with cls(str(tmp_path / "f")) as file:
            file.seek(3)
            with trip(file) as received:
                assert type(received) is cls
                assert received.read() == (b"tent" if cls is KnowingFile else b"content")
