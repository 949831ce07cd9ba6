"""Files on their way: every ``open()`` mode with its attributes, identity, temporary files, pipes of processes, terminals."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from travel import TIMEOUT, pipe_files, refusal, same_description, trip

from fdshare import FdHandle, Pipe, move
from fdshare.rights import open_numbers
from fdshare.testing import checked_child, leak_check

MODES = [a + b + c for a, b, c in itertools.product("rwax", ("", "+"), ("", "b"))]
CONTENT = b"one\ntwo\r\nthree\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


# every mode ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["seqpacket", "stream"])
@pytest.mark.parametrize("moved", [False, True], ids=["sent", "moved"])
@pytest.mark.parametrize("buffering", [-1, 0, 1, 5000])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(path: Path, mode: str, buffering: int, moved: bool, transport: str) -> None:
    binary = "b" in mode
    if (buffering == 0 and not binary) or (buffering == 1 and binary):
        return  # open() has no such file
    if "x" in mode:
        path.unlink()
    with open(path, mode, buffering) as file:
        expected = (type(file), file.mode, file.name)
        able = [file.readable(), file.writable(), file.seekable(), file.isatty()]
        position = file.tell()
        with trip(move(file) if moved else file, transport) as received:
            assert (type(received), received.mode, received.name) == expected
            assert [received.readable(), received.writable(), received.seekable(), received.isatty()] == able
            assert received.tell() == position
            assert not os.get_inheritable(received.fileno())
            assert file.closed == moved
            if not moved:
                assert same_description(file, received)
            if received.readable():
                received.seek(0)
                # A mode that empties the file did so when it was opened, not when it arrived.
                expected_content = CONTENT if mode[0] in "ra" else b""
                assert received.read() == (
                    expected_content if binary else expected_content.decode().replace("\r\n", "\n")
                )
            if received.writable():
                size = path.stat().st_size
                received.write(b"X" if binary else "X")
                received.flush()
                assert path.read_bytes()[-1:] == b"X"
                assert path.stat().st_size == size + (mode[0] == "a" or received.tell() > size)


@pytest.mark.parametrize("mode", ["r", "r+", "w", "a+"])
@pytest.mark.parametrize(
    "options",
    [
        {"encoding": "utf-8"},
        {"encoding": "latin-1", "errors": "replace"},
        {"encoding": "ascii", "errors": "surrogateescape"},
        {"encoding": "utf-16", "errors": "ignore"},
        {"encoding": "shift_jis", "errors": "backslashreplace"},
        {"encoding": "utf-8", "buffering": 1},
        *({"encoding": "utf-8", "newline": newline} for newline in (None, "", "\n", "\r", "\r\n")),
    ],
    ids=str,
)
def test_text_keeps_its_attributes(path: Path, mode: str, options: dict[str, Any]) -> None:
    with open(path, mode, **options) as file, trip(file) as received:
        assert received.mode == file.mode == mode
        assert received.encoding == file.encoding == options["encoding"]
        assert received.errors == file.errors == options.get("errors", "strict")
        assert received.line_buffering == file.line_buffering == (options.get("buffering") == 1)
        assert received.write_through == file.write_through is False
        assert received.name == str(path)


@pytest.mark.parametrize(
    "options",
    [{"line_buffering": True}, {"write_through": True}, {"line_buffering": True, "write_through": True}],
)
def test_text_made_by_hand_keeps_how_it_writes(path: Path, options: dict[str, bool]) -> None:
    with io.TextIOWrapper(open(path, "wb"), "utf-8", **options) as file, trip(file) as received:
        assert received.line_buffering == file.line_buffering == options.get("line_buffering", False)
        assert received.write_through == file.write_through == options.get("write_through", False)
        assert not hasattr(received, "mode") or received.mode == "wb"
        received.write("a\nb")
        # What goes to the buffer at once is not yet in the file, except at the end of a line.
        assert path.read_bytes() == (b"a\nb" if "line_buffering" in options else b"")


@pytest.mark.parametrize("newline", [None, "", "\n", "\r", "\r\n"])
@pytest.mark.parametrize("lines_before", [0, 1, 2])
def test_newlines_are_read_and_written_as_before(path: Path, newline: str | None, lines_before: int) -> None:
    path.write_bytes(b"a\nb\r\nc\rd\n\re\r\n")
    with open(path, "r+", newline=newline) as file, open(path, "r+", newline=newline) as plain:
        for each in (file, plain):
            for _ in range(lines_before):
                each.readline()
        with trip(file) as received:
            assert list(received) == list(plain)
            received.write("x\ny")
            received.flush()
            plain.write("x\ny")
    assert path.read_bytes().endswith("x\ny".replace("\n", newline or "\n").encode())


@pytest.mark.parametrize("kind", [str, os.fsencode, int])
def test_name(path: Path, kind: Any) -> None:
    name = os.open(path, os.O_RDONLY) if kind is int else kind(str(path))
    with open(name, "rb") as file, trip(file) as received:
        # A number is that of the process: the sender's would be somebody else's there.
        assert received.name == (received.fileno() if kind is int else name)
        assert repr(received) == repr(file).replace(repr(file.name), repr(received.name))


def test_raw_file_of_a_path_object(path: Path) -> None:
    with io.FileIO(path) as file, trip(file) as received:
        assert received.name == file.name
        assert received.readall() == CONTENT


def test_borrowed_descriptor_becomes_an_owned_one(path: Path) -> None:
    """``closefd=False`` says who owns the number here; there it is the file's own."""
    with path.open("rb") as owner, open(owner.fileno(), "rb", closefd=False) as file:
        received = trip(file)
        with leak_check(closed=False):
            number = received.fileno()
            received.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)
        trip(move(file)).close()
        assert file.closed
        assert owner.read() == CONTENT


