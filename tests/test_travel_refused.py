"""What cannot travel is refused before anything is sent: with its type, its exact place in the message, and the way out."""

from __future__ import annotations

import asyncio
import bz2
import codecs
import contextlib
import contextvars
import dataclasses
import functools
import gzip
import io
import lzma
import mmap
import os
import pickle
import re
import select
import selectors
import socket
import sqlite3
import subprocess
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from travel import refusal

from fdshare import ChannelSet, NotSendableError, Pipe, move
from fdshare.testing import leak_check, numbered_handle


@attrs.define
class Job:
    name: str
    log: Any


@dataclasses.dataclass
class Data:
    log: Any


@dataclasses.dataclass(slots=True)
class SlottedData:
    log: Any


class Slots:
    __slots__ = ("log",)

    def __init__(self, log: Any) -> None:
        self.log = log


class SubSlots(Slots):
    __slots__ = ("other",)


class SingleSlot:
    __slots__ = "log"

    def __init__(self, log: Any) -> None:
        self.log = log


class Plain:
    def __init__(self, log: Any) -> None:
        self.log = log

    def method(self) -> None:
        """Bound to what cannot travel."""


class Private:
    __slots__ = ("__log",)

    def __init__(self, log: Any) -> None:
        self.__log = log


class WithState:
    def __init__(self, log: Any) -> None:
        self.log = log

    def __getstate__(self) -> Any:
        return {"saved": self.log}


def in_a_closure(log: Any) -> Any:
    return lambda: log


def in_a_default(log: Any) -> Any:
    return lambda log=log: log


def in_a_closure_of_a_closure(log: Any) -> Any:
    inner = in_a_closure(log)
    return lambda: inner


def in_a_local_class(log: Any) -> Any:
    class Local:
        held = log

    return Local()


