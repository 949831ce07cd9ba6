"""``install()`` and ``uninstall()``: what they change and put back, how workers get it, and Process and Queue by themselves."""

from __future__ import annotations

import concurrent.futures
import copy
import copyreg
import multiprocessing
import os
import pickle
import select
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import queues, reduction
from pathlib import Path
from queue import Full
from typing import Any

import pytest
from helpers import METHODS
from stock_objects import KINDS, make, read, swap

import fdshare
from fdshare import broker
from fdshare.integrations.multiprocessing import install, installed, uninstall

TIMEOUT = 30.0


@pytest.fixture(scope="module", autouse=True)
def installation() -> Iterator[None]:
    install()
    yield
    uninstall()


def answer(queue: Any, objects: list[Any], kinds: list[str]) -> None:
    for obj, kind in zip(objects, kinds, strict=True):
        with make(kind, read(obj) + 1) as result:
            queue.put(result)
    if hasattr(queue, "join_thread"):
        queue.close()
        queue.join_thread()


@pytest.mark.parametrize("queue_type", ["Queue", "JoinableQueue"])
def test_what_was_put_may_be_closed_at_once(queue_type: str) -> None:
    queue = getattr(multiprocessing.get_context("spawn"), queue_type)(8)
    for kind in KINDS:
        with make(kind, 7) as obj:
            queue.put({"in": [(obj, 1)]})
        assert read(queue.get(timeout=TIMEOUT)["in"][0][0]) == 7
    queue.put([1, 2.5, None])
    assert queue.get(timeout=TIMEOUT) == [1, 2.5, None]
    with make("text", 7) as closed:
        pass
    with pytest.raises(fdshare.NotSendableError, match="closed"):
        queue.put(closed)
    queue.close()
    queue.join_thread()


def test_full_queue_keeps_no_deposit() -> None:
    queue: Any = multiprocessing.get_context("spawn").Queue(1)
    queue.put(1)
    with make("text", 7) as file, pytest.raises(Full):
        queue.put(file, timeout=0.01)
    assert len(broker.current()) == 0
    assert queue.get(timeout=TIMEOUT) == 1
    queue.close()
    queue.join_thread()


@pytest.mark.parametrize("queue_type", ["Queue", "SimpleQueue", "JoinableQueue"])
@pytest.mark.parametrize("method", METHODS)
def test_process_with_objects_as_arguments_and_a_queue(method: str, queue_type: str) -> None:
    context = multiprocessing.get_context(method)
    queue = getattr(context, queue_type)()
    objects = [make(kind, 7) for kind in KINDS]
    child = context.Process(target=answer, args=(queue, objects, list(KINDS)))  # type: ignore[attr-defined]
    child.start()
    for obj in objects:
        obj.close()
    assert [read(queue.get()) for _ in KINDS] == [8] * len(KINDS)
    child.join(TIMEOUT)
    assert child.exitcode == 0
    child.close()
    queue.close()


