"""Arrays in shared memory: they, and whatever is made of them, travel by reference; ordinary ones by value as ever."""

from __future__ import annotations

import concurrent.futures
import copy
import gc
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    QUICK_METHODS,
    bare_pair,
    capture,
    close_pieces,
    requires_memfd,
    requires_proc,
    requires_seqpacket,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shared import Call, Lent, Own, decode, descriptors, mappings, memory_file

import fdshare
from fdshare import (
    Channel,
    DecodeError,
    NoSpaceError,
    SharedMemory,
    handoff,
    memory,
    share,
    shared_array,
)
from fdshare.shared.allocation import allocate
from fdshare.shared.mapping import address_of, find
from fdshare.shared.references import rebuild_array
from fdshare.testing import Child, checked_child

np = pytest.importorskip("numpy")

MIB = 1 << 20


def sent(pair: tuple[Channel, Channel], obj: Any) -> Any:
    a, b = pair
    a.send(obj)
    return b.recv()


# making


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [(5, (5,)), ((), ()), ((2, 3), (2, 3)), ([2, 0, 3], (2, 0, 3)), (0, (0,)), (np.int64(4), (4,))],
)
@pytest.mark.parametrize(
    "dtype", ["float64", "u1", ">i4", "M8[s]", "S7", "c16", "?", np.float32, [("a", "i4"), ("b", "f8")]]
)
def test_new_array_is_zeros(shape: Any, sizes: Any, dtype: Any) -> None:
    array = shared_array(shape, dtype)
    assert (type(array), array.shape, array.dtype) == (np.ndarray, sizes, np.dtype(dtype))
    assert array.tobytes() == bytes(array.nbytes)
    assert array.flags.writeable
    assert array.flags.aligned


def test_new_array_defaults() -> None:
    assert shared_array((2, 3)).dtype == np.float64
    assert shared_array((2, 3)).flags.c_contiguous
    fortran = shared_array((2, 3), order="F")
    assert fortran.flags.f_contiguous
    assert fortran.strides == (8, 16)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (((2,), object), TypeError),
        (((2,), [("a", "i4"), ("b", "O")]), TypeError),
        (((2,), "no such type"), TypeError),
        ((-1,), ValueError),
        (((2, -1),), ValueError),
        ((1.5,), TypeError),
        (((1.5, 2),), TypeError),
        ((2, "f8", "A"), ValueError),
    ],
)
def test_array_that_cannot_be(arguments: Any, error: type[Exception]) -> None:
    before = descriptors()
    with pytest.raises(error):
        shared_array(*arguments)
    assert descriptors() == before


def test_array_without_room() -> None:
    with pytest.raises(NoSpaceError):
        shared_array((1 << 20, 1 << 20, 1 << 10))


@requires_proc
def test_array_goes_with_its_last_view() -> None:
    before = descriptors(), mappings()
    array = shared_array((100, 100))
    column = array[:, 3]
    del array
    column[:] = 1
    assert (descriptors(), mappings()) == (before[0] + 1, before[1] + 1)
    del column
    assert (descriptors(), mappings()) == before


# by reference

STRUCTURE = [("name", "S4"), ("value", "f8", (2,)), ("flag", "?")]

VIEWS: dict[str, Callable[[], Any]] = {
    "flat": lambda: shared_array(1000),
    "large": lambda: shared_array((2000, 500)),
    "slice": lambda: shared_array(1000)[10:20],
    "strided": lambda: shared_array((100, 100))[::2, 1::3],
    "transposed": lambda: shared_array((100, 50, 20)).transpose(2, 0, 1),
    "fortran": lambda: shared_array((100, 50), order="F"),
    "fortran_slice": lambda: shared_array((100, 50), order="F")[3:7],
    "reversed": lambda: shared_array(1000)[::-1],
    "reversed_strided": lambda: shared_array((100, 100))[::-3, ::-1].T,
    "single": lambda: shared_array(()),
    "element": lambda: shared_array(10)[3:4].reshape(()),
    "structured": lambda: shared_array(10, STRUCTURE),
    "field": lambda: shared_array(10, STRUCTURE)["value"],
    "some_fields": lambda: shared_array(10, STRUCTURE)[["name", "flag"]],
    "other_type": lambda: shared_array(10).view("u2"),
    "part_of_complex": lambda: shared_array(10, "c16").imag,
    "big_endian": lambda: shared_array(10, ">i2"),
    "dates": lambda: shared_array(10, "M8[ms]"),
    "text": lambda: shared_array(10, "U3"),
    "diagonal": lambda: np.diagonal(shared_array((10, 10))),
    "unaligned": lambda: shared_array(81, "u1")[1:].view("f8"),
    "one_more_direction": lambda: shared_array(10)[None, :, None],
    "recarray": lambda: shared_array(10, STRUCTURE).view(np.recarray),
    "matrix": lambda: shared_array((5, 5)).view(np.matrix),
    "on_memory": lambda: np.frombuffer(SharedMemory(800).buf, "f8"),
    "on_memory_by_ndarray": lambda: np.ndarray((10, 10), "f4", SharedMemory(800).buf, 16),
    "shared_copy": lambda: share(np.arange(1000.0)),
}


