"""Descriptors as fields of typed messages: what arrives, what is refused on which side, what moves and what is closed."""

import contextlib
import io
import os
import resource
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TextIO

import attrs
import pytest
from helpers import LARGE, TRANSPORTS
from typed_messages import DESCRIPTORS, Declared, Empty, Files, Handles, Sockets

from fdshare import (
    Channel,
    DecodeError,
    Descriptor,
    FdHandle,
    FdLimitError,
    MessageTooLargeError,
    NotSendableError,
    PeerClosedError,
    Pipe,
    TypedCodec,
    move,
)
from fdshare.codec import Incoming, Outgoing
from fdshare.testing import numbered_handle, read_number

Pair = tuple[Channel, Channel]


@pytest.fixture(params=TRANSPORTS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    here, there = Pipe(codec=DESCRIPTORS, transport=request.param)
    with here, there:
        yield here, there


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(b"first\nsecond\nthird\n")
    return found


def carry(pair: Pair, message: Any) -> Any:
    here, there = pair
    here.send(message, timeout=10)
    return there.recv(timeout=10)


def close_all(message: Any) -> None:
    """Close whatever a received message holds."""
    for field in attrs.fields(type(message)):
        value = getattr(message, field.name)
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                item.close()


# --- what arrives -----------------------------------------------------------------------------------------------------


def test_handle_arrives(pair: Pair) -> None:
    with numbered_handle(5) as handle:
        arrived = carry(pair, Handles(handle))
        with arrived.one as one:
            assert type(one) is FdHandle
            assert one.fileno() != handle.fileno()
            assert not os.get_inheritable(one.fileno())
            assert read_number(one) == 5  # and closes it


@pytest.mark.parametrize("count", [0, 1, 3, 253])
def test_many_handles_arrive_in_order(pair: Pair, count: int) -> None:
    with ExitStack() as stack:
        handles = [stack.enter_context(numbered_handle(i)) for i in range(count)]
        arrived = [stack.enter_context(handle) for handle in carry(pair, Handles(many=handles)).many]
        assert [read_number(handle) for handle in arrived] == list(range(count))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_more_than_a_packet_takes_arrive_where_the_bound_allows_it(transport: str) -> None:
    here, there = Pipe(codec=TypedCodec(Handles, max_fds=1000), transport=transport)
    with here, there, ExitStack() as stack:
        handles = [stack.enter_context(numbered_handle(i)) for i in range(600)]
        arrived = [stack.enter_context(handle) for handle in carry((here, there), Handles(many=handles)).many]
        assert [read_number(handle) for handle in arrived] == list(range(600))


@attrs.define
class Labelled:
    text: bytes
    handles: list[FdHandle]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_descriptors_beside_a_large_payload(transport: str) -> None:
    here, there = Pipe(codec=TypedCodec(Labelled), transport=transport)
    with here, there, ExitStack() as stack:
        handles = [stack.enter_context(numbered_handle(i)) for i in range(3)]
        arrived = carry((here, there), Labelled(bytes(LARGE), handles))
        assert arrived.text == bytes(LARGE)
        assert [read_number(stack.enter_context(handle)) for handle in arrived.handles] == [0, 1, 2]


@pytest.mark.parametrize("field", ["binary", "io_bytes", "reader"])
def test_reader_arrives_at_its_position(pair: Pair, path: Path, field: str) -> None:
    with path.open("rb") as file:
        assert file.readline() == b"first\n"  # which has read ahead to the end
        arrived = carry(pair, Files(**{field: file}))
        with getattr(arrived, field) as other:
            assert type(other) is io.BufferedReader
            assert other.readline() == b"second\n"
            assert other.tell() == 13
            assert (
                os.lseek(file.fileno(), 0, os.SEEK_CUR) == 19
            )  # what the other has read ahead is gone here: one offset


@pytest.mark.parametrize("field", ["binary", "io_bytes", "writer"])
def test_writer_arrives_and_was_flushed(pair: Pair, path: Path, field: str) -> None:
    with path.open("wb") as file:
        file.write(b"one ")
        arrived = carry(pair, Files(**{field: file}))
        with getattr(arrived, field) as other:
            assert type(other) is io.BufferedWriter
            other.write(b"two")
    assert path.read_bytes() == b"one two"


def test_random_and_raw_arrive(pair: Pair, path: Path) -> None:
    with path.open("r+b") as file, path.open("rb", buffering=0) as raw:
        file.seek(6)
        raw.seek(13)
        arrived = carry(pair, Files(binary=file, random=file, raw=raw))
        assert type(arrived.binary) is type(arrived.random) is io.BufferedRandom
        assert type(arrived.raw) is io.FileIO
        assert arrived.random.readline() == b"second\n"
        assert arrived.raw.read() == b"third\n"
        close_all(arrived)


@pytest.mark.parametrize("field", ["text", "io_text", "wrapper"])
@pytest.mark.parametrize("mode", ["r", "w", "r+"])
def test_text_arrives(pair: Pair, path: Path, field: str, mode: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        if mode == "w":
            file.write("é")
        else:
            assert file.readline() == "first\n"
        arrived = carry(pair, Files(**{field: file}))
        with getattr(arrived, field) as other:
            assert type(other) is io.TextIOWrapper
            assert other.encoding == "utf-8"
            if mode == "w":
                other.write("ü")
            else:
                assert other.readline() == "second\n"
    if mode == "w":
        assert path.read_text("utf-8") == "éü"


def test_declared_text_arrives(pair: Pair, path: Path) -> None:
    path.write_bytes(b"caf\xe9\r\n")
    with path.open(encoding="latin-1", newline="") as file, carry(pair, Declared(latin=file)).latin as other:
        assert other.read() == "café\r\n"


def test_named_temporary_file_arrives_and_moves(pair: Pair) -> None:
    with tempfile.NamedTemporaryFile() as temporary:
        temporary.write(b"kept")
        temporary.seek(0)
        with carry(pair, Files(binary=temporary)).binary as other:  # type: ignore[arg-type]  # the stubs know no better
            assert other.read() == b"kept"
        with carry(pair, Files(binary=move(temporary))).binary:  # type: ignore[arg-type]  # move(x) stands for x
            assert temporary.closed
            assert not os.path.exists(temporary.name)


def test_sockets_arrive(pair: Pair) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.create_connection(listener.getsockname()) as client:
        with carry(pair, Sockets(client)).sock as other:
            assert (other.family, other.type) == (socket.AF_INET, socket.SOCK_STREAM)
            assert other.getsockname() == client.getsockname()
        with carry(pair, Declared(tcp=listener)).tcp as other, other.accept()[0]:
            pass


def test_channel_arrives_with_the_typed_codec(pair: Pair) -> None:
    """Never with pickles, whoever sends it."""
    ours, theirs = Pipe(codec=DESCRIPTORS)
    with ours, theirs, carry(pair, Sockets(channel=theirs)).channel as other:
        assert type(other) is Channel
        ours.send(Handles())
        assert other.recv(timeout=10) == Handles()
        with pytest.raises(NotSendableError):
            other.send({"a": "pickle"})


def test_one_way_channel_arrives_as_declared(pair: Pair) -> None:
    reader, writer = Pipe(duplex=False, codec=DESCRIPTORS)
    with reader, writer, carry(pair, Declared(inbox=reader)).inbox as other:
        assert (other.readable, other.writable) == (True, False)
        writer.send(Handles())
        assert other.recv(timeout=10) == Handles()
    here, there = Pipe(codec=DESCRIPTORS)
    with here, there, pytest.raises(NotSendableError, match="declared for 'r'"):
        pair[0].send(Declared(inbox=here))


@attrs.define
class Other:
    channel: Annotated[Channel, Descriptor(codec=DESCRIPTORS)]


def test_channel_of_a_declared_codec(pair: Pair) -> None:
    here, there = Pipe(codec=TypedCodec(Other))
    ours, theirs = Pipe(codec=DESCRIPTORS)
    with here, there, ours, theirs, carry((here, there), Other(theirs)).channel as other:
        ours.send(Handles())
        assert other.recv(timeout=10) == Handles()


def test_pipe_arrives_where_declared(pair: Pair) -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as file, open(writer, "wb") as source:
        source.write(b"through")
        source.close()
        with carry(pair, Declared(pipe=file)).pipe as other:
            assert other.read() == b"through"


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="O_PATH is of Linux")
def test_path_descriptor_arrives_where_declared(pair: Pair, tmp_path: Path) -> None:
    with FdHandle(os.open(tmp_path, os.O_PATH)) as handle:
        with carry(pair, Declared(path=handle)).path as other:
            assert other.kind == "directory"
        for field in ("anything", "directory"):
            with pytest.raises(NotSendableError, match="O_PATH"):
                pair[0].send(Declared(**{field: handle}))
    with (
        FdHandle(os.open(tmp_path, os.O_RDONLY)) as handle,
        pytest.raises(NotSendableError, match="not of O_PATH"),
    ):
        pair[0].send(Declared(path=handle))


def test_directory_arrives_where_declared(pair: Pair, tmp_path: Path) -> None:
    with FdHandle(os.open(tmp_path, os.O_RDONLY)) as handle:
        for field in ("directory", "anything"):
            with getattr(carry(pair, Declared(**{field: handle})), field) as other:
                assert other.kind == "directory"
    with numbered_handle(3) as handle:
        with carry(pair, Declared(anything=handle)).anything as other:
            assert read_number(other) == 3
        with pytest.raises(NotSendableError, match="not directory"):
            pair[0].send(Declared(directory=handle))


@attrs.define
class Mixed:
    """Descriptors in containers and unions."""

    either: BinaryIO | TextIO | FdHandle | str
    named: dict[str, FdHandle] = attrs.field(factory=dict)
    pair: tuple[FdHandle, int] | None = None


def test_descriptors_in_containers_and_unions(path: Path) -> None:
    here, there = Pipe(codec=TypedCodec(Mixed))
    with (
        here,
        there,
        path.open("rb") as binary,
        path.open(encoding="utf-8") as text,
        numbered_handle(1) as handle,
    ):
        for value, cls in ((binary, io.BufferedReader), (text, io.TextIOWrapper), (handle, FdHandle)):
            with carry((here, there), Mixed(value)).either as arrived:
                assert type(arrived) is cls
        assert carry((here, there), Mixed("text")).either == "text"
        arrived = carry((here, there), Mixed("", {"a": handle, "b": handle}, (handle, 3)))
        assert arrived.named["a"] is arrived.named["b"] is arrived.pair[0]
        arrived.pair[0].close()
        with pytest.raises(NotSendableError) as info:
            here.send(Mixed("", {"a": binary}))  # type: ignore[dict-item]  # the point
        assert info.value.path == "message.named['a']"


def test_no_room_keeps_the_message_queued(pair: Pair) -> None:
    """As on any channel, where its descriptors are allowed."""
    here, there = pair
    with ExitStack() as stack:
        handles = [stack.enter_context(numbered_handle(i)) for i in range(8)]
        here.send(Handles(many=handles))
        highest = max(map(int, os.listdir("/dev/fd")))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, hard))
        try:
            filler = []
            with contextlib.suppress(OSError):
                while True:
                    filler.append(FdHandle.dup(0))
            for handle in filler[:2]:
                handle.close()
            for _ in range(2):
                with pytest.raises(FdLimitError):
                    there.recv(timeout=10)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for handle in filler:
                handle.close()
        arrived = [stack.enter_context(handle) for handle in there.recv(timeout=10).many]
        assert [read_number(handle) for handle in arrived] == list(range(8))


