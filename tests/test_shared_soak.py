"""Shared memory under everything at once: sealed, received, dropped, collected and forked by many threads."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from helpers import running
from test_shared import live_mappings

import fdshare
from fdshare import SealError, SharedMemory

np = pytest.importorskip("numpy")

SECONDS = 30.0
LARGEST = 20_000
"""Bytes: pages enough that new memory comes to lie where others were."""


@pytest.mark.soak
def test_everything_at_once() -> None:
    stop = time.monotonic() + SECONDS
    pool = [SharedMemory(random.randrange(1, LARGEST)) for _ in range(6)]
    counts: Counter[str] = Counter()

    def seal() -> None:
        place = random.randrange(len(pool))
        with contextlib.suppress(SealError):
            pool[place].seal()
            pool[place] = SharedMemory(random.randrange(1, LARGEST))
            counts["sealed"] += 1

    def exchange() -> None:
        a, b = fdshare.Pipe()
        with a, b:
            for _ in range(100):
                shared = random.choice(pool)
                a.send([shared, shared])
                view = b.recv()[0].buf
                if not view.readonly:
                    view[0] = 1
                counts["exchanged"] += 1
                del view

    def send_arrays() -> None:
        a, b = fdshare.Pipe()
        with a, b:
            for _ in range(100):
                on_memory = np.frombuffer(random.choice(pool).buf, "u1")[::2]
                a.send(on_memory)
                assert b.recv().shape == on_memory.shape
                own = fdshare.shared_array(random.randrange(1, 5000))
                a.send(own[::-1])
                b.recv()[0] = 5
                assert own[-1] == 5  # it is the same memory: nothing has hidden it
                ordinary = np.arange(300)[5:]
                a.send(ordinary)
                assert (b.recv() == ordinary).all()
                counts["arrays"] += 1

    def fork() -> None:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                a, b = fdshare.Pipe()
                with a, b:
                    own = fdshare.shared_array(5)
                    a.send([own, pool[0]])
                    b.recv()[0][0] = 1
                    status = int(own[0] != 1)
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        counts["forked"] += 1

    def until_the_end(step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            while time.monotonic() < stop:
                step()

        return run

    with running(*map(until_the_end, (seal, exchange, exchange, send_arrays, fork))):
        time.sleep(SECONDS)
    assert min(counts.values()) > 10
    pool.clear()
    gc.collect()
    assert live_mappings() == 0
