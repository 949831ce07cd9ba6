"""The checks themselves are checked: each kind of leak is made on purpose and must be found, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import METHODS, QUICK_METHODS, requires_proc

import fdshare.testing as testing
from fdshare.handle import FdHandle
from fdshare.testing import (
    Child,
    ChildError,
    LeakCheck,
    LeakError,
    check_processes,
    checked_child,
    leak_check,
)

QUICK = 0.05  # seconds of grace where a leak is expected


def test_clean_block_passes() -> None:
    with leak_check(closed=True):
        a, b = socket.socketpair()
        a.close()
        b.close()
        thread = threading.Thread(target=str)
        thread.start()
        subprocess.run([sys.executable, "-c", ""], check=True)


def test_leaked_descriptor_is_named() -> None:
    with pytest.raises(LeakError) as caught, leak_check(grace=QUICK):
        reader, writer = os.pipe()
    text = str(caught.value)
    assert len(caught.value.leaks) == 2
    assert f"descriptor {reader} (pipe): pipe:[" in text
    assert f"descriptor {writer} (pipe): pipe:[" in text
    os.close(reader)
    os.close(writer)


def test_replaced_descriptor_is_found(tmp_path: Path) -> None:
    """The number was in use before, for something else: as many descriptors as before, and yet a leak."""
    reader, writer = os.pipe()
    (tmp_path / "other").touch()
    with pytest.raises(LeakError, match=f"descriptor {reader} .*other"), leak_check(grace=QUICK):
        other = os.open(tmp_path / "other", os.O_RDONLY)
        os.dup2(other, reader)
        os.close(other)
    os.close(reader)
    os.close(writer)


LIBFFI = """
import os, sys
from fdshare.leaks import LeakError, leak_check

def open_code(flags=os.O_RDONLY):
    # As libffi does where it is part of the program.
    return os.open(os.path.realpath("/proc/self/exe"), flags | os.O_CLOEXEC)

def leaks_of(action, *arguments):
    try:
        with leak_check(grace=0.05, closed=True):
            action(*arguments)
    except LeakError as error:
        return len(error.leaks)
    return 0

assert "_ctypes" not in sys.modules
assert leaks_of(lambda: (open_code(), open_code())) == 1
assert leaks_of(open_code) == 1
assert leaks_of(os.open, "/dev/null", os.O_RDONLY) == 1
assert leaks_of(os.closerange, 3, 10) > 0