# --- identity, moves, closing --------------------------------------------------------------------------------------------


def test_same_object_twice_is_sent_once(pair: Pair, path: Path) -> None:
    with numbered_handle(1) as handle, path.open("rb") as file:
        message = Handles(handle, [handle, handle])
        encoded = DESCRIPTORS.encode(message)
        assert isinstance(encoded, Outgoing)
        assert len(encoded.fds) == 1
        encoded.failed()
        arrived = carry(pair, message)
        assert arrived.one is arrived.many[0] is arrived.many[1]
        arrived.one.close()
        arrived = carry(pair, Files(binary=file, io_bytes=file))
        assert arrived.binary is arrived.io_bytes
        arrived.binary.close()


def test_move_closes_once_it_is_sent(pair: Pair, path: Path) -> None:
    handle, file = numbered_handle(1), path.open("rb")
    left, right = socket.socketpair()
    ours, theirs = Pipe(codec=DESCRIPTORS)
    with right, ours:
        for message, closed in (
            (Handles(move(handle)), lambda: handle.closed),  # type: ignore[arg-type]  # move(x) stands for x
            (move(Files(binary=file)), lambda: file.closed),
            (Sockets(move(left), move(theirs)), lambda: left.fileno() < 0 and theirs.closed),  # type: ignore[arg-type]  # so here
        ):
            close_all(carry(pair, message))
            assert closed()


