"""Message classes that several tests of TypedCodec share; annotations are strings here."""

from __future__ import annotations

import enum
import io
import socket
from typing import IO, Annotated, BinaryIO, Literal, NewType, TextIO

import attrs

from fdshare import Channel, Descriptor, FdHandle, TypedCodec

Port = NewType("Port", int)


class Color(enum.Enum):
    """Members whose values could not travel themselves."""

    RED = "r"
    BLUE = object()


class Mode(enum.Flag):
    READ = 1
    WRITE = 2


@attrs.frozen
class Point:
    x: int
    y: float


@attrs.define
class Everything:
    """A field of each sort that is no descriptor."""

    yes: bool = True
    count: int = 0
    ratio: float = 0.5
    text: str = ""
    data: bytes = b""
    nothing: None = None
    maybe: str | None = None
    color: Color = Color.RED
    mode: Mode = Mode.READ
    verb: Literal["get", "put", 3] = "get"
    numbers: list[int] = attrs.field(factory=list)
    names: tuple[str, ...] = ()
    pair: tuple[int, str] = (0, "")
    tags: set[str] = attrs.field(factory=set)
    fixed: frozenset[int] = frozenset()
    table: dict[str, list[Point]] = attrs.field(factory=dict)
    places: dict[tuple[int, int], bytes] = attrs.field(factory=dict)
    either: int | str | list[bytes] | None = None
    point: Point | None = None
    port: Port = Port(0)


@attrs.define(kw_only=True)
class Private:
    """Names that __init__ takes under another one, and a field that it does not take."""

    _secret: str
    derived: str = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.derived = self._secret.upper()


@attrs.define
class Tree:
    """A class that holds itself."""

    name: str
    children: list[Tree] = attrs.field(factory=list)
    next: Tree | None = None


@attrs.define
class Positive:
    """A class that checks itself."""

    value: int = attrs.field(validator=attrs.validators.gt(0))


@attrs.define
class Empty:
    pass


@attrs.define
class Handles:
    one: FdHandle | None = None
    many: list[FdHandle] = attrs.field(factory=list)


@attrs.define
class Files:
    binary: BinaryIO | None = None
    io_bytes: IO[bytes] | None = None
    reader: io.BufferedReader | None = None
    writer: io.BufferedWriter | None = None
    random: io.BufferedRandom | None = None
    raw: io.FileIO | None = None
    text: TextIO | None = None
    io_text: IO[str] | None = None
    wrapper: io.TextIOWrapper | None = None


@attrs.define
class Sockets:
    sock: socket.socket | None = None
    channel: Channel | None = None


@attrs.define
class Declared:
    """Fields that say more."""

    read_only: Annotated[FdHandle, Descriptor(kinds={"file"}, access="r")] | None = None
    directory: Annotated[FdHandle, Descriptor(kinds={"directory"})] | None = None
    anything: Annotated[FdHandle, Descriptor(directories=True)] | None = None
    path: Annotated[FdHandle, Descriptor(access="path", directories=True)] | None = None
    pipe: Annotated[BinaryIO, Descriptor(kinds={"pipe"}, access="r")] | None = None
    latin: Annotated[TextIO, Descriptor(encoding="latin-1", newline="")] | None = None
    tcp: (
        Annotated[socket.socket, Descriptor(families={socket.AF_INET}, types={socket.SOCK_STREAM})] | None
    ) = None
    inbox: Annotated[Channel, Descriptor(access="r")] | None = None


VALUES = TypedCodec(Everything, Point, Private, Tree, Positive, Empty)
DESCRIPTORS = TypedCodec(Handles, Files, Sockets, Declared)
