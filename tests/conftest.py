"""What every test gets: a leak check around it and around the processes it starts, and reproducible hypothesis runs."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import pytest
from helpers import TRANSPORTS, requires_seqpacket
from hypothesis import given, settings
from hypothesis import strategies as st

import fdshare
from fdshare import Channel, memory, recycle, system
from fdshare.testing import fdshare_no_leaks

__all__ = ["fdshare_no_leaks"]  # a fixture is found by its name in a conftest

# No example database: a checkout stays clean, and a run does not depend on the one before.
settings.register_profile("fdshare", deadline=None, database=None, derandomize=True)
settings.load_profile("fdshare")

# NumPy's threads would spin beside the tests, in each process that imports it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Children of a forkserver find pytest and fdshare imported, 0.1 s of each otherwise; those that are spawned import them.
multiprocessing.set_forkserver_preload(["fdshare.testing"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors, as many tests wait for processes; not 64 of them, as tests start their own."""
    return min(4, len(os.sched_getaffinity(0)) + 1) if hasattr(os, "sched_getaffinity") else 4


def pytest_collection_finish() -> None:
    """What was loaded to find the tests is not looked at by the collector again, which took a fifth of the time of them all."""
    _prepare_hypothesis()
    gc.collect()
    gc.freeze()


@given(st.none())
def _prepare_hypothesis(nothing: None) -> None:
    """Have it make its generator of random numbers: it asks the collector who refers to that, which overlooks what is frozen."""


@pytest.fixture(autouse=True)
def no_leaks(fdshare_no_leaks: None) -> None:
    """Check descriptors, threads and children after every test, in the test's child processes too."""


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    name: str = request.param
    return name


@pytest.fixture
def pair(transport: str) -> Iterator[tuple[Channel, Channel]]:
    """The two ends of a pipe over each transport; closed afterwards."""
    a, b = fdshare.Pipe(transport=transport)
    with a, b:
        yield a, b


SEGMENTS = ("pipe", "memfd", "lease", "file")


@pytest.fixture(params=SEGMENTS)
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where segments live: pipes where they are small enough, or never those, new or used again; or files without either."""
    name: str = request.param
    if name != "file" and not (system.HAVE_MEMFD and memory.HAVE_PIPE_SIZE):
        pytest.skip("needs memory files, and pipes that can be made large")
    monkeypatch.setattr(memory, "HAVE_PIPE_SIZE", name == "pipe")
    monkeypatch.setattr(memory, "HAVE_MEMFD", name != "file")
    monkeypatch.setattr(recycle, "ENABLED", name == "lease")
    monkeypatch.setattr(recycle, "STEADY_SECONDS", 1e9)  # each message is of a flow
    return name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All segments over packets, two kinds over frames: neither knows of the other.  Cases over packets need these."""
    if system.HAVE_SEQPACKET:
        items[:] = [item for item in items if not _is_needless(getattr(item, "callspec", None))]
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and "seqpacket" in map(str, callspec.params.values()):
            item.add_marker(requires_seqpacket)


def _is_needless(callspec: Any) -> bool:
    params = callspec.params if callspec is not None else {}
    return params.get("transport") == "stream" and params.get("segments") in ("lease", "file")


@pytest.fixture
def only_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "HAVE_PIPE_SIZE", False)
    monkeypatch.setattr(memory, "HAVE_MEMFD", False)
