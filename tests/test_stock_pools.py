"""Stock pools carry descriptors once ``install()`` was called: every pool, start method and kind of object, both ways.

The default run has a reduced matrix; the mark ``soak`` has the whole one.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import copy
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers import METHODS, wait_until
from stock_objects import KINDS, descriptors, make, offset_of, read, read_all, swap

from fdshare import broker
from fdshare.integrations.multiprocessing import install, uninstall

TIMEOUT = 30.0
ROUNDS = 20

# What a pool's user drops unclosed is the user's: the task's argument in a worker, the scheduler's copy in Dask.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

# --- the pools --------------------------------------------------------------------------------------------------------

Call = Callable[..., Any]


@contextlib.contextmanager
def multiprocessing_pool(method: str) -> Iterator[Call]:
    with multiprocessing.get_context(method).Pool(1) as pool:
        yield lambda function, *args: pool.apply_async(function, args).get(TIMEOUT)
        pool.close()
        pool.join()


@contextlib.contextmanager
def futures_pool(method: str) -> Iterator[Call]:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(TIMEOUT)


@contextlib.contextmanager
def loky_pool(method: str) -> Iterator[Call]:
    loky = pytest.importorskip("loky", reason="loky is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it advises against fork
        context = loky.backend.get_context(method)
    with loky.ProcessPoolExecutor(1, context=context, timeout=None) as pool:
        yield lambda function, *args: pool.submit(function, *args).result(TIMEOUT)


@contextlib.contextmanager
def joblib_pool(method: str) -> Iterator[Call]:
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    external = pytest.importorskip("joblib.externals.loky", reason="joblib is not installed")
    with joblib.Parallel(n_jobs=2, backend=method, timeout=TIMEOUT) as parallel:
        yield lambda function, *args: parallel([joblib.delayed(function)(*args)])[0]
    if method == "loky":
        external.get_reusable_executor().shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def dask_pool(method: str) -> Iterator[Call]:
    distributed = pytest.importorskip("distributed", reason="distributed is not installed")
    dask = pytest.importorskip("dask", reason="dask is not installed")
    with (
        dask.config.set({"distributed.worker.multiprocessing-method": method}),
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, dashboard_address=":0", memory_limit=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield lambda function, *args: client.submit(function, *args).result(TIMEOUT)


POOLS: dict[str, Callable[[str], contextlib.AbstractContextManager[Call]]] = {
    "multiprocessing": multiprocessing_pool,
    "futures": futures_pool,
    "loky": loky_pool,
    "joblib": joblib_pool,
    "dask": dask_pool,
}

FULL = [
    *(f"{pool}-{method}" for pool in ("multiprocessing", "futures") for method in METHODS),
    *(f"loky-{method}" for method in ("loky", "loky_init_main", "spawn", "forkserver", "fork")),
    "joblib-loky",
    "joblib-multiprocessing",
    *(f"dask-{method}" for method in METHODS),
]
SHORT = [
    "multiprocessing-fork",
    "multiprocessing-spawn",
    "futures-forkserver",
    "futures-spawn",
    "loky-loky",
    "joblib-loky",
    "dask-spawn",
]


@pytest.fixture(scope="module", autouse=True)
def installation() -> Iterator[None]:
    install()
    yield
    uninstall()


@pytest.fixture(
    scope="module", params=[p if p in SHORT else pytest.param(p, marks=pytest.mark.soak) for p in FULL]
)
def call(request: pytest.FixtureRequest, installation: None) -> Iterator[Call]:
    """Call a function in a worker of a pool."""
    name, method = request.param.split("-")
    with POOLS[name](method) as call:
        call(descriptors)
        yield call


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> None:
    """As everywhere, except with Dask, whose own connections come and go; there the rounds below tell."""
    if "dask" not in request.node.name:
        request.getfixturevalue("fdshare_no_leaks")


@pytest.mark.parametrize("kind", KINDS)
def test_argument(call: Call, kind: str) -> None:
    obj = make(kind, 7)
    with obj:
        assert call(read, obj) == 7
        assert obj.fileno() > 0  # this process's own


@pytest.mark.parametrize("kind", KINDS)
def test_result_of_a_worker_that_nobody_initialised(call: Call, kind: str) -> None:
    assert read(call(make, kind, 7)) == 7


def test_rounds_leave_nothing_in_parent_and_worker(call: Call, request: pytest.FixtureRequest) -> None:
    def round_of_all() -> None:
        for kind in KINDS:
            with make(kind, 7) as obj:
                assert read(call(swap, obj, kind)) == 8

    def count() -> dict[int, int]:
        return dict(sorted([descriptors(), *(call(descriptors) for _ in range(4))]))

    for _ in range(3):
        round_of_all()
    wait_until(lambda: not broker.current().address)
    before = count()
    for _ in range(ROUNDS):
        round_of_all()
    # Every deposit was fetched, also where a pickler had to try again.
    wait_until(lambda: len(broker.current()) == 0)
    slack = 4 if "dask" in request.node.name else 0  # its own connections; far fewer than rounds
    wait_until(lambda: all(n <= before.get(pid, n) + slack for pid, n in count().items()))


def test_text_file_is_the_file_and_no_copy(call: Call) -> None:
    with make("text", 7) as file:
        assert call(read, file) == 7
        assert offset_of(file) == 2


def test_many_in_one_argument(call: Call) -> None:
    objects = [make(kind, number) for kind in KINDS for number in range(4)]
    try:
        assert call(read_all, objects) == [0, 1, 2, 3] * len(KINDS)
    finally:
        for obj in objects:
            obj.close()


def make_all(count: int) -> list[Any]:
    return [make(kind, number) for kind in KINDS for number in range(count)]


def test_many_in_one_result(call: Call) -> None:
    assert read_all(call(make_all, 4)) == [0, 1, 2, 3] * len(KINDS)


def test_what_has_no_descriptor_is_untouched(call: Call) -> None:
    value = {"a": [1, 2.5, "x", None], "b": ({3}, b"bytes", range(4))}
    assert call(copy.deepcopy, value) == value


def fail() -> None:
    raise ValueError("on purpose")


def test_failed_pickle_leaves_a_deposit_for_its_lease_alone(
    call: Call, request: pytest.FixtureRequest
) -> None:
    if "joblib" in request.node.name:
        return  # it replaces its workers after any error
    with make("text", 7) as file:
        with pytest.raises(Exception, match=r"pickle|serialize"):
            call(read_all, [file, sys._getframe()])
        with pytest.raises(ValueError, match="on purpose"):
            call(fail)
        assert len(broker.current()) <= 1
        broker.shutdown()
        assert call(read, file) == 7


def test_function_made_here_carries_what_it_refers_to(call: Call, request: pytest.FixtureRequest) -> None:
    """A closure, for the picklers that take functions by value."""
    if request.node.name.partition("[")[2].startswith(
        ("multiprocessing", "futures", "joblib-multiprocessing")
    ):
        return
    with make("text", 7) as file, make("socket", 8) as sock:
        assert call(lambda: (int(file.read()), int(sock.recv(10)))) == (7, 8)
        assert offset_of(file) == 2
