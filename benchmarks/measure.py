"""How one worker times an operation: batches long enough for the clock, repeated for a budget of seconds."""

from __future__ import annotations

import gc
from collections.abc import Callable

__all__ = ["BATCHES", "measure"]

BATCHES = 10
"""Batches a worker: enough for a median that one interruption cannot move."""

FIRST = 3
"""Operations before any is believed: the first ones pay for pages and caches that a steady state has."""

WARM_SHARE = 0.25
"""A batch counts as calibrated from this share of its intended length on: doubling from there could overshoot."""


def measure(operate: Callable[[int], float], budget: float) -> list[float]:
    """Time an operation and return seconds an operation for each batch.

    ``operate(n)`` does the work ``n`` times and returns how many seconds count.  Calibration is the warm-up.  An
    operation that alone takes more than a batch's share of ``budget`` (seconds) is repeated singly, at least twice.
    """
    gc.collect()
    batch = budget / BATCHES
    n, took = 1, min(operate(1) for _ in range(FIRST))
    while took < batch * WARM_SHARE:
        n *= 2
        took = operate(n)
    if took / n >= batch:
        count = max(2, min(BATCHES, int(budget / (took / n))))
        return [operate(1) for _ in range(count)]
    n = max(1, round(n * batch / took))
    return [operate(n) / n for _ in range(BATCHES)]