def test_move_leaves_all_open_where_the_send_fails(pair: Pair, tmp_path: Path) -> None:
    with numbered_handle(1) as handle, FdHandle(os.open(tmp_path, os.O_RDONLY)) as directory:
        with pytest.raises(NotSendableError):
            pair[0].send(move(Handles(handle, [directory])))
        assert not handle.closed
        pair[1].close()
        with pytest.raises(PeerClosedError):
            pair[0].send(move(Handles(handle)))
        assert read_number(handle) == 1


def test_what_fails_later_closes_what_was_built(path: Path) -> None:
    """The class itself refuses, after its files and sockets were made; the leak check looks."""

    @attrs.define
    class Picky:
        binary: BinaryIO
        text: TextIO
        sock: socket.socket
        channel: Channel
        handle: FdHandle
        size: int = attrs.field(validator=attrs.validators.gt(0))

    codec = TypedCodec(Picky)
    with path.open("rb") as file, path.open() as text, numbered_handle(0) as handle:
        left, right = socket.socketpair()
        here, there = Pipe(codec=codec)
        with left, right, here, there:
            message = Picky(file, text, left, here, handle, 1)
            message_of_none = attrs.evolve(message)
            object.__setattr__(message_of_none, "size", 0)
            with attrs.validators.disabled():
                here.send(message_of_none)
            with pytest.raises(DecodeError, match="size"):
                there.recv(timeout=10)


