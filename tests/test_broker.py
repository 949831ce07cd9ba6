"""The broker: tickets are good once and for a while, strangers and silent clients get nowhere, and nothing is left over."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import multiprocessing
import os
import pickle
import resource
import select
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import METHODS, running, wait_until

import fdshare
from fdshare import (
    AccessDeniedError,
    FdHandle,
    FdLimitError,
    HandoffExpiredError,
    broker,
    handoff,
    rendezvous,
)
from fdshare.handle import Handles
from fdshare.rights import open_numbers
from fdshare.testing import checked_child, numbered_handle, read_number

TIMEOUT = 20.0
pytestmark = pytest.mark.usefixtures("clean_broker")


@pytest.fixture
def clean_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # A directory of its own: that of the user has the sockets of other processes too.
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    lease = broker.get_lease()
    yield
    broker.shutdown()
    broker.set_lease(lease)


Ticket = tuple[str, bytes, int]


def pickled(number: int) -> bytes:
    with numbered_handle(number) as handle:
        return pickle.dumps(handle)


def ticket(number: int) -> Ticket:
    """Deposit a handle; the ticket is what another process would find in the pickle."""
    return broker.current().deposit(Handles([numbered_handle(number)]))


def spend(address: str, token: bytes, count: int) -> int:
    handles = handoff.fetch(address, token, count)
    number = read_number(handles[0])
    handles.close()
    handles.release()
    return number


def load(data: bytes) -> int:
    with pickle.loads(data) as handle:
        return read_number(handle)


def in_child(target: Callable[..., Any], *args: Any, method: str = "forkserver") -> Any:
    return checked_child(target, *args, method=method, timeout=TIMEOUT)


def bare_client(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT)
    sock.connect(address)
    return sock


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(broker.current(), "clock", clock)
    return clock


# tickets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_pickle_made_here_is_loaded_in_a_child(method: str) -> None:
    assert in_child(load, pickled(7), method=method) == 7


def test_pickle_is_loaded_where_it_was_made_without_the_socket() -> None:
    data = pickled(7)
    Path(broker.current().address).unlink()
    assert load(data) == 7


def expect_expired(data: bytes) -> str:
    with pytest.raises(HandoffExpiredError, match="loaded once") as caught:
        pickle.loads(data)
    assert isinstance(caught.value, LookupError)
    return str(caught.value)


def test_ticket_is_good_once() -> None:
    data = pickled(7)
    assert load(data) == 7
    expect_expired(data)
    in_child(expect_expired, data)


def test_ticket_that_another_process_used_is_spent() -> None:
    data, other = pickled(7), pickled(8)
    assert in_child(load, data) == 7
    expect_expired(data)
    in_child(expect_expired, data)
    assert load(other) == 8


def test_wrong_token_gets_nothing_and_spends_nothing() -> None:
    address, token, count = ticket(7)
    assert len(token) * 8 == 128
    with bare_client(address) as sock:
        sock.sendall(bytes(16))
        assert sock.recvmsg(100, 100)[:2] == (broker.UNKNOWN, [])
    with pytest.raises(HandoffExpiredError):
        handoff.fetch(address, bytes(16), count)
    assert spend(address, token, count) == 7


def test_tokens_do_not_repeat() -> None:
    tokens = {ticket(0)[1] for _ in range(300)}
    assert len(tokens) == 300


@pytest.mark.parametrize("sent", [b"", b"short", bytes(17), bytes(5000)])
def test_broken_request_ends_that_peer_alone(sent: bytes) -> None:
    address, token, count = ticket(7)
    with bare_client(address) as sock:
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        try:
            assert sock.recv(100) == b""
        except ConnectionResetError:  # it was closed with more unread
            pass
    assert in_child(spend, address, token, count) == 7


def test_token_may_come_byte_by_byte() -> None:
    address, token, _ = ticket(7)
    with bare_client(address) as sock:
        for byte in token:
            sock.send(bytes([byte]))
        answer, handles = fdshare.recv_fds(sock, 1, 1)
        with handles[0]:
            assert (answer, read_number(handles[0])) == (broker.GIVEN, 7)


@pytest.mark.parametrize("count", [253, 254, 400])
def test_more_descriptors_than_one_packet_takes(count: int) -> None:
    many = broker.current().deposit(Handles([numbered_handle(number) for number in range(count)]))
    assert in_child(spend_all, *many) == list(range(count))


def spend_all(address: str, token: bytes, count: int) -> list[int]:
    return read_and_close(handoff.fetch(address, token, count))


# leases -------------------------------------------------------------------------------------------------------------


def test_lease_closes_what_nobody_fetched(clock: Clock) -> None:
    reader, writer = os.pipe()
    with FdHandle(reader), FdHandle(writer) as handle:
        data = pickle.dumps(handle)
        handle.close()
        assert not select.select([reader], [], [], 0)[0]  # the copy that waits holds the pipe open
        clock.now += broker.get_lease() + 1
        broker.current().expire()  # unless its thread has looked already
        assert select.select([reader], [], [], TIMEOUT)[0]
        assert os.read(reader, 1) == b""
    expect_expired(data)


def test_lease_ends_without_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    broker.set_lease(0.05)
    with FdHandle(reader), FdHandle(writer) as handle:
        pickle.dumps(handle)
        handle.close()
        assert select.select([reader], [], [], TIMEOUT)[0]
    wait_until(lambda: not broker.current().address)  # and then thread and socket go


def test_expired_is_refused_before_it_is_closed(clock: Clock) -> None:
    here, there = pickled(7), pickled(8)
    clock.now += broker.get_lease()
    expect_expired(here)
    in_child(expect_expired, there)


def test_shorter_lease_after_a_longer_one(clock: Clock) -> None:
    long = pickled(7)
    broker.set_lease(10)
    short = pickled(8)
    clock.now += 11
    expect_expired(short)
    assert load(long) == 7


@pytest.mark.parametrize("seconds", [1e10, float("inf")])
def test_lease_beyond_what_the_system_counts(seconds: float) -> None:
    broker.set_lease(seconds)
    data = pickled(7)
    assert in_child(load, data) == 7


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_bad_lease(seconds: float) -> None:
    with pytest.raises(ValueError, match="lease"):
        broker.set_lease(seconds)


def test_nothing_runs_once_nothing_waits() -> None:
    before = threading.active_count()
    data = pickled(7)
    directory = Path(broker.current().address).parent
    assert threading.active_count() == before + 1
    assert load(data) == 7
    wait_until(lambda: threading.active_count() == before)
    assert not directory.exists()
    assert load(pickled(8)) == 8  # and again


# clients ------------------------------------------------------------------------------------------------------------


def test_silent_clients_hang_nobody() -> None:
    address, token, count = ticket(7)
    silent = [bare_client(address) for _ in range(20)]
    assert in_child(spend, address, token, count) == 7
    for sock in silent:
        sock.close()


def test_silent_client_is_dropped_at_its_deadline(clock: Clock) -> None:
    address, *_ = ticket(7)
    with bare_client(address) as early:
        wait_until(lambda: broker.current()._peers)
        clock.now += broker.PEER_DEADLINE
        with bare_client(address) as late:  # which makes the broker look at its clock
            assert early.recv(1) == b""
            late.sendall(bytes(16))
            assert late.recv(1) == broker.UNKNOWN


def test_too_many_peers_push_out_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker, "MAX_PEERS", 4)
    address, token, count = ticket(7)
    silent = [bare_client(address) for _ in range(8)]
    assert [sock.recv(1) for sock in silent[:4]] == [b""] * 4
    assert in_child(spend, address, token, count) == 7
    for sock in silent:
        sock.close()


def test_client_that_leaves_before_the_answer_spends_nothing() -> None:
    address, token, count = ticket(7)
    for _ in range(50):
        with bare_client(address) as sock:
            sock.send(token[:8])
    assert in_child(spend, address, token, count) == 7


def fetch_many(tickets: list[Ticket]) -> list[int]:
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda part: numbers.extend(spend(*t) for t in part), args=(tickets[n::8],))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return numbers


def test_many_fetches_at_once_from_threads_of_processes() -> None:
    tickets = [ticket(number) for number in range(240)]
    results: list[int] = []

    def fetch(part: list[Ticket]) -> Callable[[], None]:
        return lambda: results.extend(in_child(fetch_many, part))

    with running(*(fetch(tickets[n::3]) for n in range(3))):
        pass
    assert sorted(results) == list(range(240))
    wait_until(lambda: len(broker.current()) == 0)


def test_one_token_for_many_at_once_serves_one() -> None:
    address, token, count = ticket(7)
    results: list[int] = []
    errors: list[Exception] = []
    barrier = threading.Barrier(8)

    def claim() -> None:
        barrier.wait(TIMEOUT)
        try:
            with bare_client(address) as sock:  # over the socket, although it is this process
                results.extend(read_and_close(handoff._receive(sock, token, count)))
        except HandoffExpiredError as error:
            errors.append(error)

    with running(*[claim] * 8):
        pass
    assert (results, len(errors)) == ([7], 7)


def read_and_close(handles: Any) -> list[int]:
    numbers = [read_number(handle) for handle in handles]
    handles.close()
    handles.release()
    return numbers


def fetch_without_room(address: str, token: bytes, count: int) -> int:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    filler = [os.dup(0) for _ in range(64 - len(open_numbers()))]
    with pytest.raises(FdLimitError) as caught:
        handoff.fetch(address, token, count)
    assert caught.value.errno == errno.EMFILE
    for fd in filler:
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return spend(address, token, count)


def test_fetching_at_the_descriptor_limit_loses_nothing() -> None:
    assert in_child(fetch_without_room, *ticket(7)) == 7


def test_broker_at_its_descriptor_limit_serves_later() -> None:
    address, token, _ = ticket(7)
    silent = bare_client(address)
    wait_until(lambda: broker.current()._peers)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(open_numbers()) + 1, hard))
    filler: list[int] = []
    try:
        try:
            while True:
                filler.append(os.dup(0))
        except OSError:
            pass
        for client in clients:
            client.connect(address)
        wait_until(lambda: broker.current()._accept_again)
    finally:
        for fd in filler:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    clients[0].settimeout(TIMEOUT)
    clients[0].sendall(token)
    answer, handles = fdshare.recv_fds(clients[0], 1, 1)
    with handles[0]:
        assert (answer, read_number(handles[0])) == (broker.GIVEN, 7)
    for sock in (silent, *clients):
        sock.close()


# who may --------------------------------------------------------------------------------------------------------------


def as_nobody(address: str, token: bytes, count: int) -> str:
    os.setregid(65534, 65534)
    os.setreuid(65534, 65534)
    try:
        handoff.fetch(address, token, count)
    except AccessDeniedError as error:
        return str(error)
    return "let in"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@needs_root
def test_another_user_cannot_reach_the_socket() -> None:
    given = ticket(7)
    assert "another user" in in_child(as_nobody, *given, method="fork")
    assert spend(*given) == 7


@needs_root
def test_another_user_who_reaches_the_socket_is_denied_by_both_sides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as reachable:
        os.chmod(reachable, 0o755)
        monkeypatch.setattr("tempfile.tempdir", reachable)
        address, token, count = ticket(7)
        Path(address).parent.chmod(0o755)
        Path(address).chmod(0o777)
        assert "another user" in in_child(as_nobody, address, token, count, method="fork")
        assert in_child(ask_as_nobody, address, token, method="fork") == (broker.DENIED, [])
        assert spend(address, token, count) == 7
        broker.shutdown()


def test_number_of_all_strangers_is_not_a_user_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a user namespace the kernel shows all who have no number there as 65534, to a process of 65534, too."""
    monkeypatch.setattr("fdshare.credentials._OVERFLOW_UID", os.geteuid())
    monkeypatch.setattr("fdshare.credentials._every_user_has_a_number", lambda: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usual = tmp_path / f"fdshare-{os.geteuid()}"
    usual.mkdir(0o777)
    usual.chmod(0o777)
    address, token, count = ticket(7)
    assert Path(address).parent != usual
    assert stat.S_IMODE(usual.stat().st_mode) == 0o777
    with socket.socket(socket.AF_UNIX) as stranger, rendezvous.short_path(address) as short:
        stranger.connect(short)
        with contextlib.suppress(BrokenPipeError):  # refused already
            stranger.sendall(token)
        assert fdshare.recv_fds(stranger, 1, 1) == (broker.DENIED, [])
    with monkeypatch.context() as other, pytest.raises(AccessDeniedError, match="another user"):
        other.setattr(broker, "_broker", broker.Broker())
        handoff.fetch(address, token, count)
    assert token in broker.current()


def ask_as_nobody(address: str, token: bytes) -> tuple[bytes, list[Any]]:
    os.setreuid(65534, 65534)
    with bare_client(address) as sock:
        try:
            sock.sendall(token)
        except BrokenPipeError:
            pass
        return sock.recvmsg(100, 100)[:2]


def test_directory_is_private() -> None:
    address, *_ = ticket(7)
    directory = Path(address).parent.stat()
    assert stat.S_IMODE(directory.st_mode) == 0o700
    assert directory.st_uid == os.geteuid()


@pytest.mark.parametrize(
    "squatter", [pytest.param("directory of another user", marks=needs_root), "link", "file"]
)
def test_squatted_directory_is_not_used(
    squatter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = tmp_path / f"fdshare-{os.geteuid()}"
    if squatter == "directory of another user":
        name.mkdir(0o700)
        os.chown(name, 65534, 65534)
    elif squatter == "link":
        (tmp_path / "elsewhere").mkdir(0o700)
        name.symlink_to(tmp_path / "elsewhere")
    else:
        name.touch()
    address, token, count = ticket(7)
    directory = Path(address).parent
    assert directory != name
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    killed = (
        tmp_path / "fdshare-left"
    )  # before the ticket is spent: an idle broker ends, and sweeps, by itself
    killed.mkdir(0o700)
    foreign = tmp_path / "fdshare-of-another-program"
    foreign.mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(killed / "1073741824-00"))  # a pid beyond any system's
    assert in_child(spend, address, token, count) == 7
    broker.shutdown()
    assert not directory.exists()
    assert not killed.exists()
    assert foreign.exists()  # it was empty, and not a broker's


def test_directory_that_was_opened_is_closed_again(tmp_path: Path) -> None:
    name = tmp_path / f"fdshare-{os.geteuid()}"
    name.mkdir()
    name.chmod(0o777)
    address, *_ = ticket(7)
    assert Path(address).parent == name
    assert stat.S_IMODE(name.stat().st_mode) == 0o700


def test_long_path_of_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    address, token, count = ticket(7)
    assert address.startswith(str(deep))
    assert in_child(spend, address, token, count) == 7


# the sender -----------------------------------------------------------------------------------------------------------


def report_fetch(channel: fdshare.Channel, *ticket: Any) -> None:
    with channel:
        channel.send(spend(*ticket))


def test_sender_that_is_busy_without_the_gil() -> None:
    ours, theirs = fdshare.Pipe()
    with ours, theirs:
        child = multiprocessing.get_context("spawn").Process(target=report_fetch, args=(theirs, *ticket(7)))
        child.start()
        digest = hashlib.sha256()
        while not ours.poll():
            digest.update(bytes(1 << 22))
        assert ours.recv() == 7
        child.join()


def test_sender_that_holds_the_gil_is_waited_for() -> None:
    given = ticket(7)
    ours, theirs = fdshare.Pipe()
    with ours, theirs:
        child = multiprocessing.get_context("spawn").Process(target=report_fetch, args=(theirs, *given))
        child.start()
        deadline = time.monotonic() + 0.7
        while time.monotonic() < deadline:
            sorted(range(1 << 18), key=None)  # C calls that keep the lock
        assert ours.recv(timeout=TIMEOUT) == 7
        child.join()


def deposit_and_die(channel: fdshare.Channel, how: str) -> None:
    channel.send(ticket(7))
    if how == "kill":
        os.kill(os.getpid(), 9)
    os._exit(0)


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_sender_that_died_is_an_expired_ticket_and_is_swept(how: str) -> None:
    ours, theirs = fdshare.Pipe()
    with ours:
        child = multiprocessing.get_context("fork").Process(target=deposit_and_die, args=(theirs, how))
        child.start()
        theirs.close()
        address, token, count = ours.recv(timeout=TIMEOUT)
        child.join()
        assert Path(address).exists()
        with pytest.raises(HandoffExpiredError, match="has ended"):
            handoff.fetch(address, token, count)
        load(pickled(8))
        broker.shutdown()
        assert not Path(address).exists()


def test_sweeping_leaves_the_living_alone() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    with child:
        assert child.stdout is not None
        address = child.stdout.readline().decode().strip()
        load(pickled(7))
        broker.shutdown()
        assert Path(address).exists()
        child.communicate()
    assert not Path(address).exists()  # it has cleaned up by itself
    assert not Path(address).parent.exists()


_HOLDER = """
import os, pickle, sys, fdshare
from fdshare import broker
handle = fdshare.FdHandle.dup(0)
pickle.dumps(handle)
print(broker.current().address, flush=True)
sys.stdin.read()
handle.close()
"""


def put_and_leave(queue: Any) -> None:
    with numbered_handle(7) as handle:
        queue.put(handle)
        queue.close()
        queue.join_thread()  # which pickles in a thread of its own


@pytest.mark.parametrize("method", METHODS)
def test_child_that_exits_waits_for_its_results_to_be_fetched(method: str) -> None:
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=put_and_leave, args=(queue,))  # type: ignore[attr-defined]
    child.start()
    with queue.get(timeout=TIMEOUT) as handle:
        assert read_number(handle) == 7
    started = time.monotonic()
    child.join(TIMEOUT)
    assert child.exitcode == 0
    assert time.monotonic() - started < broker.LINGER
    child.close()
    queue.close()
    queue.join_thread()


