"""Small messages: the round trip, and the rate one way.

The message is a tuple of a string and two numbers, as a task queue would send; C sends as many bytes
as its pickle has.  Round trip: the message there and the same message back.  One way: messages there without waiting,
one answer at the end of each batch, and the time of a message is the batch's time by their number.
"""

from __future__ import annotations

import pickle
from time import perf_counter

from benchmarks.cases.native import run_native
from benchmarks.cases.support import End, pipe_of, with_partner
from benchmarks.measure import measure
from benchmarks.model import Measurement

__all__ = ["run_one_way", "run_round_trip"]

MESSAGE = ("resize", 48151, 0.75)
SIZE = len(pickle.dumps(MESSAGE, 5))


def _echo(end: End) -> None:
    while True:
        end.send(end.recv())


def _swallow(end: End) -> None:
    while True:
        if end.recv() is None:
            end.send(None)


def run_round_trip(peer: str, budget: float) -> Measurement:
    """Measure a round trip of one small message."""
    if peer == "C":
        return run_native("roundtrip", SIZE, 0, budget)
    with with_partner(pipe_of(peer), _echo) as end:

        def operate(n: int) -> float:
            start = perf_counter()
            for _ in range(n):
                end.send(MESSAGE)
                end.recv()
            return perf_counter() - start

        return Measurement(measure(operate, budget))


def run_one_way(peer: str, budget: float) -> Measurement:
    """Measure the seconds a message where the sender never waits for an answer but at the end."""
    if peer == "C":
        return run_native("oneway", SIZE, 0, budget)
    with with_partner(pipe_of(peer), _swallow) as end:

        def operate(n: int) -> float:
            start = perf_counter()
            for _ in range(n):
                end.send(MESSAGE)
            end.send(None)
            end.recv()
            return perf_counter() - start

        return Measurement(measure(operate, budget))
