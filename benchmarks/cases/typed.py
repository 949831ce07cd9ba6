"""Messages without pickle beside the same messages with it: the round trip of a small object, and of one with a descriptor.

The objects are of attrs classes, as a request and its answer would be.  ``TypedCodec`` checks every field on arrival, and of a
descriptor what it is and what it is open for; pickle checks nothing.
"""

from __future__ import annotations

import os
from time import perf_counter
from typing import Annotated, cast

import attrs

from benchmarks.cases.support import End, with_partner
from benchmarks.measure import measure
from benchmarks.model import Measurement

__all__ = ["run_descriptor", "run_message"]


@attrs.frozen
class Request:
    """What a worker asks for."""

    path: str
    flags: int
    weight: float
    tags: list[str]


def _ends(peer: str, *classes: type) -> tuple[End, End]:
    if not peer.startswith("fdshare"):
        import multiprocessing

        return multiprocessing.Pipe()
    import fdshare

    codec = fdshare.TypedCodec(*classes) if peer == "fdshare" else None
    return cast("tuple[End, End]", fdshare.Pipe(codec=codec))


def _echo(end: End) -> None:
    while True:
        end.send(end.recv())


def _echo_and_close(end: End) -> None:
    while True:
        answer = end.recv()
        end.send(answer)
        answer.file.close()


def run_message(peer: str, budget: float) -> Measurement:
    """Measure a round trip of one small object."""
    message = Request("/var/log/messages", 3, 0.75, ["urgent", "read-only"])
    with with_partner(_ends(peer, Request), _echo) as end:

        def operate(n: int) -> float:
            start = perf_counter()
            for _ in range(n):
                end.send(message)
                end.recv()
            return perf_counter() - start

        return Measurement(measure(operate, budget))


def _opened() -> type:
    """Make the class of a message with a descriptor: here, as other cases need no fdshare; found by name, as pickle wants it."""
    from fdshare import Descriptor, FdHandle

    file = Annotated[FdHandle, Descriptor(kinds={"file"}, access="r")]
    cls = attrs.make_class("Opened", {"path": attrs.field(type=str), "file": attrs.field(type=file)})
    cls.__module__ = __name__
    globals()["Opened"] = cls
    return cls


def run_descriptor(peer: str, budget: float) -> Measurement:
    """Measure a round trip of an object with a descriptor of a file, open for reading."""
    from fdshare import FdHandle

    opened = _opened()
    with FdHandle(os.open(__file__, os.O_RDONLY)) as handle:
        message = opened("/var/log/messages", handle)
        with with_partner(_ends(peer, opened), _echo_and_close) as end:

            def operate(n: int) -> float:
                start = perf_counter()
                for _ in range(n):
                    end.send(message)
                    end.recv().file.close()
                return perf_counter() - start

            return Measurement(measure(operate, budget))
