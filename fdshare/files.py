"""How files travel: every ``open()`` mode, temporary files, and what was read ahead of a pipe.

A file object is a stack: TextIOWrapper on a buffer on FileIO.  Each layer travels as one object that holds the next, so
identity is kept whichever of them a message names.  Only the offset in the kernel is shared with the receiver, so
writers are flushed and seekable readers put at their logical position.  What was read ahead of a stream that cannot
seek is carried along by ``move``, and is an error otherwise.
"""

from __future__ import annotations

import gc
import io
from typing import Any

from fdshare.handle import hand_over
from fdshare.reducers import Context, Reduced, Refused, built, known, known_by_name, lend, take

__all__: list[str] = []


def _open(file: Any) -> int:
    if file.closed:
        raise Refused(file, "it is closed")
    try:
        return int(file.fileno())
    except (OSError, ValueError) as error:
        raise Refused(file, f"it has no descriptor ({error})") from error


def reduce_fileio(raw: io.FileIO, context: Context) -> Reduced:
    fd = _open(raw)
    if context.moving:
        context.consume(raw.close)
    name = raw.name if isinstance(raw.name, str | bytes) else None
    return rebuild_fileio, (*lend(raw, context, fd), raw.mode, name)


def rebuild_fileio(index: int, format: int, mode: str, name: str | bytes | None) -> io.FileIO:
    handle = take(index, format)
    raw = built(hand_over(handle, io.FileIO, handle.fileno(), mode))
    if name is not None:
        raw.name = name
    return raw


def _readahead(reader: Any) -> bytes:
    """Return the bytes that a buffered reader has read and not yet given out, leaving them there."""
    raw = reader.raw
    # With a raw file that never has anything, peek cannot read: it shows what is in the buffer.
    raw.readinto = lambda buffer: None
    try:
        return bytes(reader.peek(1))
    finally:
        del raw.readinto


def reduce_buffered(file: Any, context: Context) -> Reduced:
    """For BufferedReader, BufferedWriter and BufferedRandom: the raw file travels inside, and identity is kept."""
    _open(file)
    ahead = b""
    if file.seekable():
        if file.writable():
            file.flush()
        if file.readable():
            position = file.tell()
            file.seek(0, io.SEEK_END)  # empties the read-ahead; a plain seek may stay inside it
            file.seek(position)
    elif file.readable():
        ahead = _readahead(file) if type(file.raw) is io.FileIO else b""
        if ahead and not context.moving:
            raise Refused(
                file,
                f"{len(ahead)} bytes were read ahead and the stream cannot seek back: "
                "send fdshare.move(file), which carries them along, or open it with buffering=0",
            )
    else:
        file.flush()
    if context.moving:
        context.consume(file.close)
    return rebuild_buffered, (type(file), file.raw, ahead)


def rebuild_buffered(cls: type, raw: io.FileIO, ahead: bytes) -> Any:
    if ahead:
        return built(io.BufferedReader(ReadAhead(ahead, raw)))
    return built(cls(raw))


class ReadAhead(io.RawIOBase):
    """A raw reader that first gives out what another process had read ahead, then reads ``raw``."""

    def __init__(self, ahead: bytes, raw: io.FileIO) -> None:
        self.ahead = ahead
        self.raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if not self.ahead:
            return self.raw.readinto(buffer)
        count = min(len(buffer), len(self.ahead))
        buffer[:count], self.ahead = self.ahead[:count], self.ahead[count:]
        return count

    def fileno(self) -> int:
        return self.raw.fileno()

    @property
    def name(self) -> Any:
        return self.raw.name

    @property
    def mode(self) -> str:
        return self.raw.mode

    def close(self) -> None:
        if not self.closed:
            super().close()
            self.raw.close()


def reduce_readahead(raw: ReadAhead, context: Context) -> Reduced:
    if raw.ahead and not context.moving:
        raise Refused(raw, f"{len(raw.ahead)} bytes were read ahead: send fdshare.move(file)")
    return ReadAhead, (raw.ahead, raw.raw)


def reduce_text(text: io.TextIOWrapper, context: Context) -> Reduced:
    _open(text)
    text.flush()
    ahead, position = b"", None
    if text.seekable():
        if text.readable():
            try:
                position = text.tell()
            except OSError as error:
                raise Refused(
                    text,
                    f"its position is unknown ({error}): leave the loop over its lines, or use readline()",
                ) from error
            text.seek(position)
    elif text.readable() and _was_read(text):
        if not context.moving:
            raise Refused(
                text,
                "what was read ahead cannot be put back: send fdshare.move(file), which carries it along",
            )
        ahead = _drain(text)
    if context.moving:
        context.consume(text.close)
    options = (text.encoding, text.errors, _newline(text), text.line_buffering, text.write_through)
    return rebuild_text, (text.buffer, options, position, ahead, getattr(text, "mode", None))


