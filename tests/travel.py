"""What the tests of travelling share: a round trip through a channel, and what a refusal says."""

from __future__ import annotations

import os
from typing import IO, Any

import pytest

from fdshare import NotSendableError, Pipe

TIMEOUT = 20.0


def trip(obj: Any, transport: str | None = None) -> Any:
    """Send ``obj`` through a channel and return what arrives, in this same process."""
    here, there = Pipe(transport=transport)
    with here, there:
        here.send(obj, timeout=TIMEOUT)
        return there.recv(timeout=TIMEOUT)


def refusal(obj: Any) -> NotSendableError:
    """Send what cannot travel; return the error.  The channel must go on as if nothing had been."""
    here, there = Pipe()
    with here, there:
        with pytest.raises(NotSendableError) as caught:
            here.send(obj, timeout=TIMEOUT)
        here.send("unharmed")
        assert there.recv(timeout=TIMEOUT) == "unharmed"
    assert caught.value.path is not None
    assert caught.value.reason
    assert str(caught.value).startswith(f"cannot send {caught.value.path} ({caught.value.type_name}): ")
    return caught.value


def same_description(first: Any, second: Any) -> bool:
    """Whether two descriptors share one description, seekable: what moves one's offset moves the other's."""
    before = os.lseek(first.fileno(), 0, os.SEEK_CUR)
    os.lseek(first.fileno(), before + 12345, os.SEEK_SET)
    moved = os.lseek(second.fileno(), 0, os.SEEK_CUR) == before + 12345
    os.lseek(first.fileno(), before, os.SEEK_SET)
    return moved and os.path.sameopenfile(first.fileno(), second.fileno())


def pipe_files(mode: str = "rb", **options: Any) -> tuple[IO[Any], IO[bytes]]:
    """Return both ends of a pipe: the reading one opened as asked for, the writing one unbuffered."""
    reader, writer = os.pipe()
    return open(reader, mode, **options), open(writer, "wb", buffering=0)
