"""What ``fdshare recv`` does with what arrived: finds the descriptors in a message, tells of them, copies them, hands them on.

A command that takes them over is started as a service manager starts a service (sd_listen_fds(3)): descriptors from 3
on, ``LISTEN_FDS`` their number, ``LISTEN_PID`` the process they are for, ``LISTEN_FDNAMES`` their names with colons between.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import reprlib
import resource
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from typing import Any, NoReturn

import attrs

from fdshare.addresses import FIRST_LISTEN_FD
from fdshare.command.descriptors import Descriptor, by_fstat, by_proc
from fdshare.command.ls import as_json, columns, counted, describe, printable
from fdshare.credentials import PeerCredentials
from fdshare.files import ReadAhead
from fdshare.handle import HasFileno, own

__all__ = ["Arrival", "Item", "copy_all", "find_items", "hand_over_to", "is_plain", "shortened", "tell"]

MAX_DEPTH = 20
"""How deep a message is searched for descriptors: deeper than anybody writes by hand, less than Python's own limit."""


@attrs.frozen
class Item:
    """Something with a descriptor in a message: where it was, and the thing, which still owns the descriptor."""

    name: str
    thing: HasFileno


@attrs.frozen
class Arrival:
    """One message: its number from 1 on, from whom, its items, and what else there is to tell of it, if anything."""

    number: int
    peer: PeerCredentials
    items: list[Item]
    text: str = ""


# --- what is in it -----------------------------------------------------------------------------------------------------


def find_items(message: object) -> list[Item]:
    """Return whatever has a descriptor anywhere in a message, in its order, each once; closed things have none."""
    return list(_items(message, (), set(), MAX_DEPTH))


def _items(obj: Any, path: tuple[str, ...], seen: set[int], depth: int) -> Iterator[Item]:
    if id(obj) in seen or depth == 0 or isinstance(obj, str | bytes | bytearray | int | float | None):
        return
    seen.add(id(obj))
    if callable(getattr(obj, "fileno", None)):
        with suppress(OSError, ValueError, TypeError):
            obj.fileno()
            yield Item(".".join(path) or "message", obj)
        return
    for name, part in _parts(obj):
        yield from _items(part, (*path, name), seen, depth - 1)


