"""The protocol of docs/wire.md, spoken by a program in C that knows nothing but that page."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from c_programs import CPrograms, compiled_programs
from helpers import LARGE, TRANSPORTS

from fdshare import BytesCodec, Channel, Listener, any_user, connect, hello, wait, wire
from fdshare.testing import pattern

__all__ = ["compiled_programs"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_text("what the file holds\n")
    return found


def exchange(channel: Channel, codec: Any, file: Path) -> None:
    """Take the C program's message, and answer in all sizes, with a descriptor each and without."""
    text, handles = channel.recv(timeout=20)
    (handle,) = handles if isinstance(handles, list) else [handles]
    assert text == (b"from C" if codec else "from C")
    assert handle.kind == "file"
    with handle.to_file("r") as received:
        assert received.read() == "what the file holds\n"
    for size in (0, 5, 50_000, LARGE):
        content = pattern(size) if size != 5 else b"words"
        with file.open("rb") as opened:
            channel.send((content, [opened] if codec else opened))
        channel.send(content)


def expected_output(codec: Any) -> str:
    """What the program prints; the sizes of pickles are none of its business."""
    lines = []
    for size in (0, 5, 50_000, LARGE):
        shown = [{0: "", 5: "words"}[size]] if codec and size < 100 else []
        lines += [f"{size} 1", *shown, "what the file holds", f"{size} 0", *shown]
    return "\n".join(lines) + "\n"


def check_output(out: str, codec: Any) -> None:
    if codec:
        assert out == expected_output(codec)
    else:
        assert re.sub(r"^\d+ ", "N ", out, flags=re.MULTILINE) == "N 1\nwhat the file holds\nN 0\n" * 4


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("codec", [BytesCodec(), None], ids=["bytes", "pickle"])
def test_c_client(c_programs: CPrograms, path: str, file: Path, transport: str, codec: Any) -> None:
    name = "bytes" if codec else "pickle"
    with (
        Listener(path, transport=transport, codec=codec) as listener,
        c_programs.start("fdshare_peer", f"connect:{transport}:{path}", name, "from C", file) as program,
    ):
        with listener.accept(20) as channel:
            assert channel.peer.pid == program.pid
            exchange(channel, codec, file)
        check_output(program.finish()[0], codec)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("codec", [BytesCodec(), None], ids=["bytes", "pickle"])
def test_c_server(c_programs: CPrograms, path: str, file: Path, transport: str, codec: Any) -> None:
    name = "bytes" if codec else "pickle"
    with c_programs.start("fdshare_peer", f"listen:{transport}:{path}", name, "from C", file) as program:
        program.wait_for_line("listening")
        with connect(path, transport=transport, codec=codec) as channel:
            exchange(channel, codec, file)
        check_output(program.finish()[0], codec)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_c_client_of_another_codec(c_programs: CPrograms, path: str, file: Path, transport: str) -> None:
    with (
        Listener(path, transport=transport) as listener,
        c_programs.start("fdshare_peer", f"connect:{transport}:{path}", "bytes", "from C", file) as program,
    ):
        channel = listener.accept(20)
        with pytest.raises(OSError, match="same codec"):
            channel.recv(timeout=20)
        assert program.finish(status=4)[1] == "the peer speaks versions 1 to 1, codec pickle"


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_c_client_that_is_refused(c_programs: CPrograms, path: str, file: Path, transport: str) -> None:
    with (
        Listener(path, transport=transport, allow=lambda peer: not any_user(peer)) as listener,
        c_programs.start("fdshare_peer", f"connect:{transport}:{path}", "bytes", "x", file) as program,
    ):
        assert wait([listener], 20)
        with pytest.raises(TimeoutError):
            listener.accept(0.0)
        assert "refused: uid" in program.finish(status=3)[1]


# the page says what the code does


def test_page_has_the_numbers_of_the_code() -> None:
    page = (ROOT / "docs" / "wire.md").read_text()
    for constant in (
        wire.HEADER_SIZE,
        hello.HELLO_SIZE,
        wire.MAX_INLINE,
        wire.ALWAYS_INLINE,
        wire.MAX_FDS_PER_PACKET,
        wire.MAX_DESCRIPTORS,
        wire.MAX_BUFFERS,
        wire.PAGE,
    ):
        assert re.search(rf"\b{constant:,}\b", page), constant
    for name in ("MESSAGE", "BYTES", "NOTICE", "SEGMENT", "BUNDLE", "IN_SEGMENT", "FILE", "LEASED"):
        assert re.search(rf"\| {getattr(wire, name)} \| `{name}` \|", page), name
    assert re.search(rf"\| {hello.HELLO} \| `HELLO` \|", page)
    assert re.search(rf"\| {hello.REFUSED} \| `REFUSED` \|", page)


def test_page_has_the_layouts_of_the_code() -> None:
    """Offsets and sizes of every field, added up."""
    page = (ROOT / "docs" / "wire.md").read_text()
    for layout, begin in ((hello._LAYOUT, "hello"), (wire._LAYOUT, "header")):
        table = page.split(f"<!-- {begin} -->")[1].split("<!--")[0]
        rows = [tuple(map(int, row)) for row in re.findall(r"^\| (\d+) \| (\d+) \|", table, re.MULTILINE)]
        offset = 0
        for at, size in rows:
            assert at == offset
            offset += size
        assert offset == layout.size
        assert struct.calcsize(layout.format) == layout.size


def test_page_has_a_packet_byte_by_byte() -> None:
    """The examples in hexadecimal are what the code makes."""
    page = (ROOT / "docs" / "wire.md").read_text()
    examples = ["".join(block.split()) for block in re.findall(r"```text hex\n(.*?)```", page, re.DOTALL)]
    assert hello.Hello("bytes").data.hex() in examples
    assert hello.pack_refusal("no").hex() in examples
    packet = wire.pack(wire.MESSAGE, descriptors=1, payload_size=5, nonce=1) + b"hello"
    assert packet.hex() in examples
    assert wire.notice_of(packet).hex() in examples