@pytest.mark.parametrize("kind", KINDS)
def test_plain_connection(kind: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs, make(kind, 7) as obj:
        ours.send([obj])
        assert read(theirs.recv()[0]) == 7


@pytest.mark.parametrize("method", METHODS)
def test_worker_that_ends_after_its_task_leaves_its_result(method: str) -> None:
    with multiprocessing.get_context(method).Pool(1, maxtasksperchild=1) as pool:
        for kind in KINDS[:2]:
            assert read(pool.apply_async(make, (kind, 7)).get(TIMEOUT)) == 7
        pool.close()
        pool.join()


def in_grandchild(method: str) -> int:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        return read(pool.submit(make, "text", 7).result(TIMEOUT))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_a_worker(method: str) -> None:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        assert pool.submit(in_grandchild, method).result(TIMEOUT) == 7


def state() -> tuple[bool, float]:
    return installed(), broker.get_lease()


@pytest.mark.parametrize("method", METHODS)
def test_lease_reaches_the_workers(method: str) -> None:
    install(lease=123.0)
    try:
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            assert pool.submit(state).result(TIMEOUT) == (True, 123.0)
    finally:
        install(lease=broker.DEFAULT_LEASE)


def test_argument_installs_where_the_pool_is_older_than_the_installation() -> None:
    uninstall()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply_async(state).get(TIMEOUT)[0] is False
        install()
        with make("text", 7) as file:
            assert read(pool.apply_async(swap, (file, "text")).get(TIMEOUT)) == 8
        pool.close()
        pool.join()


# --- install and uninstall ------------------------------------------------------------------------------------------------


def tables() -> list[Any]:
    """Everything that install() may change."""
    import cloudpickle.cloudpickle as cloudpickle

    found = [copyreg.dispatch_table, reduction.ForkingPickler._extra_reducers]  # type: ignore[attr-defined]
    found += [cloudpickle.CloudPickler._dispatch_table, multiprocessing.current_process()._config]  # type: ignore[attr-defined]
    for name in ("loky.backend.reduction", "joblib.externals.loky.backend.reduction"):
        if name in sys.modules:
            found.append(sys.modules[name]._dispatch_table)
    found = [dict(table) for table in found]
    found.append([list(sys.meta_path), queues.Queue.put, queues.JoinableQueue.put])
    found.append(selectors.BaseSelector.__reduce_ex__)
    if "distributed.batched" in sys.modules:
        found.append(sys.modules["distributed.protocol.pickle"].dumps)
        found.append(sys.modules["distributed.batched"].BatchedSend.__init__)
        found.append(dict(sys.modules["dask.tokenize"].normalize_token._lookup))
    return found


@pytest.fixture
def uninstalled() -> Iterator[None]:
    uninstall()
    yield
    install()


@pytest.mark.usefixtures("uninstalled")
def test_uninstall_restores_what_was_there() -> None:
    before = tables()
    install()
    assert installed()
    assert tables() != before
    install()  # twice is once
    uninstall()
    assert tables() == before
    uninstall()
    assert not installed()
    with make("binary", 7) as file, pytest.raises(TypeError, match="pickle"):
        pickle.dumps(file)


@pytest.mark.usefixtures("uninstalled")
def test_uninstall_leaves_what_others_registered_since() -> None:
    install()
    copyreg.pickle(socket.socket, repr)
    uninstall()
    assert copyreg.dispatch_table.pop(socket.socket) is repr


@pytest.mark.usefixtures("uninstalled")
def test_pickle_of_an_uninstalled_process_is_no_installation() -> None:
    install()
    with make("text", 7) as file:
        data = pickle.dumps(file)
    uninstall()
    assert read(pickle.loads(data)) == 7
    assert not installed()


def test_copying_is_as_before() -> None:
    with make("text", 7) as file, make("socket", 7) as sock:
        for thing in (file, sock, file.buffer):
            for copier in (copy.copy, copy.deepcopy):
                with pytest.raises(TypeError, match="pickle"):
                    copier(thing)
    assert broker.current().address == ""


def test_closed_file_is_refused_when_pickled() -> None:
    file = make("text", 7)
    file.close()
    with pytest.raises(fdshare.NotSendableError, match="closed"):
        pickle.dumps(file)


class KnowsItself(selectors.SelectSelector):
    def __reduce__(self) -> Any:
        return KnowsItself, ()


def test_selectors_and_their_like_are_refused_with_a_hint() -> None:
    """With the descriptors in them they would travel, and their numbers would mean other files there."""
    with selectors.DefaultSelector() as selector, selectors.SelectSelector() as simple:
        with os.scandir("/") as entries:
            things = [selector, simple, select.poll(), next(entries), fdshare.ChannelSet()]
        for thing in things:
            for dumps in (pickle.dumps, reduction.ForkingPickler.dumps):
                with pytest.raises(fdshare.NotSendableError, match=r"(?m)there$|send entry\.path"):
                    dumps([thing])
        copy.copy(simple)
    queue: Any = multiprocessing.Queue()
    with pytest.raises(fdshare.NotSendableError, match="register them there"):
        queue.put([select.poll()])
    queue.close()
    assert isinstance(pickle.loads(pickle.dumps(KnowsItself())), KnowsItself)


class Wrapper:
    """A user's type."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> Wrapper:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self.fd)

    def fileno(self) -> int:
        return self.fd

    def read(self) -> bytes:
        return os.read(self.fd, 100)


def rebuild_wrapper(handle: fdshare.FdHandle) -> Wrapper:
    return Wrapper(handle.detach())


def test_registered_type_travels_too() -> None:
    fdshare.register(Wrapper, reduce=lambda w: (rebuild_wrapper, (fdshare.FdHandle.dup(w.fd),)))
    install()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        reader, writer = os.pipe()
        os.write(writer, b"7")
        os.close(writer)
        with Wrapper(reader) as wrapper:
            assert pool.apply_async(read, (wrapper,)).get(TIMEOUT) == 7
        pool.close()
        pool.join()


def run(code: str) -> str:
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_install_loads_no_neighbour_and_attends_to_it_later() -> None:
    pytest.importorskip("loky", reason="loky is not installed")
    code = """
import sys
from fdshare.integrations.multiprocessing import install, uninstall
install()
print([name for name in ("loky", "joblib", "dask", "distributed", "cloudpickle") if name in sys.modules])
import socket, io, loky.backend.reduction as reduction, cloudpickle
table = cloudpickle.CloudPickler._dispatch_table
ours = reduction._dispatch_table[socket.socket], table[io.TextIOWrapper]
uninstall()
theirs = reduction._dispatch_table[socket.socket], table[io.TextIOWrapper]
print(*[function.__module__.partition(".")[0] for function in (*ours, *theirs)])
"""
    assert run(code).splitlines() == ["[]", "fdshare fdshare loky cloudpickle"]


def test_process_ends_clean_with_pickles_that_nobody_loaded() -> None:
    code = """
import pickle, os
from fdshare import broker
from fdshare.integrations.multiprocessing import install
install()
with open(os.devnull) as file:
    pickle.dumps(file)
print(broker.current().address)
"""
    address = Path(run(code))
    assert address.name
    assert not address.exists()