@pytest.mark.parametrize("make", VIEWS.values(), ids=VIEWS.keys())
def test_whatever_view_travels_by_reference(pair: tuple[Channel, Channel], make: Callable[[], Any]) -> None:
    array = make()
    received = sent(pair, {"array": [array]})["array"][0]
    assert received is not array
    assert type(received) is type(array)
    assert (received.dtype, received.shape) == (array.dtype, array.shape)
    # Where there is one element, no stride means anything.
    for size, ours, theirs in zip(array.shape, array.strides, received.strides, strict=True):
        assert size == 1 or ours == theirs
    assert same_place(received, array)
    assert received.flags.writeable == array.flags.writeable
    received.flags.writeable = True
    received.view(np.ndarray)[...] = np.ones((), "u1").astype(
        array.dtype if array.dtype.names is None else "?"
    )
    assert array.tobytes() == received.tobytes()


def same_place(one: Any, other: Any) -> bool:
    return bool(one.__array_interface__["data"][0] == other.__array_interface__["data"][0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: shared_array((0, 5)),
        lambda: shared_array((5, 5))[:0],
        lambda: shared_array((5, 5))[5:],
        lambda: shared_array(0),
    ],
)
def test_arrays_of_no_elements(pair: tuple[Channel, Channel], make: Callable[[], Any]) -> None:
    array = make()
    received = sent(pair, array)
    assert (received.shape, received.dtype) == (array.shape, array.dtype)


def test_read_only_view_stays_read_only(pair: tuple[Channel, Channel]) -> None:
    array = shared_array(10)
    view = array[:]
    view.flags.writeable = False
    repeated = np.broadcast_to(array, (3, 10))
    received, broad = sent(pair, [view, repeated])
    assert not received.flags.writeable
    assert not broad.flags.writeable
    assert broad.strides == (0, 8)
    array[5] = 7
    assert received[5] == 7
    assert broad[2, 5] == 7


