"""``fdshare ls``: what a process has open, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import attrs

from fdshare.command.descriptors import Descriptor, Holder, command_of, read_descriptors
from fdshare.command.sockets import Socket

__all__ = ["as_json", "columns", "counted", "describe", "main", "printable", "row"]

HEAD = ("FD", "KIND", "ACCESS", "OFFSET", "SIZE", "FLAGS", "WHAT")

MAX_HOLDERS = 3
"""Holders of one other end that the table names; a server's socket may have one in each of its hundred workers."""


def main(pid: int | None, *, as_json_text: bool) -> int:
    """Print the descriptors of process ``pid``, None for those that this command was given by whoever started it.

    Raises:
        OSError: as :func:`read_descriptors`.
    """
    asked = os.getpid() if pid is None else pid
    found = read_descriptors(asked)
    command = command_of(asked)
    limit = soft_limit(asked)
    if as_json_text:
        told = [as_json(one) for one in found]
        print(json.dumps({"pid": asked, "command": command, "limit": limit, "descriptors": told}, indent=1))
        return 0
    bound = "" if limit is None else f", at most {limit}"
    print(f"process {asked} ({printable(command)}): {counted(len(found), 'descriptor')}{bound}")
    for line in columns([HEAD, *map(row, found)], right=(0, 3, 4)):
        print(line)
    return 0


def soft_limit(pid: int) -> int | None:
    """Return the most descriptors that a process may open (the soft limit); None where the system does not tell."""
    try:
        with open(f"/proc/{pid}/limits", encoding="utf-8", errors="replace") as limits:
            for line in limits:
                if line.startswith("Max open files"):
                    return int(line.split()[3])
    except (OSError, ValueError):  # "unlimited"
        return None
    return None


def as_json(one: Descriptor) -> dict[str, Any]:
    """Return a descriptor as what ``json`` takes; fields that mean nothing for its kind are null."""
    return attrs.asdict(one)


def row(one: Descriptor) -> tuple[str, ...]:
    """Return a descriptor as a line of the table."""
    return (
        str(one.fd),
        one.kind,
        one.access,
        "" if one.offset is None else str(one.offset),
        "" if one.size is None else str(one.size),
        ",".join(one.flags),
        describe(one),
    )


def describe(one: Descriptor) -> str:
    """Return in words what a descriptor is: its name, or its socket and the other end, and what else is known."""
    parts = [printable(one.name)] if one.name else []
    if one.socket is not None:
        parts.append(_describe_socket(one.socket))
    if one.peers:
        parts.append("other end: " + _describe_holders(one.peers))
    parts += [_describe_detail(name, value) for name, value in one.details.items()]
    return ", ".join(parts)


def _describe_socket(sock: Socket) -> str:
    words = [sock.family] if sock.family in ("tcp", "udp") or not sock.type else [sock.family, sock.type]
    if sock.local:
        words.append(printable(sock.local))
    if sock.remote:
        words += ["->", printable(sock.remote)]
    elif sock.state != "connected":
        words.append(sock.state)
    text = " ".join(words)
    if sock.state not in ("connected", "listening", "unconnected") and sock.remote:
        text += f" ({sock.state})"
    if sock.unread:
        text += (
            f", {counted(sock.unread, 'connection waiting' if sock.state == 'listening' else 'byte unread')}"
        )
    return text


def _describe_holders(holders: Sequence[Holder]) -> str:
    named = [f"pid {one.pid} ({printable(one.command)}) fd {one.fd}" for one in holders[:MAX_HOLDERS]]
    more = len(holders) - MAX_HOLDERS
    return " and ".join(named) + (f" and {more} more" if more > 0 else "")


def _describe_detail(name: str, value: Any) -> str:
    if name == "deleted":
        return "deleted"
    if name == "descriptors_waiting":
        return counted(value, "descriptor waiting")
    if name == "seals":
        return f"sealed: {' '.join(value)}" if value else "not sealed"
    if name == "locked":
        return f"locked for {'writing' if value == 'write' else 'reading'}"
    if name == "peer":
        return f"other end: pid {value['pid']} of uid {value['uid']}"
    if name == "pid":
        return f"pid {value}" if value >= 0 else "of a process that has ended"
    if name == "armed":
        return "armed" if value else "not armed"
    if name == "watches":
        return f"watches {value if isinstance(value, int) else ' '.join(map(str, value)) or 'nothing'}"
    return f"{name.replace('_', ' ')} {value}"


def counted(number: int, what: str) -> str:
    """Return a number of things in words; the first word of ``what`` is put into the plural where there are more."""
    noun, _, rest = what.partition(" ")
    return f"{number} {noun}{'' if number == 1 else 's'}{' ' if rest else ''}{rest}"


def printable(text: str) -> str:
    """Return ``text`` with what could move a terminal's cursor, or cannot be encoded, written as escapes."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def columns(rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Return rows as lines whose columns are as wide as their widest cell; those in ``right`` end together."""
    rows = list(rows)
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if n in right else cell.ljust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    ]
