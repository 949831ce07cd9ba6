"""Tasks with descriptors under random deaths, limits and cancellations: every task and every descriptor is accounted for.

Each task has a numbered pipe as argument, notes in a log that it runs, and answers with the pipe's content and a new pipe.  In
the end each future has exactly one outcome that fits the log: nothing is lost, run twice, or hanging, and no descriptor is left.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

import fdshare
from fdshare import FdHandle, ProcessPoolExecutor, TaskTimeoutError, WorkerDiedError
from fdshare.testing import room_for
from tests import pool_tasks as tasks

WINDOW = 300
"""Most tasks under way: each holds a few descriptors."""


def work(log: FdHandle, number: int, handle: FdHandle, fate: str) -> Any:
    os.write(log.fileno(), b"%d\n" % number)
    log.close()
    content = tasks.read_handle(handle)
    if fate == "_exit":
        os._exit(1)
    if fate == "raise":
        raise ValueError(str(number))
    if fate == "hang":
        signal.pause()
    return content, fdshare.move(tasks.pipe_with(content))


def soak(count: int, path: Path, seed: int, kills: float) -> Counter[str]:
    """Run ``count`` tasks, kill a worker for every ``1 / kills`` of them, and check each task; return how they ended."""
    draw = random.Random(seed)
    log = FdHandle(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
    ended: Counter[str] = Counter()
    outcomes: dict[int, str] = {}
    retried: set[int] = set()

    def collect(number: int, future: Any) -> None:
        try:
            content, handle = future.result(60)
        except CancelledError:
            outcomes[number] = "cancelled"
        except TaskTimeoutError:
            outcomes[number] = "timed out"
        except WorkerDiedError:
            outcomes[number] = "died"
        except ValueError as error:
            outcomes[number] = "raised" if str(error) == str(number) else str(error)
        else:
            # A second run shares the pipe with the first, which may have emptied it.
            assert content == b"%d" % number or (number in retried and content == b"")
            assert tasks.read_handle(handle) == content
            outcomes[number] = "done"

    with log, ProcessPoolExecutor(4, multiprocessing.get_context("forkserver")) as executor:
        under_way: dict[int, Any] = {}
        for number in range(count):
            chance = draw.random()
            fate = (
                "_exit" if chance < 0.005 else "raise" if chance < 0.02 else "hang" if chance < 0.022 else ""
            )
            retries = int(draw.random() < 0.1)
            if retries:
                retried.add(number)
            view = executor.options(timeout=0.2 if fate == "hang" else 30.0, retries=retries)
            handle = tasks.pipe_with(b"%d" % number)
            if draw.random() < 0.5:
                under_way[number] = view.submit(work, log, number, fdshare.move(handle), fate)
                assert handle.closed
            else:
                with handle:
                    under_way[number] = view.submit(work, log, number, handle, fate)
            if draw.random() < kills and (processes := list(executor._processes.values())):
                draw.choice(processes).kill()  # in whatever it is doing
            if draw.random() < 0.03:
                draw.choice(list(under_way.values())).cancel()
            while len(under_way) >= WINDOW:
                oldest = next(iter(under_way))
                collect(oldest, under_way.pop(oldest))
        for number, future in under_way.items():
            collect(number, future)
        stats = executor.stats()
    runs = Counter(map(int, path.read_text().split()))
    assert sorted(outcomes) == list(range(count))
    for number, outcome in outcomes.items():
        most = 2 if number in retried else 1
        ended[outcome] += 1
        if outcome == "cancelled":
            assert runs[number] == 0 or number in retried, number
        elif outcome in ("died", "timed out"):  # in a worker's hands, but perhaps not begun
            assert runs[number] <= most, number
        else:
            assert 1 <= runs[number] <= most, (number, outcome, runs[number])
    assert (stats.done, stats.cancelled) == (ended["done"], ended["cancelled"])
    assert stats.failed == count - stats.done - stats.cancelled
    return ended


def work_in_threads(log: int, number: int, blob: bytes, seconds: float, exits: bool) -> Any:
    os.write(log, b"%d\n" % number)
    if seconds:
        time.sleep(seconds)
    if exits:
        os._exit(1)
    return number, blob


def soak_in_threads(seconds: float, path: Path, seed: int) -> Counter[str]:
    """Have four threads submit, cancel, wait and collect at the bound on large arguments, under kills; return how tasks ended."""
    outcomes: dict[int, str] = {}
    numbers = itertools.count()
    end = time.monotonic() + seconds
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        with ProcessPoolExecutor(3, multiprocessing.get_context("fork"), max_inflight=3 << 20) as executor:
            executor.submit(tasks.pid).result(60)  # the workers inherit the log

            def collect(number: int, future: Any) -> None:
                try:
                    outcome = "done" if future.result(60)[0] == number else "mixed up"
                except CancelledError:
                    outcome = "cancelled"
                except TaskTimeoutError:
                    outcome = "timed out"
                except WorkerDiedError:
                    outcome = "died"
                outcomes[number] = outcome

            def use(draw: random.Random) -> None:
                mine: dict[int, Any] = {}
                while time.monotonic() < end:
                    number = next(numbers)
                    view = (
                        executor.options(timeout=draw.choice([0.005, 5])) if draw.random() < 0.1 else executor
                    )
                    blob = bytes(draw.choice([0, 10, 20_000, 100_000, 700_000]))
                    naps = draw.choice([0, 0, 0, 0, 0.002, 0.01])
                    mine[number] = view.submit(
                        work_in_threads, log, number, blob, naps, draw.random() < 0.005
                    )
                    chance, some = draw.random(), draw.choice(list(mine))
                    if chance < 0.15:
                        mine[some].cancel()
                    elif chance < 0.3:
                        collect(some, mine.pop(some))
                    elif chance < 0.35:
                        mine[some].add_done_callback(id)
                    while len(mine) > 50:
                        collect(*mine.popitem())
                for item in mine.items():
                    collect(*item)

            threads = [
                threading.Thread(target=use, args=(random.Random(seed + number),)) for number in range(4)
            ]
            for thread in threads:
                thread.start()
            draw = random.Random(seed)
            while time.monotonic() < end:
                time.sleep(draw.random() * 0.1)
                if draw.random() < 0.3 and (processes := list(executor._processes.values())):
                    draw.choice(processes).kill()
            for thread in threads:
                thread.join()
            stats = executor.stats()
            assert (executor._pool.load, executor._pool.loads) == (0, 0)
    finally:
        os.close(log)
    runs = Counter(map(int, path.read_text().split()))
    assert sorted(outcomes) == list(range(next(numbers)))
    for number, outcome in outcomes.items():
        assert runs[number] == (outcome == "done") or (runs[number] == 1 and outcome in ("died", "timed out"))
    ended = Counter(outcomes.values())
    assert (stats.done - 1, stats.cancelled) == (ended["done"], ended["cancelled"])
    assert stats.failed == ended["died"] + ended["timed out"]
    return ended


def test_many_threads_for_a_second(tmp_path: Path) -> None:
    assert soak_in_threads(1.0, tmp_path / "log", seed=3)["done"] > 50


@pytest.mark.soak
def test_many_threads(tmp_path: Path) -> None:
    ended = soak_in_threads(60.0, tmp_path / "log", seed=5)
    print(dict(ended))  # noqa: T201 -- for whoever runs it with -s
    assert all(ended[outcome] for outcome in ("done", "died", "timed out", "cancelled"))


def test_2000_tasks(tmp_path: Path) -> None:
    with room_for(4096):
        ended = soak(2000, tmp_path / "log", seed=7, kills=0.01)
    assert ended["done"] > 1500
    assert ended["died"]
    assert ended["raised"]


@pytest.mark.soak
def test_100000_tasks(tmp_path: Path) -> None:
    with room_for(4096):
        began = time.monotonic()
        ended = soak(100_000, tmp_path / "log", seed=11, kills=0.01)
    print(dict(ended), f"in {time.monotonic() - began:.0f} s")  # noqa: T201 -- for whoever runs it with -s
    assert all(ended[outcome] for outcome in ("done", "died", "raised", "timed out", "cancelled"))