@requires_memfd
def test_array_on_sealed_memory_is_read_only(pair: tuple[Channel, Channel]) -> None:
    shared = SharedMemory.from_buffer(np.arange(10.0))
    shared.seal()
    array = np.frombuffer(shared.buf)
    received = sent(pair, [array])[0]
    assert same_place(received, array)
    with pytest.raises(ValueError, match="read-only"):
        received[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        received.flags.writeable = True


def _scale(channel: Channel) -> None:
    with channel:
        whole, parts = channel.recv()
        for part in parts:
            part *= 10
        channel.send(whole.sum())
        channel.recv()


@pytest.mark.parametrize("method", QUICK_METHODS)
@pytest.mark.parametrize("kind", ["memfd", "file"])
def test_another_process_writes_into_it(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "file" and method != "fork":
        return  # the child would not know
    monkeypatch.setattr(memory, "HAVE_MEMFD", kind == "memfd")
    array = shared_array((4, 4))
    array[:] = np.arange(16).reshape(4, 4)
    a, b = fdshare.Pipe()
    with a, Child(_scale, b, method=method, unwanted=(a,)) as child:
        b.close()
        a.send((array, [array[0], array[1:, 2], array[::-2, ::-2]]))
        total = a.recv(timeout=30)
        assert total == array.sum()
        expected = np.arange(16.0).reshape(4, 4)
        for part in (expected[0], expected[1:, 2], expected[::-2, ::-2]):
            part *= 10
        assert (array == expected).all()
        a.send("end")
        child.result(30)


def _put(array: Any, again: Any, plain: Any, queue: Any) -> None:
    array[1] = 5
    again[0] = 6
    plain[0] = 7
    queue.put(array[1:])
    queue.get()
    queue.close()  # with its thread, which the leak check would wait for
    queue.join_thread()


def test_argument_of_a_process_and_stock_queue() -> None:
    """Multiprocessing's own pickler, which would take the values."""
    context = multiprocessing.get_context("spawn")
    array, plain, queue = shared_array((2, 4)), np.zeros(3), context.Queue()
    first, second = array
    process = context.Process(target=_put, args=(first, second, plain, queue))
    process.start()
    part = queue.get(timeout=30)
    assert array[:, :2].tolist() == [[0, 5], [6, 0]]
    assert plain[0] == 0
    part[1] = 8
    assert array[0, 2] == 8
    queue.put(None)
    process.join()
    assert process.exitcode == 0
    process.close()
    queue.close()
    queue.join_thread()


def test_argument_and_result_of_stock_pools() -> None:
    array = shared_array(10)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        result = pool.apply(_increment, (array[2:],))
        assert array.tolist() == [0, 0, *[1] * 8]
        result[0] = 7
        assert array[3] == 7
        assert pool.apply(_increment, (np.arange(3),)).tolist() == [2, 3]
        pool.close()
        pool.join()
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as futures:
        futures.submit(_increment, array.view(np.recarray)).result(30)
    assert array[9] == 2


def _increment(array: Any) -> Any:
    array += 1
    return array[1:]


def test_pool_takes_and_returns_it() -> None:
    array = shared_array(10)
    with fdshare.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        results = list(pool.map(_increment, [array[:5], array[5:]]))
        assert (array == 1).all()
        array[1:5] = 7
        assert results[0].tolist() == [7] * 4
        results[1][0] = 9
        assert array[6] == 9
        later = shared_array(3)
        assert pool.submit(_increment, later).result(30).base is not None
        assert later.tolist() == [1] * 3


# what a message costs


@requires_seqpacket
@pytest.mark.parametrize(
    "make", [lambda n: shared_array(n, "u1"), lambda n: shared_array((n, 2), "u1")[:, 0]]
)
def test_message_is_as_small_for_much_as_for_little(make: Any) -> None:
    sizes = []
    for count in (1 << 10, 64 * MIB):
        with bare_pair("seqpacket") as (channel, bare):
            channel.send(make(count))
            pieces = capture(bare)
            assert sum(len(fds) for _, fds in pieces) == 1
            sizes.append(sum(len(data) for data, _ in pieces))
            close_pieces(pieces)
    assert sizes[1] - sizes[0] < 20  # the figures are longer
    assert sizes[1] < 400


@requires_seqpacket
@pytest.mark.parametrize("views", [1, 2, 100, 2000])
def test_views_of_one_memory_are_one_descriptor_and_stay_one(
    pair: tuple[Channel, Channel], views: int
) -> None:
    array = shared_array((views, 4))
    with bare_pair("seqpacket") as (channel, bare):
        channel.send([*array, array.T])
        pieces = capture(bare)
        assert sum(len(fds) for _, fds in pieces) == 1
        close_pieces(pieces)
    *rows, whole = sent(pair, [*array, array.T])
    rows[-1][2] = 5
    assert whole[2, views - 1] == 5
    assert array[views - 1, 2] == 5


@requires_proc
def test_receiver_keeps_one_descriptor_and_one_mapping_for_all(pair: tuple[Channel, Channel]) -> None:
    array = shared_array((100, 4))
    before = descriptors(), mappings()
    kept = [sent(pair, row) for row in array]
    assert (descriptors(), mappings()) == before
    del array
    assert (descriptors(), mappings()) == before
    kept.clear()
    assert (descriptors(), mappings()) == (before[0] - 1, before[1] - 1)


def test_same_array_twice_is_one_object(pair: tuple[Channel, Channel]) -> None:
    array = shared_array(10)
    first, second = sent(pair, [array, array])
    assert first is second


def test_mixed_with_memory_descriptors_and_values(pair: tuple[Channel, Channel], tmp_path: Path) -> None:
    shared = SharedMemory(800)
    first, second = shared_array(10), np.frombuffer(shared.buf)
    ordinary = np.arange(200_000)
    path = tmp_path / "file"
    path.write_text("content")
    with open(path) as file:
        one, holder, two, value, own, got = sent(
            pair, (first, shared, second[::2], ordinary, Own(shared.buf[8:16]), file)
        )
    with got:
        assert got.read() == "content"
    holder.buf[:8] = np.float64(3).tobytes()
    own.memory[:] = np.float64(4).tobytes()
    assert second[:2].tolist() == [3, 4]
    assert two[0] == 3
    one[1] = 2
    assert first[1] == 2
    value[0] = 5
    assert ordinary[0] == 0


def test_array_that_another_class_lends(pair: tuple[Channel, Channel]) -> None:
    array, ordinary = shared_array(10, "u1"), np.zeros(10, "u1")
    lent = [
        Own(array),
        Own(array[3:]),
        Own(ordinary),
        Own(memoryview(array)[3:]),
        Own(memoryview(array[2:])[1:5]),
    ]
    one, part, copy_, *slices = sent(pair, lent)
    one.memory[4] = 5
    copy_.memory[0] = 1
    assert (part.memory[1], array[4], ordinary[0]) == (5, 5, 0)
    assert [piece.memory[1] for piece in slices] == [5, 5]
    assert len(slices[1].memory) == 4


def test_array_in_a_function(pair: tuple[Channel, Channel]) -> None:
    """By way of cloudpickle."""
    array = shared_array(10)

    def put(value: float) -> None:
        array[3] = value

    sent(pair, put)(5)
    assert array[3] == 5


# ordinary arrays


def test_ordinary_arrays_travel_by_value_as_ever(pair: tuple[Channel, Channel], tmp_path: Path) -> None:
    keep = shared_array(10)
    on_disk = np.memmap(tmp_path / "map", "u1", "w+", shape=(10,))
    for array in (
        np.arange(10),
        np.arange(10)[2:5],
        np.arange(100_000).reshape(100, 1000)[:, ::2],
        np.frombuffer(bytearray(b"12345678")),
        np.array([{}, []], object),
        np.ma.masked_array([1, 2, 3], [0, 1, 0]),
        on_disk,
        keep.copy(),
        np.array(["a", "bc"], np.dtypes.StringDType()) if hasattr(np.dtypes, "StringDType") else np.arange(2),
    ):
        received = sent(pair, array)
        assert type(received) is type(array)
        assert (received == array).all()
        assert not np.shares_memory(np.asarray(received), np.asarray(array))


class Labelled(np.ndarray):  # type: ignore[misc]  # numpy may be absent for mypy
    """A subclass with something of its own."""


def test_unknown_subclasses_travel_by_value(pair: tuple[Channel, Channel]) -> None:
    array = shared_array(10).view(Labelled)
    received = sent(pair, array)
    assert type(received) is Labelled
    received[0] = 1
    assert array[0] == 0


def test_nothing_looks_for_shared_memory_where_there_is_none() -> None:
    code = (
        "import sys, numpy as np, fdshare\n"
        "from fdshare import reducers\n"
        "a, b = fdshare.Pipe()\n"
        "a.send([np.arange(5), np.arange(100_000)]); b.recv()\n"
        "assert reducers.find_window is None and reducers.resolved[np.ndarray] is None\n"
        "assert not {'fdshare.shared', 'fdshare.shared.mapping'} & set(sys.modules)\n"
        "a.close(); b.close()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=30)


def test_numpy_need_not_be_there() -> None:
    code = (
        "import sys, fdshare\n"
        "a, b = fdshare.Pipe()\n"
        "shared = fdshare.SharedMemory(10)\n"
        "a.send(shared); b.recv().buf[0] = 1\n"
        "assert shared.buf[0] == 1\n"
        "try: fdshare.share([1])\n"
        "except TypeError: pass\n"
        "assert 'numpy' not in sys.modules\n"
        "a.close(); b.close()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=30)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda array: pickle.loads(pickle.dumps(array, 5))]
)
def test_copies_are_ordinary_arrays(copied: Any) -> None:
    array = shared_array((10, 10))[::2]
    other = copied(array)
    assert not np.shares_memory(array, other)
    other[0] = 1
    assert array[0, 0] == 0


def test_other_picklers_are_left_alone() -> None:
    shared_array(10)
    assert np.ndarray not in handoff.carried_types()
    assert SharedMemory in handoff.carried_types()


# what a receiver refuses


@requires_memfd
@pytest.mark.parametrize(
    "arguments",
    [
        ("f8", (3,), None, 0, True),
        ("u1", (16,), None, 1, True),
        ("u1", (17,), None, 0, True),
        ("u1", (4,), (8,), 0, True),
        ("u1", (4,), (-1,), 2, True),
        ("u1", (1 << 62,), None, 0, True),
        ("u1", (1 << 40, 1 << 40), (0, 1 << 60), 0, True),
        ("u1", (4,), None, -1, True),
        ("u1", (4,), None, 1 << 70, True),
        ("O", (2,), None, 0, True),
        ([("a", "O")], (2,), None, 0, True),
        ("u1", "shape", None, 0, True),
        ("u1", (4,), None, 0, True, int),
    ],
)
def test_receiver_checks_that_an_array_stays_inside(arguments: Any) -> None:
    fd = memory_file(16, seals=2)
    with pytest.raises(DecodeError):
        decode(rebuild_array, Lent(0o100000), *arguments, handles=[fd])
    gc.collect()
    assert mappings() == 0


# share


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(1000.0),
        lambda: np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        lambda: np.arange(1000).reshape(10, 100)[::2, ::-3],
        lambda: np.array(5),
        lambda: np.empty((0, 5)),
        lambda: np.zeros(10, STRUCTURE),
        lambda: np.zeros(10, STRUCTURE).view(np.recarray),
        lambda: np.matrix([[1, 2], [3, 4]]),
        lambda: np.array(["2020-01-01"], "M8[D]"),
        lambda: np.array(["text", "more"]),
        lambda: np.broadcast_to(np.arange(5), (3, 5)),
        lambda: np.frombuffer(b"read only", "u1"),
        lambda: np.arange(3, dtype=">f4"),
        lambda: np.arange(1_000_000),
    ],
)
def test_share_makes_an_equal_array(pair: tuple[Channel, Channel], make: Callable[[], Any]) -> None:
    array = make()
    shared = share(array)
    assert type(shared) is type(array)
    assert (shared.dtype, shared.shape) == (array.dtype, array.shape)
    assert (shared == array).all()
    assert not np.shares_memory(shared, array)
    received = sent(pair, shared)
    assert (received == array).all()
    assert not array.size or same_place(received, shared)
    assert share(shared) is shared


def test_share_keeps_what_is_read_only(pair: tuple[Channel, Channel]) -> None:
    array = np.arange(10)
    array.flags.writeable = False
    assert not sent(pair, share(array)).flags.writeable
    assert sent(pair, share(np.arange(10))).flags.writeable


@requires_seqpacket
def test_share_containers(pair: tuple[Channel, Channel]) -> None:
    before = descriptors()
    twice = np.arange(5)
    state = {
        "a": np.arange(10.0),
        "b": [twice, twice],
        "c": "text",
        "d": np.arange(20).reshape(4, 5)[:, 1],
        "e": Own(b"12345"),
    }
    shared = share(state)
    assert descriptors() == before + 1
    assert shared["b"][0] is shared["b"][1]
    with bare_pair("seqpacket") as (channel, bare):
        channel.send(shared)
        pieces = capture(bare)
        assert sum(len(fds) for _, fds in pieces) == 1
        close_pieces(pieces)
    received = sent(pair, shared)
    assert received["c"] == "text"
    assert received["d"].tolist() == [1, 6, 11, 16]
    for key in ("a", "d"):
        received[key][1] = 99
        assert shared[key][1] == 99
        assert state[key][1] != 99  # type: ignore[index]
    assert bytes(received["e"].memory) == b"12345"


@pytest.mark.parametrize(
    ("obj", "reason"),
    [
        ([1, 2, 3], "list lends"),
        (b"bytes", "SharedMemory.from_buffer"),
        (None, "NoneType lends"),
        (np.array([1, None]), "Python objects"),
        (np.zeros(3, [("a", "O")]), "Python objects"),
        (lambda: 1, "function"),
        ([np.arange(3), lambda: 1], "list"),
        (memoryview(b"abc"), "memoryview"),
    ],
    ids=["list", "bytes", "none", "objects", "fields", "function", "with_function", "view"],
)
def test_what_cannot_be_shared(obj: Any, reason: str) -> None:
    before = descriptors()
    with pytest.raises(TypeError, match=reason):
        share(obj)
    assert descriptors() == before


def test_descriptors_are_not_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("content")
    with open(path) as file:
        for obj in (file, [np.arange(3), file]):
            with pytest.raises(TypeError, match="no memory"):
                share(obj)
        with pytest.raises(TypeError, match="in a message"):
            share(fdshare.move([np.arange(3), file]))
        assert file.read() == "content"


def _without_space() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
    array = np.ones(MIB)
    before = descriptors()
    for make in (lambda: share(array), lambda: share([array, array.copy()]), lambda: shared_array(MIB)):
        with pytest.raises(NoSpaceError) as caught:
            make()
        del caught
    assert descriptors() == before


def test_no_space_to_share() -> None:
    checked_child(_without_space, method="fork")


# pandas and Arrow


def lies_in_shared_memory(buffer: Any) -> bool:
    view = memoryview(buffer)
    return find(address_of(view), view.nbytes) is not None


def _double(table: Any) -> Any:
    for name in ("whole", "float"):
        column = table[name].array._ndarray
        column.flags.writeable = True
        column *= 2
    return table


def test_pandas_by_reference(pair: tuple[Channel, Channel]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "whole": np.arange(1000),
            "more": np.arange(1000) + 5,
            "float": np.linspace(0, 1, 1000),
            "text": [f"line {i}" for i in range(1000)],
            "when": pandas.date_range("2020-01-01", periods=1000, tz="UTC"),
            "kind": pandas.Categorical(["a", "b"] * 500),
            "objects": [{}] * 1000,
        },
        index=pandas.Index(np.arange(1000) * 3, name="key"),
    )
    before = descriptors()
    shared = share(frame)
    assert descriptors() == before + 1
    pandas.testing.assert_frame_equal(shared, frame)
    received = sent(pair, shared)
    pandas.testing.assert_frame_equal(received, frame)
    for name in ("whole", "float"):
        assert same_place(received[name].array._ndarray, shared[name].array._ndarray)
        assert lies_in_shared_memory(shared[name].array._ndarray)
    assert descriptors() == before + 1
    series = share(frame["float"])
    pandas.testing.assert_series_equal(sent(pair, series), frame["float"])
    assert lies_in_shared_memory(sent(pair, series).array._ndarray)