# --- refused at the sender ------------------------------------------------------------------------------------------------


@contextmanager
def every_sort(path: Path) -> Iterator[dict[str, Any]]:
    """One object of each sort, by name."""
    with ExitStack() as stack:
        enter = stack.enter_context
        reader, writer = map(FdHandle, os.pipe())
        left, right = socket.socketpair()
        closed_file, closed_handle = path.open("rb"), numbered_handle(0)
        closed_file.close()
        closed_handle.close()
        own, other = Pipe()
        unread = enter(FdHandle.dup(reader).to_file("rb"))
        os.write(writer.fileno(), b"ahead of\nit")
        unread.readline()
        yield {
            "reader": enter(path.open("rb")),
            "writer": enter(path.open("ab")),
            "random": enter(path.open("r+b")),
            "raw": enter(path.open("rb", buffering=0)),
            "text": enter(path.open(encoding="utf-8")),
            "latin": enter(path.open(encoding="latin-1")),
            "null": enter(FdHandle(os.open("/dev/null", os.O_RDONLY)).to_file()),
            "handle": enter(numbered_handle(0)),
            "pipe": enter(reader),
            "pipe file": enter(FdHandle.dup(writer).to_file("wb")),
            "read ahead": unread,
            "write end": enter(writer),
            "directory": enter(FdHandle(os.open(path.parent, os.O_RDONLY))),
            "writable": enter(FdHandle(os.open(path, os.O_RDWR))),
            "unix socket": enter(left),
            "other unix socket": enter(right),
            "pickling channel": enter(own),
            "its other end": enter(other),
            "memory": io.BytesIO(b""),
            "closed file": closed_file,
            "closed handle": closed_handle,
            "number": 0,
        }


@pytest.mark.parametrize(
    ("field", "sort", "reason"),
    [
        ("binary", "null", "it is a device, not file"),
        ("binary", "pipe file", "it is a pipe, not file"),
        ("binary", "text", "expected"),
        ("binary", "memory", "expected"),
        ("binary", "handle", "expected"),
        ("binary", "closed file", "it is closed"),
        ("binary", "number", "expected"),
        ("reader", "random", "expected BufferedReader"),
        ("reader", "raw", "expected BufferedReader"),
        ("raw", "reader", "expected FileIO"),
        ("text", "latin", "it is in latin-1"),
        ("text", "reader", "expected TextIOWrapper"),
        ("one", "reader", "expected FdHandle"),
        ("one", "directory", "directory"),
        ("one", "closed handle", "it is closed"),
        ("one", "number", "expected FdHandle"),
        ("read_only", "writable", "open for 'rw', and declared for 'r'"),
        ("read_only", "pipe", "it is a pipe, not file"),
        ("read_only", "directory", "it is a directory"),
        ("directory", "handle", "it is a"),
        ("pipe", "read ahead", "read ahead"),
        ("pipe", "reader", "it is a file, not pipe"),
        ("pipe", "pipe file", "open for 'w', and declared for 'r'"),
        ("tcp", "unix socket", "family"),
        ("sock", "handle", "expected socket"),
        ("channel", "unix socket", "expected Channel"),
        ("channel", "pickling channel", "it speaks 'pickle'"),
    ],
)
def test_wrong_object_is_refused_at_the_sender(path: Path, field: str, sort: str, reason: str) -> None:
    cls = next(cls for cls in (Handles, Files, Sockets, Declared) if field in attrs.fields_dict(cls))
    with every_sort(path) as sorts, pytest.raises(NotSendableError) as info:
        DESCRIPTORS.encode(cls(**{field: sorts[sort]}))
    assert info.value.path == f"message.{field}"
    assert reason in str(info.value)