# forks ------------------------------------------------------------------------------------------------------------------


def look_after_fork(data: bytes, held: list[int]) -> list[Any]:
    found = [len(broker.current()), broker.current().address, [fd for fd in held if _is_open(fd)]]
    number = load(data)  # from the parent, over the socket
    assert load(pickled(9)) == 9  # by a broker of its own
    broker.shutdown()
    return [*found, number]


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def forked(target: Callable[[], Any]) -> Any:
    """Call ``target`` in a child made by os.fork alone, and return its result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            result = pickle.dumps(target())
            os.write(writer, result)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        data = file.read()
    os.waitpid(pid, 0)
    return pickle.loads(data)


def test_forked_child_forgets_the_broker_and_closes_its_copies() -> None:
    data, kept = pickled(7), pickled(8)
    with bare_client(broker.current().address):
        wait_until(lambda: broker.current()._peers)
        here = broker.current()
        assert here._listener is not None
        held = [here._listener.fileno(), *(sock.fileno() for sock in here._wakers), *here._peers]
        held += [handle.fileno() for deposit in here._deposits.values() for handle in deposit.handles]
        assert len(held) == 6
        address = here.address
        result = forked(lambda: look_after_fork(data, held))
        assert result == [0, "", [], 7]
        assert broker.current().address == address
        assert Path(address).exists()
    assert load(kept) == 8


def test_forks_while_other_threads_deposit_leave_no_copy_behind() -> None:
    """Each pipe ends for its reader once this process has let go of it: no forked child keeps a copy."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            load(pickled(7))

    with running(churn, churn):
        try:
            for _ in range(20):
                count = forked(lambda: len(broker.current()))
                assert count == 0
        finally:
            stop.set()


