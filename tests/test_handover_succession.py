"""Being retired, state, hooks, who may succeed and what comes after, inside one process: two objects are two generations."""

from __future__ import annotations

import asyncio
import os
import selectors
import socket
import threading
from pathlib import Path

import pytest
from handovers import SOON, answering, ask, first, listen, port_of
from helpers import running, wait_until

from fdshare import DecodeError, PeerClosedError, wait
from fdshare.handover import (
    Handover,
    HandoverBusyError,
    HandoverError,
    HandoverRevokedError,
    RetiredError,
    door,
    serving,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


# retired -------------------------------------------------------------------------------------------------------------


def test_the_ways_to_wait_for_retirement(path: Path) -> None:
    async def wait_twice(old: Handover) -> list[bool]:
        return [await old.retired, await old.retired_async()]

    with first(path) as (old, _), Handover(path) as new, selectors.DefaultSelector() as selector:
        assert old.retired.wait(0) is False
        assert wait([old.retired], 0) == []
        selector.register(old.retired, selectors.EVENT_READ)
        assert selector.select(0) == []
        results: list[object] = []
        with running(
            lambda: results.append(old.retired.wait()),
            lambda: results.append(old.retired(SOON)),
            lambda: results.append(wait([old.retired], SOON) == [old.retired]),
            lambda: results.extend(asyncio.run(wait_twice(old))),
        ):
            new.ready()
        assert results == [True] * 5
        assert old.retired.is_set()
        assert [key.fileobj for key, _ in selector.select(0)] == [old.retired]


def test_who_waits_for_retirement_is_told_of_a_close(path: Path) -> None:
    async def wait_for() -> bool:
        return await handover.retired

    with first(path) as (handover, _):
        results: list[bool] = []
        with running(
            lambda: results.append(handover.retired.wait()),
            lambda: results.append(asyncio.run(wait_for())),
        ):
            handover.close()
        assert results == [False, False]


def test_a_cancelled_wait_for_retirement_leaves_nothing(path: Path) -> None:
    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handover.retired_async(), 0.01)

    with first(path) as (handover, _):
        asyncio.run(give_up())
        assert handover.retired._callbacks == []


# state ---------------------------------------------------------------------------------------------------------------


def test_state_is_asked_for_while_the_predecessor_serves(path: Path) -> None:
    with first(path) as (old, sock), open(os.devnull) as file:
        old.offer("numbers", lambda: list(range(3)))
        old.offer("file", lambda: {"file": file})
        old.offer("big", lambda: bytes(1 << 20))
        with Handover(path) as new, answering(sock, b"old"):
            assert new.state("numbers") == [0, 1, 2]
            assert ask(port_of(sock)) == b"old"
            with new.state("file")["file"] as received:
                assert os.fstat(received.fileno()).st_rdev == os.fstat(file.fileno()).st_rdev
            assert len(new.state("big")) == 1 << 20
            listen(new)
            new.ready()
            with pytest.raises(HandoverError, match="state: this process is serving"):
                new.state("numbers")


def test_state_that_is_not_there(path: Path) -> None:
    def fail() -> None:
        raise ValueError("not today")

    with first(path) as (old, _):
        old.offer("failing", fail)
        old.offer("unsendable", lambda: threading.Lock())
        with pytest.raises(TypeError):
            old.offer("x", 3)  # type: ignore[arg-type]
        with Handover(path) as new:
            for name, reason in [("failing", "not today"), ("unsendable", "lock"), ("none", "none")]:
                with pytest.raises(KeyError, match=reason):
                    new.state(name)
                assert new.state(name, "default") == "default"
            new.ready()


def test_the_first_generation_has_nobody_to_ask(path: Path) -> None:
    with Handover(path) as handover:
        assert handover.state("numbers", 7) == 7
        with pytest.raises(KeyError, match="no predecessor"):
            handover.state("numbers")
        assert handover.ready(final=["numbers"]) == {}


def test_a_late_answer_is_not_taken_for_another_one(path: Path) -> None:
    go = threading.Event()

    def slow() -> str:
        go.wait(SOON)
        return "slow"

    with first(path) as (old, _):
        old.offer("slow", slow)
        old.offer("quick", lambda: "quick")
        with Handover(path) as new:
            with pytest.raises(TimeoutError):
                new.state("slow", timeout=0.01)
            go.set()
            assert new.state("quick") == "quick"
            go.clear()
            with pytest.raises(TimeoutError):
                new.state("slow", timeout=0.01)
            go.set()
            assert new.ready(final=["quick", "not offered"]) == {"quick": "quick"}


