"""How files travel: every ``open()`` mode, temporary files, and what was read ahead of a pipe.

A file object is a stack: TextIOWrapper on a buffer on FileIO.  Each layer travels as one object that holds the next, so
identity is kept whichever of them a message names.  Only the offset in the kernel is shared with the receiver, so
writers are flushed and seekable readers put at their logical position.  What was read ahead of a stream that cannot
seek is carried along by ``move``, and is an error otherwise.
"""

from __future__ import annotations

import codecs
import gc
import io
import os
import sys
from typing import Any

from fdshare.handle import hand_over
from fdshare.reducers import Context, Reduced, Refused, built, known, known_by_name, lend, refuse_early, take

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
    name = None if isinstance(raw.name, int) else raw.name
    return rebuild_fileio, (*lend(raw, context, fd), raw.mode, name)


def rebuild_fileio(index: int, format: int, mode: str, name: Any) -> io.FileIO:
    handle = take(index, format)
    fd = handle.fileno()
    # FileIO goes to the end of what it appends to, and the offset is the sender's too.
    offset = _offset(fd) if "a" in mode else None
    raw = built(hand_over(handle, io.FileIO, fd, mode))
    if offset is not None:
        os.lseek(fd, offset, os.SEEK_SET)
    if name is not None:
        raw.name = name
    return raw


def _offset(fd: int) -> int | None:
    try:
        return os.lseek(fd, 0, os.SEEK_CUR)
    except OSError:
        return None


def _readahead(reader: Any) -> bytes:
    """Return the bytes that a buffered reader has read and not yet given out, leaving them there."""
    raw = reader.raw
    # With a raw file that never has anything, peek cannot read: it shows what is in the buffer.
    try:
        raw.readinto = lambda buffer: None
    except AttributeError as error:
        raise Refused(
            reader, f"what it has read ahead of its {type(raw).__name__} is out of reach"
        ) from error
    try:
        return bytes(reader.peek(1))
    finally:
        del raw.readinto


def _align(reader: Any) -> None:
    """Put the offset of a seekable reader where its user is, with nothing read ahead."""
    position = reader.tell()
    reader.read(
        len(_readahead(reader))
    )  # only what is in the buffer; now that is empty, seek goes to the kernel
    reader.seek(position)


def reduce_buffered(file: Any, context: Context) -> Reduced:
    """For BufferedReader, BufferedWriter and BufferedRandom: the raw file travels inside, and identity is kept."""
    _open(file)
    refuse_early(file.raw, context)
    ahead = b""
    if file.seekable():
        if file.writable():
            file.flush()
        if file.readable():
            _align(file)
    elif file.readable():
        ahead = _readahead(file)
        _check_ahead(file, read_ahead_of(file), context)
    else:
        file.flush()
    if context.moving:
        context.consume(file.close)
    return rebuild_buffered, (type(file), file.raw, ahead)


def rebuild_buffered(cls: type, raw: io.FileIO, ahead: bytes) -> Any:
    if ahead:
        return built(io.BufferedReader(ReadAhead(ahead, raw)))
    return built(cls(raw))


def read_ahead_of(reader: Any) -> int:
    """Return how many bytes ``reader`` has taken of a stream that its user has not; raises Refused where nobody can tell."""
    return len(_readahead(reader)) + _given_back(reader)


def _given_back(reader: Any) -> int:
    return len(reader.raw.ahead) if type(reader.raw) is ReadAhead else 0


def _check_ahead(file: Any, size: int, context: Context) -> None:
    if size and not context.moving:
        raise Refused(
            file,
            f"{size} bytes were read ahead and the stream cannot seek back: "
            "send fdshare.move(file), which carries them along, or open it with buffering=0",
        )


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

    def isatty(self) -> bool:
        return self.raw.isatty()

    @property
    def name(self) -> Any:
        return self.raw.name

    @property
    def mode(self) -> str:
        return self.raw.mode

    def close(self) -> None:
        try:
            super().close()
        finally:
            self.raw.close()

    @property
    def closed(self) -> bool:
        return self.raw.closed


def reduce_readahead(raw: ReadAhead, context: Context) -> Reduced:
    if raw.ahead and not context.moving:
        raise Refused(raw, f"{len(raw.ahead)} bytes were read ahead: send fdshare.move(file)")
    return ReadAhead, (raw.ahead, raw.raw)


# --- text -------------------------------------------------------------------------------------------------------------