def test_standard_streams() -> None:
    code = (
        "import sys, fdshare\n"
        "here, there = fdshare.Pipe()\n"
        "print('first'); here.send([sys.stdin, sys.stdout, sys.stderr])\n"
        "stdin, out, err = there.recv()\n"
        "print(out.name, out.encoding == sys.stdout.encoding, stdin.read(), file=out)\n"
        "for file in (stdin, out, err, here, there): file.close()\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        input="asked",
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (run.stdout, run.stderr) == ("first\n<stdout> True asked\n", "")


# identity ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(["text", "buffer", "raw"])))
@pytest.mark.parametrize("kind", ["file", "pipe"])
@pytest.mark.parametrize("read_before", [False, True])
def test_layers_of_one_file_stay_layers_of_one_file(
    path: Path, order: tuple[str, ...], kind: str, read_before: bool
) -> None:
    """Whichever comes first in the message; and whatever was read ahead in whichever layer."""
    if kind == "file":
        text: Any = path.open()
    else:
        text, writer = pipe_files("r")
        writer.write(CONTENT)
        writer.close()
    if read_before:
        assert text.readline() == "one\n"
    layers = {"text": text, "buffer": text.buffer, "raw": text.buffer.raw}
    received = dict(zip(order, trip(move([layers[name] for name in order])), strict=True))
    with received["text"] as there:
        assert received["buffer"] is there.buffer
        below = there.buffer.raw
        # What was read ahead of a pipe stands between.
        assert received["raw"] in (below, getattr(below, "raw", None))
        assert there.fileno() == received["raw"].fileno()
        assert there.read() == ("two\nthree\n" if read_before else "one\ntwo\nthree\n")
    assert text.closed


def test_one_file_twice_is_one_object_with_one_descriptor(path: Path) -> None:
    with path.open("rb") as file, path.open("rb") as other:
        here, there = Pipe()
        with here, there:
            before = len(open_numbers())
            here.send({"a": [file, file], "b": (other, {"again": file})})
            received = there.recv()
            after = len(open_numbers())
        assert after - before == 2
        first, second = received["a"]
        assert first is second is received["b"][1]["again"]
        assert received["b"][0] is not first
        first.close()
        received["b"][0].close()


def test_file_and_a_handle_of_its_number_are_two_owners(path: Path) -> None:
    """They are two objects here, so they are two there, each with a descriptor; one description, though."""
    with path.open("rb", buffering=0) as file:
        borrowed = open(file.fileno(), "rb", buffering=0, closefd=False)  # noqa: SIM115
        first, second = trip([file, borrowed])
        assert first.fileno() != second.fileno()
        assert same_description(first, second)
        first.close()
        assert second.read() == CONTENT
        second.close()
        borrowed.close()


def test_file_that_holds_itself(path: Path) -> None:
    with path.open("rb") as file:
        cycle: list[Any] = [file]
        cycle.append(cycle)
        received = trip(cycle)
        assert received[1] is received
        received[0].close()


# temporary files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["w+b", "w+", "wb"])
def test_temporary_file(mode: str) -> None:
    with tempfile.TemporaryFile(mode) as file:
        file.write(b"hello" if "b" in mode else "hello")
        with trip(file) as received:
            assert type(received) is type(file)
            assert os.pread(received.fileno(), 10, 0) == b"hello"
            assert received.tell() == 5


def test_named_temporary_file_stays_the_senders_to_delete() -> None:
    with tempfile.NamedTemporaryFile("w+", suffix=".txt") as file:
        file.write("hello")
        with trip(file) as received:
            assert type(received) is type(file)
            assert received.name == file.name
            received.seek(0)
            assert received.read() == "hello"
        assert os.path.exists(file.name)
    assert not os.path.exists(file.name)


def test_moved_named_temporary_file_is_the_receivers_to_delete() -> None:
    file = tempfile.NamedTemporaryFile()  # noqa: SIM115
    received = trip(move(file))
    assert file.file.closed
    file.close()
    del file
    assert os.path.exists(received.name)
    received.write(b"still there")
    received.close()
    assert not os.path.exists(received.name)


@pytest.mark.parametrize("moved", [False, True])
def test_named_temporary_file_that_nobody_deletes(tmp_path: Path, moved: bool) -> None:
    with tempfile.NamedTemporaryFile(dir=tmp_path, delete=False) as file:
        trip(move(file) if moved else file).close()
    assert os.path.exists(file.name)


if sys.version_info >= (3, 12):

    def test_named_temporary_file_deleted_by_its_context() -> None:
        file = tempfile.NamedTemporaryFile(delete_on_close=False)  # noqa: SIM115
        with trip(move(file)) as received:
            received.close()
            assert os.path.exists(received.name)
        assert not os.path.exists(received.name)


def test_moved_named_temporary_file_stays_where_the_send_failed() -> None:
    with tempfile.NamedTemporaryFile() as file:
        refusal([move(file), threading.Lock()])
        file.write(b"x")
        assert os.path.exists(file.name)
    assert not os.path.exists(file.name)


@pytest.mark.parametrize("mode", ["w+b", "w+"])
@pytest.mark.parametrize("rolled", [False, True])
def test_spooled_temporary_file(mode: str, rolled: bool) -> None:
    """In memory it has no descriptor: to travel it becomes a file."""
    data: Any = b"hello" if "b" in mode else "hello"
    with tempfile.SpooledTemporaryFile(max_size=100, mode=mode) as file:
        file.write(data)
        if rolled:
            file.rollover()
        with trip({"spool": file})["spool"] as received:
            assert type(received) is tempfile.SpooledTemporaryFile
            assert received.tell() == 5
            received.seek(0)
            assert received.read() == data
            received.write(data)
            received.flush()
            assert os.pread(file.fileno(), 20, 0) == b"hellohello"


def test_closed_spooled_temporary_file_says_so() -> None:
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115
    file.close()
    assert refusal(file).reason == "it is closed"


# other processes, terminals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [False, True])
def test_pipes_of_a_process(text: bool) -> None:
    code = "import sys; sys.stdout.write(sys.stdin.read().upper()); sys.stderr.write('done')"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=text,
    )
    pipes: list[Any] = [process.stdin, process.stdout, process.stderr]
    stdin, stdout, stderr = trip(move(pipes))
    assert all(pipe.closed for pipe in pipes)
    assert [type(pipe) for pipe in (stdin, stdout, stderr)] == [type(pipe) for pipe in pipes]
    with stdin:
        stdin.write("hello" if text else b"hello")
    with stdout, stderr:
        assert (stdout.read(), stderr.read()) == (("HELLO", "done") if text else (b"HELLO", b"done"))
    assert process.wait(TIMEOUT) == 0