def test_final_states_are_taken_once_nothing_is_accepted(path: Path) -> None:
    seen: list[bool] = []

    def count() -> int:
        old_sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            old_sock.accept()
        seen.append(True)
        return 5

    with first(path) as (old, old_sock), socket.create_connection(old_sock.getsockname(), SOON):
        old.offer("count", count)
        with Handover(path) as new:
            sock = listen(new)
            assert new.ready(final=["count"]) == {"count": 5}
            sock.accept()[0].close()
    assert seen == [True]


class Unreadable:
    def __reduce__(self) -> tuple[object, ...]:
        return int, ("no number",)


def test_a_final_state_that_the_new_code_cannot_read_leaves_the_predecessor_serving(path: Path) -> None:
    with first(path) as (old, old_sock), answering(old_sock, b"old"):
        old.offer("unreadable", Unreadable)
        with Handover(path) as new:
            listen(new)
            with pytest.raises(DecodeError):
                new.state("unreadable")
            assert new.state("unknown", None) is None
            with pytest.raises(DecodeError):
                new.ready(final=["unreadable"])
        assert ask(port_of(old_sock)) == b"old"
        assert not old.retired.is_set()
        old.close()


@pytest.mark.parametrize("final", ["failing", "unsendable"])
def test_a_final_state_that_fails_leaves_the_predecessor_serving(path: Path, final: str) -> None:
    with first(path) as (old, old_sock):
        old.offer("failing", lambda: 1 // 0)
        old.offer("unsendable", lambda: threading.Lock())
        with answering(old_sock, b"old"):
            with Handover(path) as new:
                listen(new)
                with pytest.raises(HandoverRevokedError, match="resumes"):
                    new.ready(final=[final])
            assert ask(port_of(old_sock)) == b"old"
            assert not old.retired.is_set()
            old.close()


# hooks ---------------------------------------------------------------------------------------------------------------


def test_hooks_are_called_before_the_successor_accepts(path: Path) -> None:
    calls: list[str] = []
    with first(path) as (old, _):
        old.on_stop(lambda: calls.append("stop 1"), lambda: calls.append("resume 1"))
        old.on_stop(lambda: calls.append("stop 2"))
        with Handover(path) as new:
            assert calls == []
            listen(new)
            new.ready()
            assert calls == ["stop 1", "stop 2"]


def test_a_hook_that_fails_leaves_the_predecessor_serving(path: Path) -> None:
    calls: list[str] = []

    def fail() -> None:
        raise RuntimeError("a worker does not stop")

    def fail_again() -> None:
        calls.append("resume 2")
        raise RuntimeError("nor resume")

    with first(path) as (old, sock), answering(sock, b"old"):
        old.on_stop(lambda: calls.append("stop 1"), lambda: calls.append("resume 1"))
        old.on_stop(fail, fail_again)
        old.on_stop(lambda: calls.append("stop 3"), lambda: calls.append("resume 3"))
        with Handover(path) as new:
            listen(new)
            with pytest.raises(
                HandoverRevokedError, match="given this successor up: RuntimeError: a worker does not stop"
            ):
                new.ready()
            with pytest.raises(HandoverError, match="failed"):
                new.ready()
        assert calls == ["stop 1", "resume 2", "resume 1"]
        assert ask(port_of(sock)) == b"old"
        old.close()


# who may succeed, and when -------------------------------------------------------------------------------------------


def test_of_two_successors_one_wins(path: Path) -> None:
    with first(path) as (old, _), Handover(path) as winner:
        with pytest.raises(HandoverBusyError, match=f"process {os.getpid()} is succeeding") as caught:
            Handover(path)
        assert isinstance(caught.value, OSError)
        listen(winner)
        winner.ready()
        assert old.retired.wait(SOON)
        with Handover(path) as third:  # at once
            assert third.generation == 2


def test_nobody_succeeds_who_is_not_ready(path: Path) -> None:
    with Handover(path), pytest.raises(HandoverBusyError, match="not ready itself"):
        Handover(path)


def test_a_successor_that_gives_up_harms_nothing(path: Path) -> None:
    with first(path) as (old, sock), answering(sock, b"old"):
        for _ in range(3):
            with Handover(path) as new:
                listen(new)
                listen(new, "another")
            assert ask(port_of(sock)) == b"old"
            wait_until(lambda: old._door is not None and old._door.state is door.DoorState.IDLE)
        assert not old.retired.is_set()
        with Handover(path) as new:
            listen(new)
            new.ready()


def test_a_successor_that_never_gets_ready_is_given_up(path: Path) -> None:
    with first(path, successor_timeout=0.05) as (old, sock), answering(sock, b"old"), Handover(path) as slow:
        listen(slow)
        wait_until(lambda: old._door is not None and old._door.state is door.DoorState.IDLE)
        with Handover(path) as quick:  # others may succeed
            assert quick.predecessor == os.getpid()
        with pytest.raises(
            HandoverRevokedError, match="given this successor up: TimeoutError: it was not ready after"
        ):
            slow.ready()
        assert ask(port_of(sock)) == b"old"
        old.close()


def test_one_that_was_given_up_learns_it_when_it_asks(path: Path) -> None:
    with first(path, successor_timeout=0.05) as (old, _), Handover(path) as slow:
        wait_until(lambda: old._door is not None and old._door.state is door.DoorState.IDLE)
        with pytest.raises(HandoverRevokedError):
            slow.state("anything", None)


def test_a_predecessor_that_ends_leaves_all_to_the_successor(path: Path, tmp_path: Path) -> None:
    with Handover(path) as old:
        sock = listen(old)
        old.listen_unix("unix", tmp_path / "unix")
        old.ready()
        with socket.create_connection(sock.getsockname(), SOON), Handover(path) as new:
            new_sock = listen(new)
            new.listen_unix("unix", tmp_path / "unix")
            old.close()
            assert (tmp_path / "unix").exists()
            assert path.exists()
            assert new.state("anything", "none") == "none"
            assert new.ready(final=["anything"]) == {}
            new_sock.accept()[0].close()
            with Handover(path) as third:
                assert third.generation == 2
                assert not old.retired.is_set()
    assert sorted(tmp_path.iterdir()) == []


# after the handover --------------------------------------------------------------------------------------------------


def test_connections_move(path: Path) -> None:
    with first(path) as (old, old_sock):
        clients = [socket.create_connection(old_sock.getsockname(), SOON) for _ in range(3)]
        served = [old_sock.accept()[0] for _ in clients]
        with Handover(path, adopt=True) as new:
            listen(new)
            with pytest.raises(HandoverError):
                new.connections()
            with pytest.raises(HandoverError, match="no successor"):
                old.send_connection(served[0])
            new.ready()
            assert old.retired.wait(SOON)
            assert old.successor_adopts
            connections = new.connections()
            assert connections.expected
            assert wait([connections], 0) == []
            for number, sock in enumerate(served):
                old.send_connection(sock, {"unread": bytes([number])})
                assert sock.fileno() == -1
            assert wait([connections], SOON) == [connections]
            old.close()
            for (sock, data), client, number in zip(connections, clients, range(3), strict=True):
                with sock, client:
                    assert data == {"unread": bytes([number])}
                    client.sendall(b"next request")
                    assert sock.recv(100) == b"next request"
            with pytest.raises(PeerClosedError):
                connections.receive(0)


def test_connections_stay_where_the_successor_takes_none(path: Path) -> None:
    with (
        first(path) as (old, old_sock),
        socket.create_connection(old_sock.getsockname(), SOON),
        old_sock.accept()[0] as served,
    ):
        with Handover(path) as new:
            listen(new)
            new.ready()
            assert old.retired.wait(SOON)
            assert not old.successor_adopts
            with pytest.raises(HandoverError, match="no successor that takes"):
                old.send_connection(served)
        assert served.fileno() >= 0


def test_connections_stay_where_the_successor_has_gone(path: Path) -> None:
    with (
        first(path) as (old, old_sock),
        socket.create_connection(old_sock.getsockname(), SOON),
        old_sock.accept()[0] as served,
    ):
        with Handover(path, adopt=True) as new:
            listen(new)
            new.ready()
            assert old.retired.wait(SOON)
            new.connections().close()
            with pytest.raises(PeerClosedError):
                old.send_connection(served)
        assert served.fileno() >= 0


def test_the_first_generation_expects_no_connections(path: Path) -> None:
    with Handover(path, adopt=True) as handover:
        handover.ready()
        with handover.connections() as connections:
            assert not connections.expected
            assert list(connections) == []
            with pytest.raises(PeerClosedError):
                connections.fileno()


def test_who_was_told_by_accept_can_send_connections(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the service manager has not looked at the change yet, before which ``retired`` is not set."""
    looked = threading.Event()
    monkeypatch.setattr(serving.systemd, "barrier", lambda: looked.wait(SOON))
    ours, theirs = socket.socketpair()
    with first(path) as (old, old_sock), theirs, Handover(path, adopt=True) as new:
        wait_for = old.retired.wait

        def note(timeout: float | None) -> bool:
            looked.set()
            return wait_for(timeout)

        monkeypatch.setattr(old.retired, "wait", note)
        listen(new)
        new.ready()
        with pytest.raises(RetiredError):
            old_sock.accept()
        assert not old.retired.is_set()
        old.send_connection(ours)
        new.connections().receive(SOON)[0].close()
