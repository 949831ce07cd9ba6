"""What the generations say to each other, as bytes: plain values, and pickles that nobody loads unasked."""

from __future__ import annotations

import os
import pickle
import struct
from typing import Any, ClassVar

import pytest

from fdshare import DecodeError, FdHandle, MessageTooLargeError, NotSendableError
from fdshare.codec import Incoming
from fdshare.handle import Handles
from fdshare.handover import spoken
from fdshare.handover.spoken import OF_SUCCESSORS, Pickle, Pickled


def over(kind: str, **fields: Any) -> spoken.Message:
    """Encode a message and decode it, with duplicates of its descriptors in between, as the kernel makes them."""
    out = OF_SUCCESSORS.encode((kind, fields))
    handles = Handles(map(FdHandle.dup, out.fds))
    out.failed()
    return OF_SUCCESSORS.decode(Incoming(b"".join(out.payload), handles, out.buffers))


def test_plain_values_and_descriptors_arrive() -> None:
    with open(os.devnull) as file, FdHandle.dup(file) as handle:
        kind, fields = over("offer", path="/caf\udce9", listeners={"http": ({"port": 1}, handle)}, none=None)
        assert kind == "offer"
        assert fields["path"] == "/caf\udce9"
        assert fields["none"] is None
        spec, received = fields["listeners"]["http"]
        with received:
            assert spec == {"port": 1}
            assert os.fstat(received.fileno()).st_rdev == os.fstat(file.fileno()).st_rdev


def test_a_pickle_is_loaded_when_it_is_asked_for() -> None:
    with open(os.devnull) as file, FdHandle.dup(file) as handle:
        value = {"file": file, "big": bytes(200_000)}
        _, fields = over("value", handle=handle, value=Pickle(value))
        fields["handle"].close()
        loaded = fields["value"].load()
        with loaded["file"]:
            assert loaded["big"] == value["big"]
            assert os.path.samestat(os.fstat(loaded["file"].fileno()), os.fstat(file.fileno()))


class Telling:
    """Says so when it is unpickled."""

    told: ClassVar[list[int]] = []

    def __reduce__(self) -> tuple[object, ...]:
        return Telling.told.append, (1,)


def test_a_pickle_that_nobody_asks_for_is_not_loaded() -> None:
    Telling.told.clear()
    with FdHandle.dup(0) as handle:
        _, fields = over("value", value=Pickle((Telling(), handle)))
        assert isinstance(fields["value"], Pickled)
        fields["value"].close()
    assert Telling.told == []


@pytest.mark.parametrize("value", [b"bytes", {1}, object(), 1j])
def test_what_is_not_plain_is_not_said(value: object) -> None:
    with pytest.raises(TypeError, match="no plain value"):
        over("offer", value=value)


def test_what_cannot_be_pickled_is_told_so() -> None:
    with pytest.raises(NotSendableError):
        over("value", value=Pickle(iter(os.walk("/"))))
    with pytest.raises(TypeError, match="no plain value"):
        over("value", one=Pickle(1), two=Pickle(2))


def test_too_much_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spoken, "MAX_TEXT", 1000)
    with pytest.raises(MessageTooLargeError, match="MAX_TEXT is 1000"):
        over("offer", value="x" * 1000)


def payload(text: bytes, size: int | None = None, descriptors: int = 0, rest: bytes = b"") -> bytes:
    return struct.pack("<II", len(text) if size is None else size, descriptors) + text + rest


@pytest.mark.parametrize(
    ("data", "handles"),
    [
        (b"", 0),
        (b"\x80\x05N.", 0),
        (pickle.dumps(("offer", {})), 0),
        (payload(b'["offer",{}]', size=2**32 - 1), 0),
        (payload(b'["offer",{}]', descriptors=2**32 - 1), 1),
        (payload(b'["offer",{}]', descriptors=1), 1),
        (payload(b'["offer",{}]'), 1),
        (payload(b'["offer",{}]', rest=b"x"), 0),
        (payload(b'["offer",{"a":{"$fd":0}}]'), 1),
        (payload(b'["offer",{"a":{"$fd":0},"b":{"$fd":0}}]', descriptors=1), 1),
        (payload(b'["offer",{"a":{"$fd":[]}}]', descriptors=1), 1),
        (payload(b'["offer",{"a":{"$fd":-1}}]', descriptors=1), 2),
        (payload(b'["offer",{"a":{"$pickle":0},"b":{"$pickle":0}}]', rest=b"N."), 1),
        (payload(b'{"$pickle":0}', rest=b"N."), 1),
        (payload(b'["offer"]'), 0),
        (payload(b'["offer",[]]'), 0),
        (payload(b"[1,{}]"), 0),
        (payload(b'["offer",{},1]'), 0),
        (payload(b"\xff"), 0),
        (payload(b"[" * 100_000), 0),
        (payload(b"1" * 10_000), 0),
    ],
)
def test_what_is_no_message_is_refused_and_its_descriptors_are_closed(data: bytes, handles: int) -> None:
    with pytest.raises(DecodeError, match="not a message of a handover"):
        OF_SUCCESSORS.decode(Incoming(data, Handles(FdHandle.dup(0) for _ in range(handles))))