def test_pandas_in_a_pool() -> None:
    pandas = pytest.importorskip("pandas")
    frame = share(pandas.DataFrame({"whole": np.arange(1000), "float": np.ones(1000)}))
    with fdshare.ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        pandas.testing.assert_frame_equal(pool.submit(_double, frame).result(30), frame)
    assert frame["whole"].tolist() == [2 * i for i in range(1000)]


def test_arrow_by_reference(pair: tuple[Channel, Channel]) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(
        {
            "whole": np.arange(1000),
            "text": [f"line {i}" for i in range(1000)],
            "gaps": arrow.array([None, 1, 2, None] * 250),
            "lists": [[i] * (i % 3) for i in range(1000)],
        }
    )
    before = descriptors()
    shared = share(table)
    assert descriptors() == before + 1
    assert shared.equals(table)
    received = sent(pair, {"table": shared, "slice": shared.slice(10, 20), "column": shared["text"]})
    assert received["table"].equals(table)
    assert received["slice"].equals(table.slice(10, 20))
    assert received["column"].equals(table["text"])
    assert descriptors() == before + 1
    ours, theirs = ([c.chunk(0).buffers()[-1] for c in t.columns] for t in (shared, received["table"]))
    for one, other in zip(ours, theirs, strict=True):
        assert one is None or (one.address, one.size) == (other.address, other.size)
    assert all(lies_in_shared_memory(buffer) for buffer in ours if buffer is not None and buffer.size)
    # NumPy's view of Arrow's memory is found by its address.
    column = shared["whole"].chunk(0).to_numpy(zero_copy_only=True)
    assert same_place(sent(pair, column), column)