def test_number_closed_behind_its_owner_is_refused_at_the_sender() -> None:
    number = os.dup(0)
    handle = FdHandle(number)
    os.close(number)
    with pytest.raises(NotSendableError, match="Bad file descriptor"):
        DESCRIPTORS.encode(Handles(handle))
    handle.detach()


def test_allowance_of_the_sender() -> None:
    codec = TypedCodec(Handles, send_fds=2)
    with ExitStack() as stack:
        handles = [stack.enter_context(numbered_handle(i)) for i in range(3)]
        encoded = codec.encode(Handles(many=handles[:2]))
        assert isinstance(encoded, Outgoing)
        encoded.failed()
        with pytest.raises(MessageTooLargeError, match="send_fds is 2"):
            codec.encode(Handles(many=handles))
        with pytest.raises(MessageTooLargeError, match="send_fds is 0"):
            TypedCodec(Handles, max_fds=0).encode(Handles(handles[0]))


# --- refused on arrival: the sender lies -----------------------------------------------------------------------------------

LIE = {
    "one": ["Handles", 0, []],
    "two handles": ["Handles", 0, [1]],
    **{
        field.name: ["Files", *(0 if other is field else None for other in attrs.fields(Files))]
        for field in attrs.fields(Files)
    },
    "sock": ["Sockets", 0, None],
    "channel": ["Sockets", None, 0],
    **{
        field.name: ["Declared", *(0 if other is field else None for other in attrs.fields(Declared))]
        for field in attrs.fields(Declared)
    },
    "as two": ["Sockets", 0, 0],
    "none of them": ["Handles", None, []],
    "beyond": ["Handles", 2, []],
    "negative": ["Handles", -1, []],
    "huge": ["Handles", 2**64 - 1, []],
    "no number": ["Handles", "0", []],
    "no numbers": ["Handles", [0], []],
}


def receive_lie(lie: str, *sent: Any) -> Any:
    """Decode a message made by hand, with duplicates of the descriptors of ``sent``."""
    import msgspec

    handles = [FdHandle.dup(thing) for thing in sent]
    return DESCRIPTORS.decode(Incoming(msgspec.msgpack.encode(LIE[lie]), handles))  # type: ignore[arg-type]  # a converter


@pytest.mark.parametrize(
    ("lie", "sort", "reason"),
    [
        ("one", "directory", "directory"),
        ("two handles", "handle", "descriptor 1"),
        ("binary", "directory", "directory"),
        ("binary", "pipe", "it is a pipe"),
        ("binary", "null", "it is a device"),
        ("binary", "unix socket", "it is a socket"),
        ("reader", "writable", "open for 'rw'"),
        ("reader", "writer", "open for 'w'"),
        ("writer", "reader", "open for 'r'"),
        ("random", "reader", "open for 'r'"),
        ("text", "pipe", "it is a pipe"),
        ("raw", "null", "it is a device"),
        ("sock", "reader", "it is a file"),
        ("sock", "pipe", "it is a pipe"),
        ("channel", "handle", "not socket"),
        ("read_only", "writable", "open for 'rw'"),
        ("read_only", "writer", "open for 'w'"),
        ("read_only", "pipe", "it is a pipe"),
        ("read_only", "directory", "it is a directory"),
        ("directory", "reader", "it is a file"),
        ("path", "reader", "not of O_PATH"),
        ("pipe", "reader", "it is a file"),
        ("pipe", "write end", "open for 'w'"),
        ("tcp", "unix socket", "family"),
        ("as two", "unix socket", "stands for both"),
        ("none of them", "handle", "no field"),
        ("beyond", "handle", "descriptor 2"),
        ("negative", "handle", "descriptor -1"),
        ("huge", "handle", "descriptor"),
        ("no number", "handle", "int"),
        ("no numbers", "handle", "int"),
    ],
)
def test_lie_is_a_decode_error_and_closes_all(path: Path, lie: str, sort: str, reason: str) -> None:
    with every_sort(path) as sorts, pytest.raises(DecodeError, match=reason):
        receive_lie(lie, sorts[sort])


def test_raw_file_is_closed_where_the_rest_fails(path: Path) -> None:
    """And one that could not be closed would not keep the others open."""
    with every_sort(path) as sorts, pytest.raises(DecodeError, match="no field"):
        receive_lie("raw", sorts["reader"], sorts["reader"])


