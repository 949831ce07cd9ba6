"""Every program of ``examples/`` as a real process: exit status, and what it prints, in substance."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fdshare import FdHandle, send_fds

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
TIMEOUT = 40.0


def environment() -> dict[str, str]:
    """The examples import fdshare from this checkout, installed or not."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"}


def run(name: str, *args: object, status: int = 0) -> tuple[str, str]:
    """Run an example and return its stdout and stderr."""
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, args)],
        capture_output=True,
        env=environment(),
        timeout=TIMEOUT,
        text=True,
        check=False,
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stdout, result.stderr


def start(name: str, *args: object) -> subprocess.Popen[str]:
    """Start an example whose output is read while it runs."""
    return subprocess.Popen(
        [sys.executable, "-u", str(EXAMPLES / name), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )


def line_with(stream: object, word: str) -> str:
    """Read lines from a running example until one holds ``word``."""
    for line in stream:  # type: ignore[attr-defined]
        if word in line:
            return str(line)
    pytest.fail(f"the example ended without a word of {word!r}")


@pytest.fixture
def socket_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fds") as directory:
        yield Path(directory) / "s"


@pytest.fixture
def two_files(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("first line\nsecond line\n")
    second.write_text("x" * 100_000 + "\n")
    return first, second


# cat_child -------------------------------------------------------------------------------------------------


def test_cat_child_prints_what_its_child_opened(two_files: tuple[Path, Path]) -> None:
    first, second = two_files
    out, err = run("cat_child.py", first, second)
    assert out == first.read_text() + second.read_text()
    accounts = re.findall(
        r"opened by process (\d+), read by process (\d+) as descriptor (\d+), ([\d,]+) bytes", err
    )
    assert [account[3] for account in accounts] == ["23", "100,001"]
    assert all(child != parent for child, parent, _, _ in accounts)


def test_cat_child_goes_on_after_a_missing_file(two_files: tuple[Path, Path]) -> None:
    first, _ = two_files
    out, err = run("cat_child.py", "/nowhere/at/all", first, status=1)
    assert out == first.read_text()
    assert "/nowhere/at/all: No such file or directory" in err


# fd_sender, fd_receiver ------------------------------------------------------------------------------------


def test_sender_and_receiver_are_unrelated_processes(two_files: tuple[Path, Path], socket_path: Path) -> None:
    with start("fd_receiver.py", socket_path) as receiver:
        try:
            assert str(socket_path) in line_with(receiver.stderr, "listens")
            out, _ = run("fd_sender.py", socket_path, two_files[1])
            assert "sent its descriptor" in out
            printed, account = receiver.communicate(timeout=TIMEOUT)
        finally:
            receiver.kill()
    assert receiver.returncode == 0, account
    assert printed == two_files[1].read_text()
    assert "second came as descriptor" in account
    assert "100,001 bytes" in account
    assert not socket_path.exists()


def test_sender_without_a_receiver(two_files: tuple[Path, Path], socket_path: Path) -> None:
    _, err = run("fd_sender.py", socket_path, two_files[0], status=1)
    assert "No such file" in err


@pytest.mark.parametrize("count", [0, 2])
def test_receiver_wants_exactly_one_descriptor(socket_path: Path, count: int) -> None:
    with start("fd_receiver.py", socket_path) as receiver:
        try:
            line_with(receiver.stderr, "listens")
            with socket.socket(socket.AF_UNIX) as sock, FdHandle.dup(sock) as handle:
                sock.connect(str(socket_path))
                for _ in range(count):
                    send_fds(sock, [b"a part, "], [handle])
                sock.sendall(b"and the end\n")
            printed, account = receiver.communicate(timeout=TIMEOUT)
        finally:
            receiver.kill()
    assert (receiver.returncode, printed) == (1, "")
    assert f"expected one descriptor, got {count}" in account


# shared_offset ---------------------------------------------------------------------------------------------


def test_shared_offset_goes_on_where_the_other_wrote() -> None:
    out, _ = run("shared_offset.py")
    turns = re.findall(r"turn \d: parent wrote (\d+) to (\d+), child wrote (\d+) to (\d+)", out)
    numbers = [int(number) for turn in turns for number in turn]
    assert len(turns) == 3
    assert numbers[0] == 0
    assert numbers[1:-1:2] == numbers[2::2]  # each begins where the one before it ended
    assert numbers == sorted(numbers)
    assert f"offset 0, while the shared one is {numbers[-1]}" in out
    assert "6 lines, none overwritten" in out


# many_descriptors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 253, 254, 1000])
def test_many_descriptors_arrive_in_one_message(count: int) -> None:
    out, _ = run("many_descriptors.py", "--count", count)
    assert f"sent {count:,} open files in one message" in out
    assert f"read {count:,} of them; the one with two names arrived as one object: True" in out


# prefork_server --------------------------------------------------------------------------------------------


def test_prefork_server_spreads_its_requests() -> None:
    out, _ = run("prefork_server.py", "--workers", 3, "--requests", 12)
    served = re.findall(r"worker (\d+) served (\d+) requests", out)
    assert [count for _, count in served] == ["4", "4", "4"]
    assert len({pid for pid, _ in served}) == 3


def test_prefork_server_serves_others_until_interrupted() -> None:
    with start("prefork_server.py", "--workers", 2, "--requests", 0) as server:
        try:
            url = line_with(server.stdout, "accepts on").split()[-1]
            answers = []
            for number in range(4):
                with urllib.request.urlopen(f"{url}/{number}", timeout=TIMEOUT) as answer:
                    answers.append(answer.read().decode().split())
            server.send_signal(2)
            out, err = server.communicate(timeout=TIMEOUT)
        finally:
            server.kill()
    assert server.returncode == 0, err
    assert [path for _, path in answers] == ["/0", "/1", "/2", "/3"]
    first, second = (pid for pid, _ in answers[:2])
    assert [pid for pid, _ in answers] == [first, second, first, second]
    assert sorted(re.findall(r"worker (\d+) served 2 requests", out)) == sorted([first, second])


def test_examples_are_all_listed_and_run() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text()))
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*examples.py"))
    assert names <= set(re.findall(r'"(\w+\.py)"', tests))
