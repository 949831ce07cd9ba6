"""Where a file stands when it travels: offsets are shared, so both sides must mean the same, and no byte read ahead may be lost.

The measure is always a plain file that does the same without travelling.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import random
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from travel import TIMEOUT, pipe_files, refusal, trip

from fdshare import Pipe, move

UNICODE = ("utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32")
STATEFUL = ("iso2022_jp", "utf-7")
ENCODINGS = (*UNICODE, "shift_jis", "latin-1", *STATEFUL)
TEXT = "eins\nzwei\ndrei, vier\nfünf\n"
JAPANESE = "日本\nあa漢字b\n語語語\nend\n"


def sample(encoding: str) -> str:
    return TEXT if encoding == "latin-1" else JAPANESE


# files that seek --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("read", [0, 1, 5000, 10_000])
def test_reader_is_where_its_user_is(tmp_path: Path, read: int, buffering: int) -> None:
    """A buffered reader at 1 has a kernel offset of thousands; both sides go on at 1, and share it."""
    content = random.Random(1).randbytes(20_000)
    (tmp_path / "f").write_bytes(content)
    with open(tmp_path / "f", "rb", buffering=buffering) as file:
        file.read(read)
        with trip(file) as received:
            assert file.tell() == received.tell() == read
            assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == read
            assert received.read(100) == content[read : read + 100]
            received.close()


def test_offset_is_shared(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    with open(tmp_path / "f", "rb", buffering=0) as file:
        assert file.read(2) == b"01"
        with trip(file) as received:
            assert received.read(3) == b"234"
            assert file.read(3) == b"567"
            assert received.read(3) == b"89"


@pytest.mark.parametrize("mode", ["wb", "w", "ab", "a", "r+b", "r+"])
def test_writer_is_flushed_and_both_write_on(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"")

    def data(text: str) -> Any:
        return text.encode() if "b" in mode else text

    with open(path, mode) as file:
        file.write(data("one "))
        assert path.read_bytes() == b""
        with trip(file) as received:
            assert path.read_bytes() == b"one "
            received.write(data("two "))
            received.flush()
            file.write(data("three "))
            file.flush()
            received.write(data("four"))
    assert path.read_bytes() == b"one two three four"


@pytest.mark.parametrize("read", [0, 3, 10])
@pytest.mark.parametrize("buffering", [0, -1])
def test_appending_reader_keeps_its_place(tmp_path: Path, read: int, buffering: int) -> None:
    """FileIO goes to the end when it is made for appending, for everybody who shares the offset."""
    (tmp_path / "f").write_bytes(b"0123456789")
    with open(tmp_path / "f", "a+b", buffering=buffering) as file:
        file.seek(read)
        with trip(file) as received:
            assert file.tell() == received.tell() == read
            assert received.read() == b"0123456789"[read:]
            received.write(b"ab")
    assert (tmp_path / "f").read_bytes() == b"0123456789ab"


def test_random_access_with_unwritten_and_unread_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"0123456789")
    with open(tmp_path / "f", "r+b") as file:
        assert file.read(2) == b"01"
        file.write(b"xx")
        assert file.read(1) == b"4"
        with trip(file) as received:
            assert received.tell() == file.tell() == 5
            assert received.read() == b"56789"
            received.seek(0)
            assert received.read(5) == b"01xx4"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-8-sig", "iso2022_jp"])
@pytest.mark.parametrize("mode", ["w", "r+", "a"])
def test_text_is_written_on_without_a_second_mark(tmp_path: Path, encoding: str, mode: str) -> None:
    """The byte order mark comes once, and an encoding with shifts goes on in the shift where it was."""
    for name in ("travels", "stays"):
        (tmp_path / name).touch()
        with open(tmp_path / name, mode, encoding=encoding) as file:
            file.write("日")
            file.flush()
            if name == "stays":
                file.write("本")
            else:
                with trip(file) as received:
                    received.write("本")
    assert (tmp_path / "travels").read_bytes() == (tmp_path / "stays").read_bytes()


def advance(file: Any, step: tuple[str, int]) -> Any:
    """Read from a file in one of the ways in which one can."""
    how, count = step
    if how == "read":
        return file.read(count)
    if how == "readline":
        return file.readline()
    if how == "next":
        return next(file, "")
    if how == "flush":
        return file.flush()
    with contextlib.suppress(OSError):  # in a loop over the lines
        file.seek(file.tell())
    return None


steps = st.lists(
    st.tuples(st.sampled_from(["read", "readline", "next", "seek"]), st.integers(0, 30)), max_size=6
)
contents = st.text(st.sampled_from("ab\n\r日本é"), max_size=60)
newlines = st.sampled_from([None, "", "\n", "\r", "\r\n"])


@given(contents, st.sampled_from(ENCODINGS), newlines, steps, st.booleans(), st.integers(1, 40))
def test_text_travels_at_its_place(
    content: str, encoding: str, newline: str | None, steps: list[tuple[str, int]], moved: bool, chunk: int
) -> None:
    """Any content, encoding and newline, after any reads: the receiver reads on what a plain file would."""
    data = content.encode(encoding, "replace")
    with tempfile.NamedTemporaryFile() as storage:
        storage.write(data)
        storage.flush()
        options: dict[str, Any] = {"encoding": encoding, "newline": newline}
        with open(storage.name, **options) as file, open(storage.name, **options) as plain:
            for each in (file, plain):
                each._CHUNK_SIZE = chunk  # so that short texts have what long ones have
            for step in steps:
                assert advance(file, step) == advance(plain, step)
            with trip(move(file) if moved else file) as received:
                if not moved:
                    assert received.tell() == file.tell()
                assert received.read() == plain.read()
                received.seek(0)
                plain.seek(0)
                assert received.read() == plain.read()


@given(contents, st.sampled_from(ENCODINGS), newlines, steps, st.integers(1, 40))
def test_sending_text_does_not_disturb_its_user(
    content: str, encoding: str, newline: str | None, steps: list[tuple[str, int]], chunk: int
) -> None:
    """The sender reads on as if nothing had been; in a loop over the lines too."""
    data = content.encode(encoding, "replace")
    with tempfile.NamedTemporaryFile() as storage:
        storage.write(data)
        storage.flush()
        options: dict[str, Any] = {"encoding": encoding, "newline": newline}
        with open(storage.name, **options) as file, open(storage.name, **options) as plain:
            file._CHUNK_SIZE = plain._CHUNK_SIZE = chunk  # type: ignore[attr-defined]
            for step in steps:
                assert advance(file, step) == advance(plain, step)
                trip(file).close()
            assert list(file) == list(plain)


def test_loop_over_lines_and_a_flush(tmp_path: Path) -> None:
    """flush() makes tell() of a loop over lines answer, and wrongly."""
    (tmp_path / "f").write_text("one\ntwo\nthree\n")
    with open(tmp_path / "f") as file:
        assert next(file) == "one\n"
        file.flush()
        assert file.tell() == 14  # the standard library's own
    with open(tmp_path / "f") as file:
        assert next(file) == "one\n"
        file.flush()
        with trip(file) as received:
            assert received.readline() == "two\n"


def test_lines_are_divided_between_two_readers(tmp_path: Path) -> None:
    lines = [f"line {n}\n" for n in range(2000)]
    (tmp_path / "f").write_text("".join(lines))
    with open(tmp_path / "f") as file:
        for wanted, line in enumerate(file):
            assert line == lines[wanted]
            if wanted == 777:
                break
        with trip(move(file)) as received:
            assert list(received) == lines[778:]


@pytest.mark.parametrize("errors", ["replace", "ignore", "surrogateescape", "backslashreplace"])
@pytest.mark.parametrize("how", ["next", "readline", "read"])
def test_text_with_damaged_characters_is_at_its_place(tmp_path: Path, errors: str, how: str) -> None:
    """What was replaced while reading does not tell how many bytes it was."""
    (tmp_path / "f").write_bytes(b"a\xff\xfeb\nc\xffd\r\ne\x80\xe6\x97f\nend\n")
    with (
        open(tmp_path / "f", encoding="utf-8", errors=errors) as file,
        open(tmp_path / "f", encoding="utf-8", errors=errors) as plain,
    ):
        assert advance(file, (how, 3)) == advance(plain, (how, 3))
        with trip(file) as received:
            assert received.read() == plain.read()


# streams that do not seek --------------------------------------------------------------------------------------------------


def test_duplicate_with_bytes_read_ahead_is_refused() -> None:
    """They would be lost to one side or come twice."""
    for mode, first in (("rb", b"one\n"), ("r", "one\n")):
        reader, writer = pipe_files(mode)
        with reader, writer:
            writer.write(b"one\ntwo\n")
            assert reader.readline() == first
            for message in (reader, {"deep": [reader]}):
                error = refusal(message)
                assert "4 bytes were read ahead" in str(error)
                assert "fdshare.move(file)" in str(error)
            assert reader.readline() == ("two\n" if mode == "r" else b"two\n")


@pytest.mark.parametrize("mode", ["rb", "r"])
def test_duplicate_with_nothing_read_ahead_travels(mode: str) -> None:
    reader, writer = pipe_files(mode)
    with reader, writer:
        for _ in range(2):
            writer.write(b"one\n")
            assert reader.readline() in ("one\n", b"one\n")
            with trip(reader) as received:
                writer.write(b"two\n")
                assert received.readline() in ("two\n", b"two\n")


def test_unbuffered_reader_has_nothing_ahead() -> None:
    reader, writer = pipe_files("rb", buffering=0)
    with reader, writer:
        writer.write(b"one\ntwo\n")
        assert reader.read(4) == b"one\n"
        with trip(reader) as received:
            assert received.read(100) == b"two\n"


def test_move_carries_bytes_along_and_then_reads_on() -> None:
    reader, writer = pipe_files("rb")
    writer.write(b"one\ntwo\n")
    assert reader.readline() == b"one\n"
    with trip(move(reader)) as received, writer:
        assert reader.closed
        assert (received.name, received.mode, received.fileno()) == (
            received.fileno(),
            "rb",
            received.raw.fileno(),
        )
        assert not received.seekable()
        writer.write(b"three\n")
        assert [received.readline(), received.readline()] == [b"two\n", b"three\n"]
        writer.write(b"abc")
        assert received.peek(1) == b"abc"
        assert received.read1(2) == b"ab"
        buffer = bytearray(10)
        assert received.readinto1(buffer) == 1
        writer.close()
        assert received.read() == b""


def test_move_over_several_hops() -> None:
    """Nobody reads it to the end: each hop carries on what the one before had ahead."""
    for mode in ("rb", "r"):
        reader, writer = pipe_files(mode)
        writer.write(b"0123456789")
        for number in range(5):
            assert reader.read(1) in (str(number), str(number).encode())
            reader = trip(move(reader))
            if number == 2:
                writer.write(b"ab")
        writer.close()
        with reader:
            assert reader.read() in ("56789ab", b"56789ab")


@pytest.mark.parametrize("mode", ["rb", "r"])
def test_failed_moves_lose_no_byte(mode: str) -> None:
    """Encoding runs several times where it fails, and a send may fail after it; in between the sender reads on."""
    reader, writer = pipe_files(mode)
    expected = b"".join(b"line %d\n" % n for n in range(200))
    writer.write(expected)
    taken: list[Any] = []
    with reader:
        for _ in range(10):
            taken.append(reader.readline())
            refusal([move(reader), threading.Lock()])
            refusal({"a": [move([reader])], "b": iter([threading.Lock()])})
            taken.append(reader.read(5))
            here, there = Pipe()
            with here:
                there.close()
                with pytest.raises(BrokenPipeError):
                    here.send(move(reader))
        assert not reader.closed
        taken.append(reader.read(1))
        with trip([move(reader), lambda: 1])[0] as received:  # the lambda makes it run twice
            writer.close()
            taken.append(received.read())
    joined = "".join(taken).encode() if mode == "r" else b"".join(taken)
    assert joined == expected


def cut(data: bytes, at: float) -> tuple[bytes, bytes]:
    place = int(at * len(data))
    return data[:place], data[place:]


@given(
    contents,
    st.sampled_from([e for e in ENCODINGS if e not in STATEFUL]),
    newlines,
    st.floats(0, 1),
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["move", "fail", "move_later"])), max_size=4),
    st.booleans(),
)
def test_text_of_a_pipe_is_moved_whole(
    content: str,
    encoding: str,
    newline: str | None,
    at: float,
    steps: list[tuple[int, str]],
    swapped: bool,
) -> None:
    """Cut anywhere, in the middle of a character or a newline, and read, moved and refused in any order."""
    data = content.encode(encoding, "replace")
    if swapped and encoding in (
        "utf-16",
        "utf-32",
    ):  # the other byte order, which only the mark at the start tells
        data = ("\ufeff" + content).encode(f"{encoding}-{'be' if sys.byteorder == 'little' else 'le'}")
    first, second = cut(data, at)
    with io.TextIOWrapper(io.BytesIO(data), encoding, newline=newline) as whole:
        expected = whole.read()
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder(encoding)(), translate=newline is None
    )
    left = len(decoder.decode(first)) - 1  # the last may wait for the rest of its newline
    reader, writer = pipe_files("r", encoding=encoding, newline=newline)
    writer.write(first)
    taken = []
    for count, step in steps:
        if left > 0:
            taken.append(reader.read(min(count, left)))
            left -= len(taken[-1])
        if step == "fail":
            refusal([move(reader), threading.Lock()])
        else:
            reader = trip([move(reader.buffer), move(reader)] if step == "move_later" else move(reader))
            reader = reader[-1] if isinstance(reader, list) else reader
    writer.write(second)
    writer.close()
    with reader:
        taken.append(reader.read())
        assert (reader.encoding, reader.errors) == (encoding, "strict")
    assert "".join(taken) == expected


@pytest.mark.parametrize("encoding", STATEFUL)
def test_stateful_encodings_are_refused_where_they_were_read(encoding: str) -> None:
    """What was decoded cannot be put back in front of bytes whose meaning depends on what came before."""
    reader, writer = pipe_files("r", encoding=encoding)
    with reader, writer:
        trip(reader).close()
        writer.write(JAPANESE.encode(encoding))
        assert reader.read(1) == "日"
        assert encoding.replace("_", "") in str(refusal(move(reader))).replace("_", "")
        writer.close()
        assert reader.read() == JAPANESE[1:]


@given(st.lists(st.integers(0, 5), max_size=6), st.binary(max_size=40))
def test_bytes_of_a_pipe_are_moved_whole(reads: list[int], data: bytes) -> None:
    reader, writer = pipe_files("rb")
    writer.write(data)
    writer.close()
    taken = []
    for count in reads:
        taken.append(reader.read(count))
        reader = trip(move(reader))
    with reader:
        taken.append(reader.read())
    assert b"".join(taken) == data


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "iso2022_jp"])
def test_text_into_a_pipe_is_written_on(encoding: str) -> None:
    """As one writer would write it: no second byte order mark, no shift forgotten."""
    results = []
    for travels in (True, False):
        reader, writer = os.pipe()
        with open(reader, "rb") as bytes_there:
            with open(writer, "w", encoding=encoding) as text:
                text.write("日")
                if travels:
                    with trip(text) as received:
                        received.write("本")
                else:
                    text.write("本")
            results.append(bytes_there.read())
    assert results[0] == results[1]


def test_nonblocking_pipe_travels_without_a_read() -> None:
    reader, writer = pipe_files("rb")
    with reader, writer:
        os.set_blocking(reader.fileno(), False)
        with trip(reader) as received:
            assert received.read() is None
            writer.write(b"x")
            assert received.read() == b"x"
        assert not os.get_blocking(reader.fileno())


def test_sending_a_reader_does_not_wait_for_its_pipe() -> None:
    """Neither finding out what is ahead nor taking it asks the kernel."""
    for mode in ("rb", "r"):
        reader, writer = pipe_files(mode)
        with writer:
            done = threading.Event()
            thread = threading.Thread(
                target=lambda r=reader, d=done: (trip(r).close(), trip(move(r)).close(), d.set())
            )
            thread.start()
            assert done.wait(TIMEOUT)
            thread.join(TIMEOUT)