def test_descriptor_that_no_field_holds_is_refused(path: Path) -> None:
    with every_sort(path) as sorts:
        with pytest.raises(DecodeError, match="2 descriptors that no field"):
            receive_lie("one", sorts["handle"], sorts["reader"], sorts["reader"])
        receive_lie("one", sorts["handle"]).one.close()


@pytest.mark.skipif(not hasattr(os, "O_PATH"), reason="O_PATH is of Linux")
def test_path_descriptor_is_refused_unless_declared(path: Path) -> None:
    with FdHandle(os.open(path, os.O_PATH)) as handle:
        for lie in ("one", "binary", "read_only", "anything", "sock"):
            with pytest.raises(DecodeError, match="O_PATH"):
                receive_lie(lie, handle)


def test_fifo_in_place_of_a_file_blocks_nobody(tmp_path: Path) -> None:
    """Its reader would wait for a writer that never comes."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with FdHandle(os.open(fifo, os.O_RDWR)) as handle:
        for lie in ("binary", "text", "read_only", "reader"):
            with pytest.raises(DecodeError, match="pipe"):
                receive_lie(lie, handle)


def test_datagram_socket_as_a_channel_is_refused() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener = socket.create_server(("127.0.0.1", 0))
    with left, right, listener:
        with pytest.raises(DecodeError, match="SEQPACKET or STREAM"):
            receive_lie("channel", left)
        with pytest.raises(DecodeError, match="family"):
            receive_lie("channel", listener)


def test_no_check_changes_what_is_shared(path: Path) -> None:
    """Flags and offset belong to the sender too, whatever default timeout sockets have here."""
    left, right = socket.socketpair()
    with left, right, path.open("rb", buffering=0) as file:
        file.seek(3)
        socket.setdefaulttimeout(5)
        try:
            with receive_lie("sock", left).sock:
                assert left.getblocking()
                assert os.get_blocking(left.fileno())
            with pytest.raises(DecodeError):
                receive_lie("tcp", left)
            assert os.get_blocking(left.fileno())
            with receive_lie("binary", file).binary:
                assert file.tell() == 3
        finally:
            socket.setdefaulttimeout(None)


def test_memory_file_is_a_file(path: Path) -> None:
    if not hasattr(os, "memfd_create"):
        pytest.skip("no memory files here")
    with FdHandle(os.memfd_create("x")) as handle, receive_lie("random", handle).random as file:
        assert stat.S_ISREG(os.fstat(file.fileno()).st_mode)


# --- Descriptor ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (Annotated[int, Descriptor()], "goes with a file"),
        (Annotated[BinaryIO, Descriptor(access="path")], "O_PATH"),
        (Annotated[io.BufferedReader, Descriptor(access="w")], "is open for 'r'"),
        (Annotated[socket.socket, Descriptor(kinds={"file"})], "a socket is a socket"),
        (Annotated[BinaryIO, Descriptor(directories=True)], "say nothing"),
        (Annotated[BinaryIO, Descriptor(families={1})], "say nothing"),
    ],
)
def test_descriptor_that_makes_no_sense_is_refused_at_once(annotation: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        TypedCodec(attrs.make_class("Declared", {"field": attrs.field(type=annotation)}))


def test_unknown_access_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="access"):
        Descriptor(access="x")  # type: ignore[arg-type]  # the point


def test_name_says_what_descriptors_are() -> None:
    def name(annotation: Any) -> str:
        return TypedCodec(attrs.make_class("Declared", {"field": attrs.field(type=annotation)})).name

    annotations: list[Any] = [
        FdHandle,
        BinaryIO,
        TextIO,
        io.BufferedReader,
        socket.socket,
        Channel,
        Annotated[FdHandle, Descriptor(access="r")],
        Annotated[FdHandle, Descriptor(kinds={"file"})],
        Annotated[FdHandle, Descriptor(directories=True)],
        Annotated[TextIO, Descriptor(encoding="latin-1")],
    ]
    assert len(set(map(name, annotations))) == len(annotations)
    assert name(Annotated[FdHandle, Descriptor(kinds="file")]) == name(
        Annotated[FdHandle, Descriptor(kinds=["file"])]
    )


def test_channel_without_descriptor_fields_takes_none() -> None:
    codec = TypedCodec(Empty)
    assert codec.limits.max_fds == 0
    assert TypedCodec(Handles, recv_fds=7).limits.max_fds == 7
