"""Taking sockets over, the gate before them and its end, inside one process: two objects are two generations to the kernel."""

from __future__ import annotations

import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from handovers import SOON, answering, ask, first, listen, port_of, reserved_port
from helpers import requires_seqpacket, running, wait_until

from fdshare import ClosedError, Pipe
from fdshare.handover import (
    Handover,
    HandoverError,
    HandoverSocket,
    RetiredError,
    door,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


# taking over ---------------------------------------------------------------------------------------------------------


def test_the_first_generation_binds(path: Path) -> None:
    with first(path) as (handover, sock):
        assert (handover.generation, handover.predecessor) == (0, None)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with answering(sock, b"first"):
            assert ask(port_of(sock)) == b"first"
            handover.close()
    assert not path.exists()
    assert handover.closed


def test_the_second_takes_over_and_the_first_stops(path: Path) -> None:
    with first(path) as (old, old_sock), Handover(path) as new:
        new_sock = listen(new)
        assert port_of(new_sock) == port_of(old_sock)
        assert (new.generation, new.predecessor) == (1, os.getpid())
        with answering(old_sock, b"old"), answering(new_sock, b"new"):
            assert [ask(port_of(old_sock)) for _ in range(3)] == [b"old"] * 3
            assert not old.retired.is_set()
            new.ready()
            assert old.retired.wait(SOON)
            assert [ask(port_of(old_sock)) for _ in range(3)] == [b"new"] * 3
            new.close()


@requires_seqpacket
def test_every_kind_of_listener_by_name(path: Path, tmp_path: Path) -> None:
    kinds = [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM]
    with Handover(path) as old:
        first_socks = [
            listen(old, "tcp"),
            listen(old, "udp", type=socket.SOCK_DGRAM),
            old.listen("v6", "::1", 0),
            *(old.listen_unix(f"unix{n}", tmp_path / f"s{n}", type=kind) for n, kind in enumerate(kinds)),
        ]
        names = [sock.getsockname() for sock in first_socks]
        inodes = [os.fstat(sock.fileno()).st_ino for sock in first_socks]
        files = [(tmp_path / f"s{n}").stat().st_ino for n in range(3)]
        old.ready()
        with Handover(path) as new:
            socks = [
                *(new.listen_unix(f"unix{n}", tmp_path / f"s{n}", type=kind) for n, kind in enumerate(kinds)),
                new.listen("v6", "::1", 0),
                listen(new, "udp", type=socket.SOCK_DGRAM),
                listen(new, "tcp"),
            ]
            new.ready()
            by_name = {sock.name: sock for sock in socks}
            socks = [by_name[sock.name] for sock in first_socks]
            assert [sock.getsockname() for sock in socks] == names
            assert [os.fstat(sock.fileno()).st_ino for sock in socks] == inodes
            assert old.retired.wait(SOON)
            old.close()
            assert [(tmp_path / f"s{n}").stat().st_ino for n in range(3)] == files
    assert sorted(tmp_path.iterdir()) == []


def test_unread_datagrams_stay_with_the_socket(path: Path, tmp_path: Path) -> None:
    with Handover(path) as old, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        old_sock = listen(old, "udp", type=socket.SOCK_DGRAM)
        old.ready()
        client.connect(old_sock.getsockname())
        for number in range(4):
            client.send(bytes([number]))
        assert old_sock.recv(10) == b"\0"
        assert old_sock.recvfrom(10) == (b"\1", client.getsockname())
        with Handover(path) as new:
            new_sock = listen(new, "udp", type=socket.SOCK_DGRAM)
            new_sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                new_sock.recv(10)
            new.ready()
            with pytest.raises(RetiredError):
                old_sock.recvfrom(10)
            buffer = bytearray(10)
            assert new_sock.recv_into(buffer) == 1
            assert buffer[0] == 2
            assert new_sock.recvfrom_into(buffer)[0] == 1
            assert buffer[0] == 3


def test_a_connection_that_waits_is_accepted_by_the_successor(path: Path) -> None:
    with first(path) as (_, old_sock), socket.create_connection(old_sock.getsockname(), SOON) as client:
        client.sendall(b"request")
        with Handover(path) as new:
            new_sock = listen(new)
            new.ready()
            with new_sock.accept()[0] as served:
                assert served.recv(100) == b"request"


def test_each_connection_is_accepted_by_the_generation_of_its_moment(path: Path) -> None:
    """No answer of an old generation comes after one of a new one."""
    answers: list[int] = []
    over = threading.Event()
    with Handover(path) as handover:
        sock = listen(handover)
        handover.ready()

        def client() -> None:
            while not over.is_set():
                answers.append(int(ask(port)))

        port, generations, stack = port_of(sock), [handover], [answering(sock, b"0")]
        stack[0].__enter__()
        with running(client):
            try:
                wait_until(lambda: answers)
                for number in range(1, 11):
                    handover = Handover(path)
                    sock = listen(handover)
                    generations.append(handover)
                    stack.append(answering(sock, b"%d" % number))
                    stack[-1].__enter__()
                    handover.ready()
                    seen = len(answers)
                    wait_until(lambda seen=seen: len(answers) > seen + 2)
            finally:
                over.set()
        for generation in generations:
            generation.close()
        for context in stack:
            context.__exit__(None, None, None)
    assert answers == sorted(answers)
    assert set(answers) == set(range(11))


@requires_seqpacket
def test_the_control_socket_is_answered_at_every_moment(path: Path) -> None:
    refused: list[OSError] = []
    over = threading.Event()

    def knock() -> None:
        while not (over.is_set() or refused):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                try:
                    sock.connect(os.fspath(path))
                except OSError as error:
                    refused.append(error)

    generations = [Handover(path)]
    inode = path.stat().st_ino
    try:
        generations[0].ready()
        with running(knock):
            try:
                for number in range(1, 11):
                    generations.append(Handover(path))
                    assert generations[-1].generation == number
                    generations[-1].ready()
                    generations[-2].close()
            finally:
                over.set()
        assert path.stat().st_ino == inode
    finally:
        for generation in generations:
            generation.close()
    assert refused == []
    assert not path.exists()


def test_a_port_of_ones_own_choice_and_names_of_the_same_address(path: Path) -> None:
    with first(path) as (old, sock), Handover(path) as new:
        same = new.listen("http", "localhost", port_of(sock))
        assert os.fstat(same.fileno()).st_ino == os.fstat(sock.fileno()).st_ino
        new.ready()
        assert old.retired.wait(SOON)


def test_an_abstract_control_address() -> None:
    with Handover(f"\0fdshare-test-{os.getpid()}") as old:
        old.ready()
        with Handover(f"\0fdshare-test-{os.getpid()}") as new:
            new.ready()
            assert new.generation == 1


def test_a_long_control_path(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 100) / "control"
    path.parent.mkdir()
    with Handover(path) as old:
        old.ready()
        with Handover(path) as new:
            new.ready()
        assert not path.exists()


# what the successor does not want ------------------------------------------------------------------------------------


def test_a_listener_that_is_not_wanted_goes_with_its_last_owner(path: Path, tmp_path: Path) -> None:
    with first(path) as (old, sock):
        old_file = tmp_path / "old"
        address = sock.getsockname()
        with Handover(path) as new:
            new.ready()
            assert old.retired.wait(SOON)
            old.close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(address)
            assert not old_file.exists()


def test_another_port_is_bound_and_the_old_queue_is_emptied(path: Path) -> None:
    with (
        first(path) as (old, old_sock),
        reserved_port() as port,
        socket.create_connection(old_sock.getsockname(), SOON) as queued,
        Handover(path) as new,
    ):
        new_sock = listen(new, port=port)
        assert port_of(new_sock) == port != port_of(old_sock)
        new.ready()
        assert old.retired.wait(SOON)
        with old_sock.accept()[0] as served:  # the successor will not come for it
            assert served.getpeername() == queued.getsockname()
        with pytest.raises(RetiredError):
            old_sock.accept()
        with answering(new_sock, b"new"):
            assert ask(port) == b"new"
            new.close()


def test_the_file_of_a_dropped_unix_socket_is_removed(path: Path, tmp_path: Path) -> None:
    with Handover(path) as old:
        old.listen_unix("one", tmp_path / "one")
        old.listen_unix("two", tmp_path / "two")
        old.ready()
        with Handover(path) as new:
            new.listen_unix("one", tmp_path / "one")
            new.listen_unix("two", tmp_path / "moved")
            new.ready()
            assert old.retired.wait(SOON)
            assert sorted(p.name for p in tmp_path.iterdir()) == ["control", "moved", "one"]


def test_a_listener_that_the_program_has_closed_is_not_offered(path: Path) -> None:
    with Handover(path) as old:
        sock, other = listen(old), listen(old, "other")
        port = port_of(other)
        old.ready()
        other.close()
        with Handover(path) as new:
            assert port_of(listen(new)) == port_of(sock)
            assert port_of(listen(new, "other", port)) == port  # bound anew
            new.ready()


# the gate ------------------------------------------------------------------------------------------------------------


def test_nobody_accepts_before_it_is_ready(path: Path) -> None:
    with Handover(path) as handover:
        sock = listen(handover)
        with socket.create_connection(sock.getsockname(), SOON):
            sock.settimeout(0.01)
            with pytest.raises(TimeoutError):
                sock.accept()
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.accept()
            sock.settimeout(SOON)
            accepted: list[socket.socket] = []
            with running(lambda: accepted.append(sock.accept()[0])):
                handover.ready()
            accepted[0].close()


def test_who_waits_in_accept_is_told(path: Path) -> None:
    told: list[BaseException] = []

    def accept() -> None:
        try:
            old_sock.accept()
        except OSError as error:
            told.append(error)

    with first(path) as (_, old_sock), Handover(path) as new:
        listen(new)
        with running(accept, accept):
            new.ready()
    assert [type(error) for error in told] == [RetiredError, RetiredError]


def test_the_address_is_free_when_the_successor_has_gone_before_the_predecessor(path: Path) -> None:
    """Which may take long to finish what it has."""
    with reserved_port() as port, Handover(path) as old:
        old_sock = listen(old, port=port)
        old.ready()
        with Handover(path) as new:
            listen(new, port=port)
            new.ready()
            with pytest.raises(RetiredError):
                old_sock.accept()
        with Handover(path) as third:
            sock = listen(third, port=port)
            third.ready()
            assert third.generation == 0
            assert sock.getsockname() == old_sock.getsockname()
        with pytest.raises(RetiredError):
            old_sock.accept()


def test_who_waits_in_accept_is_told_of_a_close(path: Path) -> None:
    told: list[BaseException] = []

    def accept() -> None:
        with pytest.raises(ClosedError) as caught:
            sock.accept()
        told.append(caught.value)

    with first(path) as (handover, sock), running(accept):
        handover.close()
    assert not isinstance(told[0], RetiredError)


def test_a_non_blocking_accept_finds_nothing_after_retirement(path: Path) -> None:
    """An event loop knows no other answer."""
    with first(path) as (_, old_sock), Handover(path) as new:
        new_sock = listen(new)
        new.ready()
        old_sock.setblocking(False)
        with socket.create_connection(old_sock.getsockname(), SOON):
            with pytest.raises(BlockingIOError):
                old_sock.accept()
            new_sock.accept()[0].close()


def test_blocking_is_not_a_matter_of_the_description(path: Path) -> None:
    with first(path) as (_, old_sock), Handover(path) as new:
        new_sock = listen(new)
        for value in (None, 0.0, 3.5):
            new_sock.settimeout(value)
            assert new_sock.gettimeout() == value
            assert new_sock.getblocking() is (value != 0.0)
            assert not os.get_blocking(new_sock.fileno())
            assert old_sock.gettimeout() == SOON
        with pytest.raises(ValueError, match="range"):
            new_sock.settimeout(-1)


def test_an_accepted_socket_blocks(path: Path) -> None:
    with (
        first(path) as (_, sock),
        socket.create_connection(sock.getsockname(), SOON),
        sock.accept()[0] as served,
    ):
        assert served.gettimeout() is None
        assert os.get_blocking(served.fileno())
        assert type(served) is socket.socket


def test_a_duplicate_stands_behind_the_same_gate(path: Path) -> None:
    with first(path) as (_, sock), sock.dup() as copy, Handover(path) as new:
        assert isinstance(copy, HandoverSocket)
        assert copy.gettimeout() == SOON
        listen(new)
        new.ready()
        with pytest.raises(RetiredError):
            copy.accept()


def test_a_sent_one_is_an_ordinary_socket(path: Path) -> None:
    ours, theirs = Pipe()
    with first(path) as (_, sock), ours, theirs:
        ours.send({"sock": sock})
        with theirs.recv()["sock"] as received:
            assert type(received) is socket.socket
            assert received.getsockname() == sock.getsockname()


# misuse --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "a:b", "é", "x" * 256, "new\nline"])
def test_bad_names(path: Path, name: str) -> None:
    with Handover(path) as handover, pytest.raises(ValueError, match="name is 1 to"):
        handover.listen(name, "127.0.0.1", 0)


def test_bad_listeners(path: Path, tmp_path: Path) -> None:
    with Handover(path) as handover:
        handover.listen("http", "127.0.0.1", 0)
        with pytest.raises(ValueError, match="already"):
            handover.listen("http", "127.0.0.1", 0)
        with pytest.raises(ValueError, match="port"):
            handover.listen("a", "127.0.0.1", 70000)
        with pytest.raises(ValueError, match="SOCK_STREAM"):
            handover.listen("a", "127.0.0.1", 0, type=socket.SOCK_RAW)
        with pytest.raises(ValueError, match="permission"):
            handover.listen_unix("a", tmp_path / "s", mode=0o7777)
        with pytest.raises(ValueError, match="path"):
            handover.listen_unix("a", "")
        with pytest.raises(OSError, match=r"192\.0\.2\.1 port 1234"):
            handover.listen("a", "192.0.2.1", 1234)
        handover.ready()
        with pytest.raises(HandoverError, match="serving already"):
            handover.listen("late", "127.0.0.1", 0)
        with pytest.raises(HandoverError, match="serving already"):
            handover.ready()
    with pytest.raises(ClosedError):
        handover.ready()
    handover.close()


def test_an_address_that_somebody_else_has(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, Handover(path) as handover:
        port = port_of(other)
        with pytest.raises(OSError, match=f"port {port}"):
            handover.listen("http", "127.0.0.1", port)


def test_no_descriptor_is_left_behind_by_a_failed_start(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Handover(tmp_path / "no" / "directory")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="taken"):
        Handover(tmp_path / "file", timeout=0.05)


# fork ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ready", [False, True])
def test_a_forked_child_accepts_as_from_an_ordinary_socket(path: Path, ready: bool) -> None:
    """Pre-forked workers wait in accept; it is the parent's affair to stop them."""
    with Handover(path) as handover:
        sock = listen(handover)
        if ready:
            handover.ready()
        pid = os.fork()
        if pid == 0:
            try:
                with sock.accept()[0] as connection:
                    connection.sendall(b"child")
            finally:
                os._exit(0)
        assert ask(port_of(sock)) == b"child"
        assert os.waitpid(pid, 0)[1] == 0


def test_fork_leaves_everything_to_the_parent(path: Path) -> None:
    """A child of either side keeps none of their connections open, and the listening socket is an ordinary one in it."""
    with first(path) as (old, sock), Handover(path) as new:
        listen(new)
        hold, release = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                assert old.closed
                assert new.closed
                sock.setblocking(False)
                os.close(release)
                os.read(hold, 1)
            finally:
                os._exit(0)
        os.close(hold)
        new.close()  # while the child lives on
        wait_until(lambda: old._door is not None and old._door.state is door.DoorState.IDLE)
        with Handover(path) as third:
            listen(third)
            third.ready()
        os.close(release)
        assert os.waitpid(pid, 0)[1] == 0
    assert not path.exists()