def read_line_of(channel: Any) -> str:
    with channel, channel.recv() as file:
        return str(file.readline())


def test_output_of_a_process_is_read_by_another() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print('from the first')"], stdout=subprocess.PIPE, text=True
    ) as process:
        ours, theirs = Pipe()
        with ours, theirs:
            ours.send(move(process.stdout))
            assert checked_child(read_line_of, theirs) == "from the first\n"


def test_pseudo_terminal() -> None:
    master, slave = os.openpty()
    with open(master, "r+b", buffering=0) as ours, open(slave, "w", buffering=1) as theirs:
        received = trip([ours, theirs])
        with received[0] as master_there, received[1] as slave_there:
            assert slave_there.isatty()
            assert slave_there.line_buffering
            print("hello", file=slave_there)
            assert master_there.read(100) == b"hello\r\n"
            assert os.ttyname(slave_there.fileno()) == os.ttyname(theirs.fileno())


def test_read_ahead_of_a_terminal_is_still_a_terminal() -> None:
    master, slave = os.openpty()
    os.write(master, b"one\ntwo\n")
    with open(slave) as terminal:
        assert terminal.readline() == "one\n"
        os.write(master, b"three\n")
        with trip(move(terminal)) as received:
            assert received.isatty()
            assert [received.readline(), received.readline()] == ["two\n", "three\n"]
    os.close(master)


@pytest.mark.parametrize("buffering", [0, -1])
def test_fifo(tmp_path: Path, buffering: int) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (
        FdHandle(os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)) as handle,
        open(tmp_path / "fifo", "wb", buffering=buffering) as writer,
        trip(writer) as received,
    ):
        received.write(b"hello")
        received.flush()
        assert os.read(handle.fileno(), 10) == b"hello"


@pytest.mark.parametrize(
    "name", ["/dev/null", "/dev/zero", *(["/proc/self/status"] if sys.platform == "linux" else [])]
)
@pytest.mark.parametrize("mode", ["rb", "r"])
def test_files_that_are_none_on_disk(name: str, mode: str) -> None:
    """They seek in ways of their own: not to an end, or not at all."""
    with open(name, mode) as file, open(name, mode) as plain:
        assert file.read(5) == plain.read(5)
        with trip(file) as received:
            assert received.read(4) == plain.read(4)