@requires_seqpacket
def test_arrow_message_is_small() -> None:
    arrow = pytest.importorskip("pyarrow")
    shared = share(arrow.table({"a": np.arange(MIB), "b": np.arange(MIB)}))
    with bare_pair("seqpacket") as (channel, bare):
        channel.send(shared)
        pieces = capture(bare)
        assert sum(len(fds) for _, fds in pieces) == 1
        assert sum(len(data) for data, _ in pieces) < 4096
        close_pieces(pieces)


def test_forked_child_writes_into_it() -> None:
    array = shared_array(10)
    pid = os.fork()
    if not pid:
        array[:] = 3
        os._exit(0)
    os.waitpid(pid, 0)
    assert (array == 3).all()


def test_failing_message_with_an_array(pair: tuple[Channel, Channel]) -> None:
    array = shared_array(10)
    a, b = pair
    a.send([array, Call(int, "no number"), array[1:]])
    with pytest.raises(DecodeError):
        b.recv()
    assert sent(pair, array).tolist() == [0] * 10


# properties

DIMENSIONS = st.integers(-2, 6) | st.sampled_from([1 << 31, 1 << 32, 1 << 33, 1 << 62, 1 << 63, -(1 << 62)])


@settings(max_examples=400)
@given(
    shape=st.lists(DIMENSIONS, max_size=4),
    strides=st.none() | st.lists(st.integers(-20, 20) | DIMENSIONS, max_size=4),
    offset=st.integers(-5, 40) | st.sampled_from([1 << 62, 1 << 63, 1 << 64]),
    dtype=st.sampled_from(["u1", "i2", "f8", "S0", "S3", "V1", "c16"]),
)
def test_no_array_of_a_message_reaches_outside(shape: Any, strides: Any, offset: int, dtype: str) -> None:
    size = 32
    memory = allocate(size)
    try:
        array = rebuild_array(
            memory, dtype, tuple(shape), None if strides is None else tuple(strides), offset, True
        )
    except (DecodeError, ValueError, TypeError, OverflowError, MemoryError):
        return
    if array.size and array.itemsize:
        low, high = np.lib.array_utils.byte_bounds(array)
        assert memory.start <= low <= high <= memory.start + size