def _parts(obj: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(obj, Mapping):
        return [(str(key), value) for key, value in obj.items()]
    if isinstance(obj, Sequence | Set):
        return [(str(n), value) for n, value in enumerate(obj)]
    if attrs.has(type(obj)):
        return [(field.name, getattr(obj, field.name, None)) for field in attrs.fields(type(obj))]
    return list(getattr(obj, "__dict__", {}).items())


def is_plain(message: object) -> bool:
    """Whether a message is what ``fdshare send`` sends: names, and things with a descriptor."""
    return isinstance(message, dict) and all(
        isinstance(name, str) and hasattr(thing, "fileno") for name, thing in message.items()
    )


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxdict = _short.maxlist = _short.maxtuple = _short.maxset = 8


def shortened(message: object) -> str:
    """Return a message as a line that is not too long."""
    return _short.repr(message)


# --- telling --------------------------------------------------------------------------------------------------------------

HEAD = ("NAME", "KIND", "ACCESS", "OFFSET", "SIZE", "FLAGS", "WHAT")


def _described(items: Sequence[Item]) -> list[Descriptor]:
    fds = [item.thing.fileno() for item in items]
    read: Callable[[Iterable[int]], list[Descriptor]] = by_fstat
    if os.path.isdir("/proc/self/fd"):
        read = lambda numbers: by_proc(os.getpid(), numbers)  # noqa: E731
    found = {one.fd: one for one in read(set(fds))}
    # Close-on-exec is how they were received, and says nothing of them.
    return [
        attrs.evolve(found[fd], flags=tuple(flag for flag in found[fd].flags if flag != "cloexec"))
        for fd in fds
    ]


def tell(arrival: Arrival, *, as_json_text: bool) -> None:
    """Print what arrived: a table for people, or a line of JSON."""
    found = _described(arrival.items)
    if as_json_text:
        told = [{"item": item.name, **as_json(one)} for item, one in zip(arrival.items, found, strict=True)]
        peer = {"pid": arrival.peer.pid, "uid": arrival.peer.uid, "gid": arrival.peer.gid}
        whole = {"message": arrival.number, "peer": peer, "text": arrival.text, "descriptors": told}
        print(json.dumps(whole), flush=True)
        return
    count = counted(len(found), "descriptor")
    print(f"message {arrival.number} from pid {arrival.peer.pid} of uid {arrival.peer.uid}: {count}")
    if arrival.text:
        print(f"  {printable(arrival.text)}")
    rows = [
        (
            printable(item.name),
            one.kind,
            one.access,
            "" if one.offset is None else str(one.offset),
            "" if one.size is None else str(one.size),
            ",".join(one.flags),
            describe(one),
        )
        for item, one in zip(arrival.items, found, strict=True)
    ]
    if rows:
        for line in columns([HEAD, *rows], right=(3, 4)):
            print(f"  {line}")
    sys.stdout.flush()


# --- copying --------------------------------------------------------------------------------------------------------------

CHUNK = 1 << 20
"""Bytes read at once: a pipe holds no more, and a file is read about as fast as by larger pieces."""


def copy_all(arrival: Arrival) -> None:
    """Copy what each item has to read to the standard output, one after the other.

    Raises:
        OSError: it cannot be read (a directory, write-only), or not be written.
    """
    sys.stdout.flush()
    for item in arrival.items:
        try:
            chunks = _chunks(item.thing)
            for chunk in chunks:
                _write_all(sys.stdout.fileno(), chunk)
        except _CannotRead as error:
            raise OSError(errno.EINVAL, f"{printable(item.name)} cannot be read: {error}") from error


class _CannotRead(Exception):
    """What is to be copied does not let itself be read; a failure to write is another matter."""


def _chunks(thing: Any) -> Iterator[bytes]:
    """Yield what can be read from a thing, to its end, waiting for it where it does not block."""
    if ahead := _read_ahead(thing):
        yield ahead
    fd = thing.fileno()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        try:
            chunk = os.read(fd, CHUNK)
        except BlockingIOError:
            poll.poll()
            continue
        except OSError as error:
            raise _CannotRead(_WHY_NOT.get(error.errno or 0, error.strerror)) from error
        if not chunk:
            return
        yield chunk


_WHY_NOT = {errno.EBADF: "it is not open for reading", errno.EISDIR: "it is a directory"}


def _read_ahead(thing: Any) -> bytes:
    """Return what the sender had read of a stream and sent along: it comes before what the descriptor has."""
    raw = getattr(getattr(thing, "buffer", thing), "raw", None)
    return raw.ahead if isinstance(raw, ReadAhead) else b""


def _write_all(fd: int, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # the standard output is a pipe that somebody else has made so
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()


# --- handing on -----------------------------------------------------------------------------------------------------------

NOT_EXECUTABLE, NOT_FOUND = 126, 127
"""Exit codes of a command that cannot be started, as of a shell or env(1)."""

MAX_NAME = 255
"""Characters of a name in LISTEN_FDNAMES (sd_pid_notify_with_fds(3), FDNAME)."""


ROOM = 256
"""Descriptors that a command may open beside those that it is given, even where its soft limit is as low as their number."""


def listen_name(name: str) -> str:
    """Return the name of an item as it may stand in LISTEN_FDNAMES: the last part of a path; ASCII, without colons."""
    last = os.path.basename(name.rstrip("/")) or name
    text = "".join(char if " " <= char <= "~" and char != ":" else "_" for char in last)
    return text[:MAX_NAME] or "unknown"


def _at_least(soft: int, wanted: int, hard: int) -> int:
    infinite = resource.RLIM_INFINITY  # -1
    if soft == infinite or soft >= wanted:
        return soft
    return wanted if hard == infinite else min(wanted, hard)


def hand_over_to(command: Sequence[str], items: Sequence[Item], limits: tuple[int, int]) -> NoReturn:
    """Become ``command``, which inherits the items' descriptors.

    Args:
        limits: the soft and hard limit of descriptors that it is to have; the soft one is raised where the descriptors would
            leave it no room.

    Raises:
        OSError: it cannot be started, or there is no room for the descriptors.
    """
    first, count = FIRST_LISTEN_FD, len(items)
    for item in items:
        if _read_ahead(item.thing):
            name = printable(item.name)
            raise OSError(
                errno.EINVAL, f"the sender had read ahead of {name}, which cannot be inherited: use --cat"
            )
    # Out of the way first: a descriptor may have the number that belongs to another one.
    copies = [own(fcntl.fcntl, item.thing.fileno(), fcntl.F_DUPFD_CLOEXEC, first + count) for item in items]
    for number, copy in enumerate(copies, first):
        os.dup2(copy.fileno(), number, inheritable=True)
    environment = {
        **os.environ,
        "LISTEN_FDS": str(count),
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDNAMES": ":".join(listen_name(item.name) for item in items),
    }
    for name in ("SIGPIPE", "SIGXFSZ"):  # ignored by Python, and what is ignored stays so
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    environment.pop("LISTEN_PIDFDID", None)  # of who started this process; it would not fit
    soft, hard = limits
    resource.setrlimit(resource.RLIMIT_NOFILE, (_at_least(soft, first + count + ROOM, hard), hard))
    os.execvpe(command[0], list(command), environment)