def reduce_text(text: io.TextIOWrapper, context: Context) -> Reduced:
    _open(text)
    for below in (text.buffer, getattr(text.buffer, "raw", None)):
        refuse_early(below, context)
    position, flags, late = None, None, b""
    if not text.readable():
        text.flush()
    elif text.seekable():
        position = _settle(text)
    else:
        given = give_back(text)
        _check_ahead(text, read_ahead_of(text.buffer), context)
        if given and id(text.buffer) in context.memo.copy():
            late = given  # the buffer is in the message already, as it was before
        flags = _coder(text, "decode").getstate()[1]
    if context.moving:
        context.consume(text.close)
    shift = _coder(text, "encode").getstate() if text.writable() else None
    options = (text.encoding, text.errors, _newline(text), text.line_buffering, text.write_through)
    mode = getattr(text, "mode", None)
    return rebuild_text, (text.buffer, options, position, (late, flags), shift, mode)


_NEEDS_READING = 1 << 96
"""Positions of text from here on ask for a few bytes to be decoded again; below are an offset and a decoder's flags."""


def rebuild_text(
    buffer: Any,
    options: tuple[Any, ...],
    position: int | None,
    ahead: tuple[bytes, int | None],
    shift: int | None,
    mode: str | None,
) -> io.TextIOWrapper:
    late, flags = ahead
    if late:
        _put_below(buffer, late)
    text = built(io.TextIOWrapper(buffer, *options))
    if mode is not None:
        text.mode = mode  # type: ignore[misc]  # as open() does
    if position is not None:
        text.seek(position)
        if position >= _NEEDS_READING:
            _align(buffer)
    if flags is not None:
        _coder(text, "decode").setstate((b"", flags))
    if shift is not None:
        _coder(text, "encode").setstate(shift)
    return text


def _coder(text: io.TextIOWrapper, verb: str) -> Any:
    """Return the incremental encoder or decoder of ``text``, which the collector shows."""
    return next(item for item in gc.get_referents(text) if hasattr(item, "getstate") and hasattr(item, verb))


def _newline(text: io.TextIOWrapper) -> str | None:
    """Find the newline argument that ``text`` was made with, which it keeps to itself.

    The collector shows what it refers to: its encoding, the newline (unless None), the characters decoded (unless never
    read, or reset by a seek), the error handler.
    """
    strings = [item for item in gc.get_referents(text) if isinstance(item, str)]
    if len(strings) < 3 or strings[1] not in ("", "\n", "\r", "\r\n"):
        return None
    if len(strings) == 3 and text.readable():
        universal = any(isinstance(item, io.IncrementalNewlineDecoder) for item in gc.get_referents(text))
        if universal and (strings[1] or _was_read(text)):
            return None  # these are decoded characters
    return strings[1]


def _was_read(text: io.TextIOWrapper) -> bool:
    """Whether ``text``, which cannot seek, has decoded anything, given out since or not: reconfigure() refuses just then."""
    if text.seekable():
        return False  # put at its position before: what is decoded again then is never empty
    state = _coder(text, "decode").getstate()
    try:
        text.reconfigure(errors=text.errors)
    except io.UnsupportedOperation:
        return True
    _coder(text, "decode").setstate(state)
    return False


class _Dry(Exception):
    """Raised in place of a read that would ask the kernel."""


def _take_decoded(text: Any) -> tuple[str, str, bytes, int]:
    """Take from ``text`` what it has read and its user has not, without any read of its buffer.

    Returns:
        the characters; a carriage return that may be half of a newline, or ""; the bytes of half a character; the
        decoder's flags.
    """
    buffer, characters = text.buffer, []

    def read1(size: int = -1) -> bytes:
        raise _Dry

    buffer.read1 = read1
    try:
        while True:
            characters.append(text.read(1))
    except _Dry:
        pass
    finally:
        del buffer.read1
    decoder = _coder(text, "decode")
    pending, flags = decoder.getstate()
    if isinstance(decoder, io.IncrementalNewlineDecoder) and flags & 1:
        return "".join(characters), "\r", pending, flags & ~1
    return "".join(characters), "", pending, flags


def _encode(text: Any, characters: str, flags: int) -> bytes:
    """Encode as the stream of ``text`` is encoded in its middle: in its byte order, without a mark of it."""
    encoding = codecs.lookup(text.encoding).name
    if encoding in ("utf-16", "utf-32"):
        swapped = flags >> isinstance(_coder(text, "decode"), io.IncrementalNewlineDecoder) & 1
        encoding += "-le" if (sys.byteorder == "little") != bool(swapped) else "-be"
    elif encoding == "utf-8-sig":
        encoding = "utf-8"
    try:
        return characters.encode(encoding, text.errors)
    except UnicodeError:  # the error handler had decoded what it does not encode
        return characters.encode(encoding, "replace")