def _newline(text: io.TextIOWrapper) -> str | None:
    """Find the newline argument that ``text`` was made with, which it keeps to itself.

    The collector shows what it refers to: its encoding, the newline (unless None), the characters decoded and not
    reset by a seek, the error handler.
    """
    strings = [item for item in gc.get_referents(text) if isinstance(item, str)]
    if len(strings) < 3 or strings[1] not in ("", "\n", "\r", "\r\n"):
        return None
    universal = any(isinstance(item, io.IncrementalNewlineDecoder) for item in gc.get_referents(text))
    if universal and strings[1]:
        return None  # decoded characters that look like a newline
    return strings[1]


def _was_read(text: io.TextIOWrapper) -> bool:
    """Whether anything was decoded already: reconfigure() refuses just then, and changes nothing otherwise."""
    try:
        text.reconfigure(errors=text.errors)
    except io.UnsupportedOperation:
        return True
    return False


class _Dry(Exception):
    """Raised in place of a read that would ask the kernel."""


def _drain(text: Any) -> bytes:
    """Return what ``text`` has taken from its buffer and not yet given out, encoded, leaving it there."""
    buffer, characters = text.buffer, ""

    def read1(size: int = -1) -> bytes:
        raise _Dry

    buffer.read1 = read1
    try:
        while True:
            characters += text.read(1)
    except _Dry:
        pass
    finally:
        del buffer.read1
    data = characters.encode(text.encoding, text.errors)
    if data:  # back at once, since the send may yet fail
        _put_back(text, data)
    decoders = [
        item for item in gc.get_referents(text) if hasattr(item, "getstate") and hasattr(item, "decode")
    ]
    return data + b"".join(decoder.getstate()[0] for decoder in decoders)  # half a character, say


def _put_back(text: Any, data: bytes) -> None:
    """Let the next read of ``text`` begin with ``data``."""
    buffer = text.buffer

    def read1(size: int = -1) -> bytes:
        del buffer.read1, buffer.read
        return data

    def read(size: int = -1) -> bytes:
        return read1() + (buffer.read(size) or b"")

    buffer.read1, buffer.read = read1, read


def rebuild_text(
    buffer: Any, options: tuple[Any, ...], position: int | None, ahead: bytes, mode: str | None
) -> io.TextIOWrapper:
    text = built(io.TextIOWrapper(buffer, *options))
    if mode is not None:
        text.mode = mode  # type: ignore[misc]  # as open() does
    if position is not None:
        text.seek(position)
    if ahead:
        _put_back(text, ahead)
    return text


def reduce_temporary(wrapper: Any, context: Context) -> Reduced:
    """A NamedTemporaryFile: whoever owns it last deletes it, so only move hands that duty over."""
    delete = bool(context.moving and wrapper.delete)
    if context.moving:
        context.consume(lambda: _close_undeleted(wrapper))
    return rebuild_temporary, (wrapper.file, wrapper.name, delete)


def _close_undeleted(wrapper: Any) -> None:
    wrapper.delete = wrapper._closer.delete = False
    wrapper.close()


def rebuild_temporary(file: Any, name: str, delete: bool) -> Any:
    return built(tempfile_module()._TemporaryFileWrapper(file, name, delete))


def reduce_spooled(spooled: Any, context: Context) -> Reduced:
    spooled.rollover()
    return rebuild_spooled, (spooled._file, spooled._max_size)


def rebuild_spooled(file: Any, max_size: int) -> Any:
    spooled = tempfile_module().SpooledTemporaryFile(max_size)
    spooled._file, spooled._rolled = file, True
    return built(spooled)


def tempfile_module() -> Any:
    import tempfile

    return tempfile


known.update(
    {
        io.FileIO: reduce_fileio,
        io.BufferedReader: reduce_buffered,
        io.BufferedWriter: reduce_buffered,
        io.BufferedRandom: reduce_buffered,
        io.TextIOWrapper: reduce_text,
        ReadAhead: reduce_readahead,
    }
)
known_by_name.update(
    {
        "tempfile._TemporaryFileWrapper": reduce_temporary,
        "tempfile.SpooledTemporaryFile": reduce_spooled,
    }
)