# the place ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (lambda bad: bad, "message"),
        (lambda bad: {"jobs": [0, 1, 2, Job("j", bad)]}, "message['jobs'][3].log"),
        (lambda bad: {"jobs": [0, 1, 2, Data(bad)]}, "message['jobs'][3].log"),
        (lambda bad: {"jobs": (0, SlottedData(bad))}, "message['jobs'][1].log"),
        (lambda bad: [Slots(bad)], "message[0].log"),
        (lambda bad: [SubSlots(bad)], "message[0].log"),
        (lambda bad: [SingleSlot(bad)], "message[0].log"),
        (lambda bad: [Plain(bad)], "message[0].log"),
        (lambda bad: Plain(Plain([Plain({"x": bad})])), "message.log.log[0].log['x']"),
        (lambda bad: [[], [[bad]]], "message[1][0][0]"),
        (lambda bad: {1: {None: {(2, "b"): bad}}}, "message[1][None][(2, 'b')]"),
        (lambda bad: (1, move({"a": move(bad)})), "message[1]['a']"),
        (lambda bad: functools.partial(print, 1, bad), "message.args[1]"),
        (lambda bad: functools.partial(print, end=bad), "message.keywords['end']"),
        (lambda bad: Plain(bad).method, "message.__self__.log"),
        (in_a_closure, "message.log"),
        (in_a_closure_of_a_closure, "message.inner.log"),
        (lambda bad: {"a": "x" * 100, "b": bad}, "message['b']"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("kind", ["lock", "closed_socket"])
def test_exact_place(build: Callable[[Any], Any], path: str, kind: str) -> None:
    bad: Any = threading.Lock() if kind == "lock" else socket.socket()
    if kind == "closed_socket":
        bad.close()
    error = refusal(build(bad))
    assert error.path == path
    assert error.type_name == {"lock": "_thread.lock", "closed_socket": "socket.socket"}[kind]
    assert (
        error.reason == {"lock": "cannot pickle '_thread.lock' object", "closed_socket": "it is closed"}[kind]
    )
    assert isinstance(error, TypeError)
    assert isinstance(error, pickle.PicklingError)


def test_place_in_a_set_shows_the_element() -> None:
    bad = threading.Lock()
    assert refusal([{1, bad}]).path == f"message[0]{{{bad!r:.60}}}"
    assert refusal([frozenset([bad])]).path == f"message[0]{{{bad!r:.60}}}"


def test_place_of_a_key() -> None:
    bad = threading.Lock()
    assert refusal({"k": {bad: 1}}).path == f"message['k'].keys()[{bad!r:.60}]"


@pytest.mark.parametrize(
    "build", [in_a_default, in_a_local_class, WithState, Private], ids=lambda f: f.__name__
)
def test_place_that_no_expression_names_is_at_least_its_object(build: Callable[[Any], Any]) -> None:
    error = refusal({"jobs": [build(threading.Lock())]})
    assert str(error.path).startswith("message['jobs'][0]")
    assert "lock" in str(error.reason)


def test_first_of_several_is_named() -> None:
    assert refusal([1, threading.Lock(), (n for n in [])]).path == "message[1]"


def test_long_key_is_cut() -> None:
    path = refusal({"x" * 1000: threading.Lock()}).path
    assert path is not None
    assert len(path) < 100


containers = st.lists(
    st.sampled_from(["list", "tuple", "dict", "attrs", "data", "slots", "partial"]), max_size=8
)


@given(containers, st.integers(0, 3))
def test_place_at_any_depth(steps: list[str], before: int) -> None:
    """Whatever stands beside it, descriptors too; evaluated, the path leads to the object."""
    bad = threading.Lock()
    message: Any = bad
    path = ""
    with numbered_handle(1) as handle, leak_check():
        for step in reversed(steps):
            beside: list[Any] = [handle, "text", move(handle)][:before]
            if step in ("list", "tuple"):
                message = (list if step == "list" else tuple)([*beside, message])
                path = f"[{len(beside)}]{path}"
            elif step == "dict":
                message = {**{str(n): item for n, item in enumerate(beside)}, "bad": message}
                path = f"['bad']{path}"
            elif step == "partial":
                message = functools.partial(print, *beside, message)
                path = f".args[{len(beside)}]{path}"
            else:
                message = {"attrs": functools.partial(Job, "j"), "data": Data, "slots": Slots}[step](message)
                path = f".log{path}"
        error = refusal(message)
        assert error.path == f"message{path}"
        assert eval(str(error.path)) is bad
        assert not handle.closed


# the kind ----------------------------------------------------------------------------------------------------------------------


class OwnSelector(selectors.SelectSelector):
    """As programs derive their own."""


@contextlib.contextmanager
def making(name: str, tmp_path: Path) -> Iterator[Any]:
    """Make something that cannot travel, and close it afterwards."""
    path = tmp_path / "f"
    path.write_bytes(b"content\n" * 100)
    with contextlib.ExitStack() as stack:
        if name in ("gzip", "bz2", "lzma"):
            opener: Any = {"gzip": gzip, "bz2": bz2, "lzma": lzma}[name].open
            with opener(tmp_path / "z", "wb") as file:
                file.write(b"hello\n" * 100)
            file = stack.enter_context(opener(tmp_path / "z", "rb"))
            file.read(3)
            yield file
            assert file.read(3) == b"lo\n"
        elif name == "gzip_text":
            with gzip.open(tmp_path / "z", "wt") as text:
                text.write("hello\n")
            yield stack.enter_context(gzip.open(tmp_path / "z", "rt"))
        elif name == "zip_member":
            with zipfile.ZipFile(tmp_path / "z", "w") as archive:
                archive.writestr("a", "hello")
            archive = stack.enter_context(zipfile.ZipFile(tmp_path / "z"))
            yield stack.enter_context(archive.open("a"))
        elif name == "rw_pair":
            reader, writer = os.pipe()
            pair = io.BufferedRWPair(open(reader, "rb", 0), open(writer, "wb", 0))  # noqa: SIM115
            yield stack.enter_context(contextlib.closing(pair))
        elif name == "codecs_open":
            # What codecs.open makes, which is deprecated from Python 3.14 on.
            _, _, reader, writer = codecs.lookup("utf-8")
            yield stack.enter_context(codecs.StreamReaderWriter(path.open("rb"), reader, writer))
        elif name == "memoryview":
            yield memoryview(b"hello")
        elif name == "mmap":
            with path.open("r+b") as file:
                yield stack.enter_context(mmap.mmap(file.fileno(), 0))
        elif name == "Popen":
            process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            yield stack.enter_context(process)
        elif name == "generator":
            yield (n for n in range(3))
        elif name == "coroutine":

            async def coroutine() -> None:
                """Never awaited."""

            made = coroutine()
            yield made
            made.close()
        elif name == "thread":
            yield threading.Thread(target=print)
        elif name == "frame":
            yield sys._getframe()
        elif name == "weakref":
            thing = Plain(1)
            yield weakref.ref(thing)
        elif name == "database":
            yield stack.enter_context(contextlib.closing(sqlite3.connect(":memory:")))
        elif name == "event_loop":
            yield stack.enter_context(contextlib.closing(asyncio.new_event_loop()))
        elif name == "text_in_memory":
            yield io.TextIOWrapper(io.BytesIO(b"x"))
        elif name == "poll":
            yield select.poll()
        elif name.endswith("selector"):
            made = {"selector": selectors.DefaultSelector, "select_selector": selectors.SelectSelector}
            with made.get(name, OwnSelector)() as selector:
                key = selector.register(stack.enter_context(socket.socket()), selectors.EVENT_READ)
                assert key.fd >= 0
                yield selector
        elif name == "selector_key":
            yield selectors.SelectorKey(0, 0, selectors.EVENT_READ, None)
        elif name == "channel_set":
            yield stack.enter_context(ChannelSet())
        elif name == "entry":
            yield next(stack.enter_context(os.scandir(tmp_path)))
        elif name == "entries":
            yield stack.enter_context(os.scandir(tmp_path))
        elif name == "future":
            loop = stack.enter_context(contextlib.closing(asyncio.new_event_loop()))
            yield loop.create_future()
        elif name == "callback":
            loop = stack.enter_context(contextlib.closing(asyncio.new_event_loop()))
            yield loop.call_soon(print)
        elif name == "context":
            yield contextvars.copy_context()
        elif name == "closed_file":
            with path.open() as file_:
                pass
            yield file_
        elif name == "closed_binary":
            with path.open("rb") as file_:
                pass
            yield file_
        elif name == "closed_raw":
            with path.open("rb", buffering=0) as file_:
                pass
            yield file_
        elif name == "detached":
            text = path.open()
            with text.detach():
                yield text
        else:
            yield {
                "lock": threading.Lock,
                "rlock": threading.RLock,
                "condition": threading.Condition,
                "event": threading.Event,
                "semaphore": threading.Semaphore,
                "local": threading.local,
            }[name]()


@pytest.mark.parametrize(
    ("name", "type_name", "reason"),
    [
        ("gzip", "gzip.GzipFile", "a compressed stream .*: send the file below it"),
        ("bz2", "bz2.BZ2File", "a compressed stream .*: send the file below it"),
        ("lzma", "lzma.LZMAFile", "a compressed stream .*: send the file below it"),
        ("gzip_text", "gzip.GzipFile", "a compressed stream .*: send the file below it"),
        ("zip_member", "zipfile.*ZipExtFile", "send the archive"),
        ("rw_pair", "_io.BufferedRWPair", "it joins two streams: send the two"),
        ("codecs_open", "codecs.StreamReaderWriter", r"use open\(..., encoding=...\)"),
        ("memoryview", "memoryview", r"send bytes\(view\)"),
        ("mmap", "mmap.mmap", "send the file and map it there"),
        ("Popen", "subprocess.Popen", "send its pipes"),
        ("generator", "generator", "generator"),
        ("coroutine", "coroutine", "coroutine"),
        ("thread", r"threading.Thread|_thread\.\w+", ""),
        ("frame", "frame", "frame"),
        ("weakref", "weakref.*|ReferenceType", "weakref"),
        ("database", "sqlite3.Connection", ""),
        ("event_loop", r"asyncio\..*EventLoop", "make one there"),
        ("future", r"_asyncio\.Future", "make one there"),
        ("callback", r"asyncio\.events\.Handle", "make one there"),
        ("selector", r"selectors\.\w+Selector", "register them there"),
        ("select_selector", r"selectors\.SelectSelector", "register them there"),
        ("own_selector", r".*OwnSelector", "register them there"),
        ("selector_key", r"selectors\.SelectorKey", "send its fileobj"),
        ("channel_set", r"fdshare\.waiting\.ChannelSet", r"send list\(set\)"),
        ("entry", r"posix\.DirEntry", r"send entry\.path"),
        ("entries", r"posix\.ScandirIterator", "send the path"),
        ("poll", "select.poll", "register them there"),
        ("context", "_?contextvars.Context", "Context"),
        ("text_in_memory", "_io.TextIOWrapper", "no descriptor"),
        ("closed_file", "_io.TextIOWrapper", "it is closed"),
        ("closed_binary", "_io.BufferedReader", "it is closed"),
        ("closed_raw", "_io.FileIO", "it is closed"),
        ("detached", "_io.TextIOWrapper", "detached"),
        ("lock", "_thread.lock", "lock"),
        ("rlock", "_thread.RLock", "RLock"),
        ("condition", ".*", "[Ll]ock"),
        ("event", ".*", "lock"),
        ("semaphore", ".*", "lock"),
        ("local", "_thread._local", "local"),
    ],
)
@pytest.mark.parametrize("moved", [False, True])
def test_what_cannot_travel(name: str, type_name: str, reason: str, moved: bool, tmp_path: Path) -> None:
    with making(name, tmp_path) as thing:
        error = refusal({"things": [move(thing) if moved else thing]})
        assert str(error.path).startswith("message['things'][0]")
        assert re.fullmatch(type_name, str(error.type_name)), error.type_name
        assert re.search(reason, str(error.reason)), error.reason


def test_read_only_memory_is_refused_as_it_is_and_travels_as_bytes() -> None:
    here, there = Pipe()
    with here, there:
        view = memoryview(b"hello")
        refusal(view)
        here.send(bytes(view))
        assert there.recv() == b"hello"
        here.send(pickle.PickleBuffer(b"x" * 100_000))
        assert bytes(there.recv()) == b"x" * 100_000


# around it --------------------------------------------------------------------------------------------------------------------


def test_nothing_is_sent_and_nothing_leaks() -> None:
    with leak_check(), numbered_handle(1) as handle:
        here, there = Pipe()
        with here, there:
            for message in (
                [handle, threading.Lock()],
                [move(handle), threading.Lock()],
                [b"x" * 200_000, threading.Lock()],
            ):
                with pytest.raises(NotSendableError):
                    here.send(message)
                assert not there.poll(0)
            assert not handle.closed


def test_error_tells_its_cause_and_survives_pickling() -> None:
    error = refusal({"a": [threading.Lock()]})
    assert isinstance(error.__cause__, TypeError)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.path, copy.type_name, copy.reason) == (
        str(error),
        error.path,
        error.type_name,
        error.reason,
    )


