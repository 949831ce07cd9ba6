"""The demo: both scenes played by real processes, and every check in them shown to be able to fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from fdshare import Channel, demo

ROOT = Path(__file__).resolve().parent.parent


def test_demo_gives_its_account_and_ends_well() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fdshare", "demo", "--requests", "12"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=45,
        check=False,
    )
    assert run.stderr == ""
    assert run.returncode == 0
    rows = re.findall(
        r"^  (parent|worker \d) +(\d+) +(\d+) +(\d+) +(\d+)(?: +(\d+))?$", run.stdout, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["parent", "worker 1", "worker 2"]
    assert len({row[1] for row in rows}) == 3  # as many processes
    served = [int(row[5]) for row in rows[1:]]
    assert sum(served) == 12
    assert min(served) >= 1
    assert "12 HTTP requests to 127.0.0.1:" in run.stdout
    assert "the log has 12 lines" in run.stdout
    assert re.search(r"^  ratio +[\d.]+ +[\d.]+$", run.stdout, re.MULTILINE)
    assert "all is well" in run.stdout


def test_import_does_nothing() -> None:
    code = "import threading, fdshare.demo; print(threading.active_count())"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert run.stdout == "1\n"


# scene 1 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("requests", "workers"), [(2, 2), (9, 3)])
def test_every_worker_serves(requests: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "http_proxy", "http://127.0.0.1:1"
    )  # as many machines have one, which nobody here must ask
    account = demo.serve_http(requests, workers)
    assert account.problems() == []
    assert len(account.workers) == workers
    assert sum(worker.served for worker in account.workers) == requests
    assert len(account.log.splitlines()) == requests
    pids = {worker.pid for worker in account.workers}
    assert len(pids | {os.getpid()}) == workers + 1
    for worker in account.workers:
        assert worker.served >= 1
        assert set(worker.descriptors) == set(demo.THINGS)


GOOD = demo.Serving(
    requests=3,
    port=80,
    seconds=0.1,
    parent=demo.Account("parent", 1, {"server": 3, "log": 4, "report": 6}),
    workers=[
        demo.Account("worker 1", 11, {"server": 5, "log": 6, "report": 7}, served=2),
        demo.Account("worker 2", 12, {"server": 5, "log": 6, "report": 7}, served=1),
    ],
    replies={"/0": "/0 served by 11", "/1": "/1 served by 12", "/2": "/2 served by 11"},
    log="12 /1\n11 /0\n11 /2\n",
)


def worker(**changes: Any) -> dict[str, Any]:
    return {"workers": [GOOD.workers[0], attrs.evolve(GOOD.workers[1], **changes)]}


def test_good_account_has_no_problems() -> None:
    assert GOOD.problems() == []
    assert "worker 2" in str(GOOD)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"replies": {**GOOD.replies, "/2": "/1 served by 11"}}, r"the answer to /2 was '/1 served by 11'"),
        ({"replies": {**GOOD.replies, "/2": "/2 served by 99"}}, r"the answer to /2 was"),
        ({"replies": {**GOOD.replies, "/2": ""}}, r"the answer to /2 was ''"),
        ({"replies": {"/0": "/0 served by 11", "/1": "/1 served by 12"}}, r"3 requests, 2 answers"),
        (worker(served=2), r"worker 2 reports 2 served, 1 got its answer"),
        (worker(served=0), r"worker 2 served nothing"),
        (worker(descriptors={"server": 5, "log": 6}), r"worker 2 has not three descriptors"),
        (worker(descriptors={"server": 5, "log": 6, "report": 6}), r"worker 2 has not three descriptors"),
        ({"log": "12 /1\n11 /0\n"}, r"the log has 2 lines"),
        ({"log": "12 /1\n11 /0\n11 /0\n"}, r"the log has 3 lines that are not the 3"),
        ({"log": "12 /1\n11 11 /0\n/2\n"}, r"the log has 3 lines that are not the 3"),
    ],
)
def test_what_is_off_is_found(changes: dict[str, Any], problem: str) -> None:
    assert re.search(problem, "\n".join(attrs.evolve(GOOD, **changes).problems()))


def die_at_once(channel: Channel) -> None:
    os._exit(3)


def die_while_serving(channel: Channel) -> None:
    demo.Handler = lambda *_: os._exit(4)  # type: ignore[misc,assignment]
    demo.serve(channel)


def leak(channel: Channel) -> None:
    """Serve as it should, and keep the log open."""
    kept: list[Any] = []
    receive = channel.recv
    channel.recv = lambda **_: keep(receive())  # type: ignore[method-assign]

    def keep(message: Any) -> Any:
        if isinstance(message, dict):
            kept.append(os.dup(message["log"].fileno()))
        return message

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- the traceback of a failing worker is not of interest
    demo.serve(channel)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (die_at_once, r"worker \d died, exit code 3"),
        (die_while_serving, r"worker \d died, exit code 4"),
        (leak, r"worker \d ended with exit code 1$"),
    ],
)
def test_worker_that_fails_is_named(target: Any, problem: str) -> None:
    """Quickly, with its exit code, and with nothing left behind."""
    with pytest.raises(demo.DemoError, match=problem):
        demo.serve_http(4, target=target)


def say_nothing(channel: Channel) -> None:
    for message in channel:
        for thing in message.values():
            thing.close()


def keep_silent(channel: Channel) -> None:
    kept = list(channel)
    for message in kept:
        for thing in message.values():
            thing.close()


@pytest.mark.parametrize("target", [say_nothing, keep_silent])
def test_worker_that_is_silent_is_given_up(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PATIENCE", 1.0)
    with pytest.raises(demo.DemoError, match="worker 1 did not report 'descriptors' within 1 s, or ever"):
        demo.serve_http(2, target=target)


def test_what_is_off_is_printed_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = demo.ArrayTimes(
        "bytes", 8, dict.fromkeys(demo.WAYS, 0.1), dict.fromkeys(demo.WAYS, 0.1), ["half of it"]
    )
    monkeypatch.setattr(demo, "send_array", lambda: bad)
    assert demo.main(target=die_at_once) == 1
    printed = capsys.readouterr().out
    assert "off: DemoError: worker" in printed
    assert "off: half of it" in printed
    assert "all is well" not in printed


# scene 2 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numpy", [True, False])
def test_array_arrives_both_ways(numpy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if numpy:
        pytest.importorskip("numpy")
    else:
        monkeypatch.setitem(sys.modules, "numpy", None)
    times = demo.send_array(2**20, rounds=2)
    assert times.problems() == []
    assert times.what == ("numpy.ndarray" if numpy else "bytearray")
    for seconds in (times.received, times.read):
        assert set(seconds) == set(demo.WAYS)
        assert min(seconds.values()) > 0
    assert re.search(r"ratio +[\d.]+ +[\d.]+", str(times))


def test_array_that_arrives_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = demo._sum_up
    monkeypatch.setattr(demo, "_sum_up", lambda array, read: (*honest(array, read)[:2], 5 if read else None))
    problems = demo.send_array(2**16, rounds=1).problems()
    assert len(problems) == 2
    assert problems[0].startswith("fdshare.Pipe: sent ")