@st.composite
def views(draw: Any) -> Any:
    """A view of a shared array, by a chain of operations."""
    array = shared_array(
        (6, 4, 5), draw(st.sampled_from(["u1", "f8", ">i4", "c8"])), draw(st.sampled_from("CF"))
    )
    array.view(np.ndarray).flat[:] = np.arange(120)
    for _ in range(draw(st.integers(0, 4))):
        step = draw(st.sampled_from(["slice", "transpose", "index", "new", "flip", "diagonal"]))
        if step == "slice" and array.ndim:
            array = array[
                tuple(
                    slice(draw(st.integers(0, 3)), draw(st.integers(3, 7)), draw(st.sampled_from([1, 2, 3])))
                    for _ in range(array.ndim)
                )
            ]
        elif step == "transpose":
            array = array.T
        elif step == "index" and array.ndim and array.shape[0]:
            array = array[0]
        elif step == "new":
            array = array[..., None]
        elif step == "flip" and array.ndim:
            array = array[::-1]
        elif step == "diagonal" and array.ndim >= 2:
            array = np.diagonal(array)
    return np.asarray(array)


@settings(max_examples=150)
@given(array=views())
def test_any_view_arrives_as_the_same_view(array: Any) -> None:
    a, b = fdshare.Pipe()
    with a, b:
        a.send(array)
        received = b.recv()
    assert (received.shape, received.dtype) == (array.shape, array.dtype)
    assert received.tolist() == array.tolist()
    if array.size and array.ndim:
        assert same_place(received, array)
        for size, ours, theirs in zip(array.shape, array.strides, received.strides, strict=True):
            assert size == 1 or ours == theirs