import ctypes
assert leaks_of(lambda: (ctypes.CDLL(None).getpid(), ctypes.CFUNCTYPE(None)(print))) == 0
"""


@requires_proc
def test_descriptor_that_libffi_keeps_is_no_leak() -> None:
    """One read-only descriptor of a file whose code runs here; a second one is a leak, and so is to close the first."""
    subprocess.run([sys.executable, "-c", LIBFFI], check=True, timeout=30)


def test_descriptor_closed_for_somebody_else_is_found() -> None:
    reader, writer = os.pipe()
    with (
        pytest.raises(LeakError, match=f"descriptor {reader} was closed: pipe:"),
        leak_check(grace=QUICK, closed=True),
    ):
        os.close(reader)
    with leak_check(grace=QUICK):
        os.close(writer)


def test_leaked_thread_is_named() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten", daemon=True)
    with pytest.raises(LeakError, match="thread 'forgotten'"), leak_check(grace=QUICK):
        thread.start()
    stop.set()
    thread.join()


def test_running_child_is_named() -> None:
    with pytest.raises(LeakError) as caught, leak_check(grace=QUICK):
        process = subprocess.Popen(
            [sys.executable, "-c", "input('waiting')"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    assert f"child process {process.pid}: " in str(caught.value)
    assert "waiting" in str(caught.value)
    process.communicate(b"\n")


def test_zombie_is_found() -> None:
    """Ended, but nobody has waited for it."""
    with pytest.raises(LeakError, match="nobody has waited"), leak_check(grace=QUICK):
        process = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.wait()


@pytest.mark.parametrize("method", METHODS)
def test_running_multiprocessing_child_is_found(method: str) -> None:
    """A forkserver's children are not this process's children by the kernel, and are found too."""
    context = multiprocessing.get_context(method)
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_wait_for_end, args=(reader,))  # type: ignore[attr-defined]
    with pytest.raises(LeakError) as caught, leak_check(grace=QUICK), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    assert f"child process {process.pid}" in str(caught.value)
    writer.send(None)
    process.join()
    process.close()
    reader.close()
    writer.close()


def _wait_for_end(reader: object) -> None:
    reader.recv()  # type: ignore[attr-defined]


def test_straggler_has_until_the_deadline() -> None:
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    check = LeakCheck(grace=30.0)
    thread.start()
    threading.Timer(0.05, go.set).start()
    check.verify()


def test_garbage_in_a_cycle_is_no_leak() -> None:
    with leak_check():
        a, b = socket.socketpair()
        a.close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            holder = {"socket": b}
            holder["self"] = holder  # type: ignore[assignment]
            del holder, b
            # still in the block: the collection is the check's own, and would warn
            import gc

            gc.collect()


def test_exception_wins_over_the_check() -> None:
    with pytest.raises(KeyError), leak_check(grace=QUICK):
        handle = FdHandle.dup(0)
        raise KeyError
    handle.close()


# children


def _returns(value: object) -> object:
    return value


def _raises() -> None:
    raise ZeroDivisionError("on purpose")


def _leaks_descriptor() -> None:
    os.dup(0)


def _closes_stdin() -> None:
    os.close(0)


def _leaks_thread() -> None:
    threading.Thread(target=threading.Event().wait, name="forgotten", daemon=True).start()


def _leaks_child() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)


def _drops_handle() -> None:
    FdHandle.dup(0)


def _dies() -> None:
    os._exit(7)


def _blocks() -> None:
    threading.Event().wait()


def _skips() -> None:
    pytest.skip("not here")


@pytest.mark.parametrize("method", METHODS)
def test_child_returns_a_value(method: str) -> None:
    assert checked_child(_returns, {"a": 1}, method=method) == {"a": 1}


@pytest.mark.parametrize("method", QUICK_METHODS)
@pytest.mark.parametrize(
    ("target", "what"),
    [
        (_leaks_descriptor, r"child \d+ leaked:\s+descriptor \d+ \("),
        (_closes_stdin, "descriptor 0 was closed"),
        (_leaks_thread, "thread 'forgotten'"),
        (_leaks_child, "child process"),
        (_drops_handle, "ResourceWarning.*unclosed <FdHandle"),
    ],
)
def test_child_leak_is_reported_to_the_parent(method: str, target: Callable[[], None], what: str) -> None:
    with pytest.raises(LeakError, match=what):
        checked_child(target, method=method, grace=QUICK)


@pytest.mark.parametrize("method", METHODS)
def test_child_error_has_the_traceback(method: str) -> None:
    with pytest.raises(ChildError, match="ZeroDivisionError: on purpose"):
        checked_child(_raises, method=method)


def test_child_death_is_told() -> None:
    with pytest.raises(ChildError, match="exit code 7"):
        checked_child(_dies)


def test_child_that_does_not_end_is_killed() -> None:
    with pytest.raises(ChildError, match="did not end within"):
        checked_child(_blocks, method="fork", timeout=0.2)


def test_child_as_context_manager_kills() -> None:
    with Child(_blocks, method="fork") as child:
        os.kill(child.pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_child_can_skip() -> None:
    with pytest.raises(pytest.skip.Exception, match="not here"):
        checked_child(_skips)


@pytest.mark.parametrize("method", METHODS)
def test_ordinary_process_is_checked(method: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context(method)
    with check_processes(str(tmp_path / "leaks"), grace=QUICK) as reports, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for target, expected in ((_leaks_descriptor, 1), (str, 0)):
            process = context.Process(target=target)  # type: ignore[attr-defined]
            process.start()
            process.join()
            assert process.exitcode == expected
            found = reports()
            assert len(found) == expected
            if expected:
                assert f"in process {process.pid}: descriptor" in found[0]
            process.close()
    assert reports() == []


# the fixture, in a pytest of its own

_TESTS = """
import os, threading, subprocess, sys, multiprocessing
import pytest
from fdshare import leaks
from fdshare.testing import fdshare_no_leaks

leaks.GRACE = 0.05

pytestmark = pytest.mark.usefixtures("fdshare_no_leaks")
kept = []
kept_fd = os.dup(0)

def test_double_close(): os.close(kept_fd)
def test_clean(): os.close(os.dup(0))
def test_descriptor(): os.dup(0)
def test_thread(): threading.Thread(target=threading.Event().wait, daemon=True).start()
def test_child(): kept.append(subprocess.Popen(["sleep", "60"]))
def test_process():
    process = multiprocessing.get_context("fork").Process(target=os.dup, args=(0,))
    process.start(); process.join(); process.close()
def test_failed_is_not_blamed(): os.dup(0); assert False
def test_clean_at_last(): kept[0].kill(); kept[0].wait()
"""


def test_fixture_blames_the_test_that_leaks(tmp_path: Path) -> None:
    (tmp_path / "test_inner.py").write_text(_TESTS)
    root = Path(testing.__file__).parent.parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "--rootdir",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    run = subprocess.run(
        [*command, "-rA", "test_inner.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
    )
    outcomes = re.findall(r"^(ERROR|FAILED) test_inner\.py::(\w+)", run.stdout, re.MULTILINE)
    errors = [name for word, name in outcomes if word == "ERROR"]
    assert errors == ["test_double_close", "test_descriptor", "test_thread", "test_child", "test_process"], (
        run.stdout
    )
    assert [name for word, name in outcomes if word == "FAILED"] == ["test_failed_is_not_blamed"], run.stdout