def give_back(text: Any, reader: io.BufferedReader | None = None) -> bytes:
    """Put what ``text`` has read of a stream that cannot seek, and its user has not, back below its buffer.

    There it is for whoever reads on: the receiver, or the sender after a failure, and a second look finds it like the first.

    Args:
        reader: its buffer, where that is a pair, which keeps its reader to itself.

    Returns:
        what was put back and came from ``text`` itself, not from its buffer.
    """
    encoding = codecs.lookup(text.encoding).name
    if encoding.startswith(("iso2022", "hz", "utf-7")) and _was_read(text):
        raise Refused(
            text, f"what was read ahead in {encoding} cannot be put back: send its bytes, before reading"
        )
    characters, carriage_return, pending, flags = _take_decoded(text)
    data = _encode(text, characters + carriage_return, flags) + pending
    if data:
        _put_below(reader or text.buffer, data)
        _coder(text, "decode").setstate((b"", flags))
    return data


def _put_below(reader: Any, data: bytes) -> None:
    """Let ``reader`` read ``data`` first."""
    if type(reader) is not io.BufferedReader:
        raise TypeError(f"nothing can be put below a {type(reader).__name__}")
    reader.__init__(ReadAhead(data + _readahead(reader), reader.raw))  # type: ignore[misc]  # as the same object


def _settle(text: io.TextIOWrapper) -> int:
    """Put seekable ``text``, and the kernel's offset, where its user is; return that for the seek of another."""
    try:
        position = text.tell()
    except (OSError, UnicodeError):  # it keeps no count in a loop over its lines, nor in UTF-7
        position = _find_position(text)
    else:
        # Nor after such a loop and a flush(), and then it does not say so: there are decoded characters (a third
        # string, or a fourth) and no tuple, from which it counts.
        items = gc.get_referents(text)
        if sum(isinstance(item, str) for item in items) > 2 and not any(isinstance(i, tuple) for i in items):
            position = _find_position(text)
    shift = _coder(text, "encode").getstate() if text.writable() else None
    text.seek(position)
    if shift is not None:  # seek forgets it, as if this were another place
        _coder(text, "encode").setstate(shift)
    if type(text.buffer) in (io.BufferedReader, io.BufferedRandom):
        _align(text.buffer)  # which may stand before the text in the message
    return position


def _find_position(text: Any) -> int:
    """Find the position of seekable ``text`` by what it has not yet given out."""
    text.flush()
    rest, carriage_return, pending, flags = _take_decoded(text)
    end, newline = text.buffer.tell(), _newline(text)
    translated = newline is None and "\n" in rest
    if not translated or isinstance(text.newlines, str):
        data = _encode(text, rest.replace("\n", text.newlines) if translated else rest, flags)
        data += _encode(text, carriage_return, flags) + pending
        start = end - len(data)
        if start >= 0 and os.pread(text.fileno(), len(data), start) == data:
            return int(start | flags << 64)  # as tell() packs them
    return _count_position(text, end, len(rest), newline)


def _count_position(text: Any, end: int, undelivered: int, newline: str | None) -> int:
    """Find the position that is ``undelivered`` characters before byte ``end``, by decoding all from the start."""
    decoder = codecs.getincrementaldecoder(text.encoding)(text.errors)
    if not newline:
        decoder = io.IncrementalNewlineDecoder(decoder, translate=newline is None)
    delivered, offset = -undelivered, 0
    while offset < end and (data := os.pread(text.fileno(), min(end - offset, 1 << 20), offset)):
        delivered += len(decoder.decode(data))
        offset += len(data)
    text.seek(0)
    while delivered > 0 and (given := text.read(min(delivered, 1 << 20))):
        delivered -= len(given)
    return int(text.tell())


# --- temporary files ----------------------------------------------------------------------------------------------


def reduce_temporary(wrapper: Any, context: Context) -> Reduced:
    """A NamedTemporaryFile: whoever owns it last deletes it, so only move hands that duty over."""
    closer = wrapper._closer
    delete = bool(context.moving and closer.delete)
    if context.moving:
        context.consume(lambda: _close_undeleted(closer))
    on_close = getattr(closer, "delete_on_close", True)  # since Python 3.12
    return rebuild_temporary, (wrapper.file, wrapper.name, delete, *(() if on_close else (False,)))


def _close_undeleted(closer: Any) -> None:
    closer.delete = False
    closer.close()


def rebuild_temporary(file: Any, *arguments: Any) -> Any:
    return built(tempfile_module()._TemporaryFileWrapper(file, *arguments))


def reduce_spooled(spooled: Any, context: Context) -> Reduced:
    if spooled.closed:
        raise Refused(spooled, "it is closed")
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