# what is never loaded -------------------------------------------------------------------------------------------------


def test_pickles_that_are_never_loaded_close_at_shutdown() -> None:
    before = len(open_numbers())
    for number in range(50):
        pickled(number)
    assert len(broker.current()) == 50
    broker.shutdown()
    assert len(open_numbers()) == before


def test_pickling_that_fails_late_keeps_its_deposit_for_the_lease_alone(clock: Clock) -> None:
    with numbered_handle(7) as handle, pytest.raises(TypeError):
        pickle.dumps([handle, io.StringIO, sys._getframe()])
    assert len(broker.current()) == 1
    clock.now += broker.get_lease()
    broker.current().expire()
    assert len(broker.current()) == 0


def test_attempts_keep_the_last_deposit_of_each_object_alone() -> None:
    with numbered_handle(7) as handle, numbered_handle(8) as other:
        with handoff.attempts():
            first = pickle.dumps([handle, other])
            second = pickle.dumps([handle, other])
        assert len(broker.current()) == 2
        expect_expired(first)
        for loaded, number in zip(pickle.loads(second), (7, 8), strict=True):
            with loaded:
                assert read_number(loaded) == number
        with pytest.raises(ZeroDivisionError), handoff.attempts():
            pickle.dumps(handle)
            raise ZeroDivisionError
        assert len(broker.current()) == 0


def test_one_object_twice_in_a_pickle_is_one_deposit() -> None:
    with numbered_handle(7) as handle:
        data = pickle.dumps([handle, handle])
    first, second = pickle.loads(data)
    with first:
        assert first is second


def test_processes_that_are_started_inherit_and_need_no_broker() -> None:
    with numbered_handle(7) as handle:
        assert in_child(load_handle, handle) == 7
    assert broker.current().address == ""


def load_handle(handle: FdHandle) -> int:
    with handle:
        return read_number(handle)


def both(first: FdHandle, second: fdshare.Channel) -> int:
    with first, second:
        return first.fileno() - second.fileno()


def test_started_process_gets_two_numbers_for_two_owners_of_one() -> None:
    ours, theirs = fdshare.Pipe()
    with ours, theirs:
        borrowed = FdHandle(theirs.fileno())
        assert in_child(both, borrowed, theirs) != 0
        borrowed.detach()


def test_listening_socket_has_its_name_only_once_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    listener, path = rendezvous.listen()
    with listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert [p.name for p in Path(path).parent.iterdir()] == [Path(path).name]
    rendezvous.remove(path)
    assert not Path(path).parent.exists()