class Counts:
    """Pickled how often?"""

    pickled = 0

    def __reduce__(self) -> Any:
        type(self).pickled += 1
        return Counts, ()


def test_finding_the_place_in_a_large_message_is_bounded() -> None:
    """One in a hundred thousand: it may not be found, but the error comes soon."""
    Counts.pickled = 0
    message = [Counts() for _ in range(20_000)]
    message.append(threading.Lock())  # type: ignore[arg-type]
    error = refusal(message)
    assert str(error.path).startswith("message")
    assert "lock" in str(error.reason)
    assert Counts.pickled < 100_000


class RaisesInReduce:
    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


class RaisesInGetattr:
    def __init__(self) -> None:
        self.__dict__["lock"] = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("nosy")


@pytest.mark.parametrize(
    ("make", "place", "reason"),
    [(RaisesInReduce, "message[0]", "not today"), (RaisesInGetattr, "message[0]", "nosy|lock")],
    ids=["reduce", "getattr"],
)
def test_objects_that_raise_while_looked_at(make: Any, place: str, reason: str) -> None:
    error = refusal([make()])
    assert str(error.path).startswith(place)
    assert re.search(reason, str(error.reason))


class BadRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __reduce__(self) -> Any:
        raise TypeError("no pickle either")


def test_key_whose_repr_fails() -> None:
    assert "no pickle either" in str(refusal({BadRepr(): 1}).reason)
    assert "no pickle either" in str(refusal({1: {BadRepr()}}).reason)


def test_empty_cell_of_a_closure() -> None:
    """A name that a function refers to and nobody has set yet."""

    def outer() -> Any:
        lock = threading.Lock()
        if False:
            later = 1

        def function() -> Any:
            return lock, later

        return function

    assert refusal(outer()).path == "message.lock"


def test_place_of_a_private_slot() -> None:
    assert refusal([Private(threading.Lock())]).path == "message[0]._Private__log"


def test_compressed_text_is_named_by_its_compressed_layer(tmp_path: Path) -> None:
    with making("gzip_text", tmp_path) as text:
        assert refusal({"x": text}).path == "message['x'].buffer"
