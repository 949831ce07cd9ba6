"""Who is there: credentials and pidfds from the kernel, and policies, tried with a second user for real."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import TRANSPORTS

import fdshare
from fdshare import (
    AccessDeniedError,
    BytesCodec,
    Listener,
    PeerCredentials,
    Pipe,
    any_user,
    connect,
    groups,
    peer_pidfd,
    same_user,
    users,
    wait,
)
from fdshare.credentials import peer_credentials
from fdshare.testing import Child, checked_child

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux's own")
NOBODY = 65534
A_GROUP = 12345


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@pytest.fixture
def public() -> Iterator[str]:
    """The path of a socket that every user can reach."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="fdshare-test-") as name:
        os.chmod(name, 0o777)
        yield name + "/sock"


def become_nobody(*extra_groups: int) -> None:
    os.setgroups(extra_groups)
    os.setregid(NOBODY, NOBODY)
    os.setreuid(NOBODY, NOBODY)


# policies


ROOT, NOBODY_IN_GROUP = PeerCredentials(1, 0, 0, ()), PeerCredentials(2, NOBODY, NOBODY, (A_GROUP,))


def test_policies() -> None:
    me = PeerCredentials(os.getpid(), os.geteuid(), os.getegid(), ())
    assert same_user(me)
    assert not same_user(PeerCredentials(os.getpid(), os.geteuid() + 1, os.getegid()))
    assert any_user(ROOT)
    assert any_user(NOBODY_IN_GROUP)
    assert users(0, 7)(ROOT)
    assert users("root")(ROOT)
    assert not users(0)(NOBODY_IN_GROUP)
    assert not users()(ROOT)
    assert groups(NOBODY)(NOBODY_IN_GROUP)
    assert groups(A_GROUP)(NOBODY_IN_GROUP)
    assert groups("root", A_GROUP)(ROOT)
    assert not groups(A_GROUP)(ROOT)
    assert not groups()(ROOT)


def test_policies_compare_travel_and_name_themselves() -> None:
    for policy in (users(0, 7), groups(7), same_user, any_user):
        assert pickle.loads(pickle.dumps(policy)) == policy
    assert (str(users(7, 0)), str(groups())) == ("users(0, 7)", "groups()")


@pytest.mark.parametrize("make", [users, groups])
def test_unknown_names(make: Any) -> None:
    with pytest.raises(LookupError):
        make("no-such-name-here")
    for wrong in (True, None, 1.5):
        with pytest.raises(TypeError):
            make(wrong)


def test_groups_by_name_where_the_kernel_does_not_tell() -> None:
    """Of the user database, and none for a user that it does not know."""
    import grp
    import pwd

    user = pwd.getpwuid(os.geteuid())
    mine = os.getgrouplist(user.pw_name, user.pw_gid)
    assert groups(mine[-1])(PeerCredentials(1, user.pw_uid, user.pw_gid))
    assert not groups(A_GROUP)(PeerCredentials(1, user.pw_uid, user.pw_gid))
    assert not groups(grp.getgrgid(mine[0]).gr_name)(PeerCredentials(1, 3_999_999_999, A_GROUP))


def test_credentials_compare_without_groups() -> None:
    assert PeerCredentials(1, 2, 3) == PeerCredentials(1, 2, 3, (4,))
    assert repr(PeerCredentials(1, 2, 3, (4,))) == "PeerCredentials(pid=1, uid=2, gid=3)"


@needs_linux
def test_large_uids_are_positive() -> None:
    """4294967294 is what some call nobody."""

    class Fake:
        def getsockopt(self, level: int, option: int, size: int) -> bytes:
            return (b"\1\0\0\0" + b"\xfe\xff\xff\xff" * 2) if size == 12 else b""

    assert peer_credentials(Fake()) == PeerCredentials(1, 2**32 - 2, 2**32 - 2)  # type: ignore[arg-type]


# two users


def serve_one(listener: Listener) -> tuple[PeerCredentials, tuple[int, ...] | None]:
    with listener, listener.accept(20) as channel:
        channel.send(channel.recv())
        return channel.peer, channel.peer.groups


def visit_as_nobody(path: str, *extra_groups: int, allow: Any = any_user) -> tuple[str, tuple[int, int]]:
    become_nobody(*extra_groups)
    try:
        with connect(path, allow=allow, codec=BytesCodec()) as channel:
            server = channel.peer
            channel.send(b"hello")
            data, _ = channel.recv(timeout=20)
            return data.decode(), (server.uid, server.gid)
    except AccessDeniedError as error:
        return f"denied: {error.strerror}", (-1, -1)


@needs_root
@pytest.mark.parametrize(
    "allow",
    [any_user, users("nobody"), users(NOBODY, 0), groups(NOBODY), groups(A_GROUP)],
    ids=["any_user", "users", "two users", "groups", "supplementary group"],
)
def test_nobody_is_admitted(public: str, allow: Any) -> None:
    with (
        Listener(public, allow=allow, codec=BytesCodec(), mode=0o666) as listener,
        Child(visit_as_nobody, public, A_GROUP, method="fork", unwanted=(listener,)) as child,
    ):
        peer, supplementary = serve_one(listener)
        assert child.result() == ("hello", (0, 0))
        assert (peer.uid, peer.gid, supplementary) == (NOBODY, NOBODY, (A_GROUP,))


@needs_root
@pytest.mark.parametrize("allow", [same_user, users(0), groups(0), groups(A_GROUP + 1)])
def test_nobody_is_refused(public: str, allow: Any) -> None:
    """And told by whom, while root is served."""
    with Listener(public, allow=allow, codec=BytesCodec(), mode=0o666) as listener:
        with Child(visit_as_nobody, public, A_GROUP, method="fork", unwanted=(listener,)) as child:
            assert wait([listener], 20)
            with pytest.raises(TimeoutError):
                listener.accept(0.0)
            told, _ = child.result()
        assert "denied" in told


@needs_root
def test_client_does_not_trust_another_users_server(public: str) -> None:
    """Nobody's listener where root expects its own; root's, where nobody does."""
    reader, writer = os.pipe()
    with Child(listen_as_nobody, public, writer, method="fork") as child:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        with pytest.raises(AccessDeniedError, match=f"not trusted here: uid {NOBODY}"):
            connect(public, codec=BytesCodec())
        with connect(public, codec=BytesCodec(), allow=users(NOBODY)) as channel:
            channel.send(b"in")
            assert channel.recv() == (b"in", [])
        assert "users(65534)" not in child.result()
    with Listener(public, mode=0o666, codec=BytesCodec(), allow=any_user):
        told, _ = checked_child(visit_as_nobody_trusting_itself, public, method="fork")
        assert "denied: the listener at" in told


def visit_as_nobody_trusting_itself(path: str) -> tuple[str, tuple[int, int]]:
    return visit_as_nobody(path, allow=same_user)


def listen_as_nobody(path: str, writer: int) -> str:
    become_nobody()
    with Listener(path, mode=0o666, codec=BytesCodec(), allow=any_user) as listener:
        os.write(writer, b"x")
        os.close(writer)
        with listener.accept(20) as refused, pytest.raises(AccessDeniedError) as caught:
            refused.recv(timeout=20)
        with listener.accept(20) as channel:
            channel.send(channel.recv()[0])
        return str(caught.value)


@needs_root
def test_effective_user_counts(public: str) -> None:
    """Of a process that is root only in reserve, as its credentials were when it connected."""
    with Listener(public, mode=0o666) as listener:
        os.seteuid(NOBODY)
        try:
            assert not same_user(PeerCredentials(1, 0, 0))
            client = connect(public, allow=users(0))
        finally:
            os.seteuid(0)
        with pytest.raises(TimeoutError):
            listener.accept(0.0)
        with client, pytest.raises(AccessDeniedError, match=rf"uid {NOBODY} .* is not admitted$"):
            client.recv(timeout=20)


# pidfds


@needs_linux
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_pidfd_of_the_peer(path: str, transport: str) -> None:
    with (
        Listener(path, transport=transport) as listener,
        Child(wait_for_the_end, path, transport, method="fork", unwanted=(listener,)) as child,
        listener.accept(20) as server,
    ):
        pidfd = peer_pidfd(server)
        if pidfd is None:
            pytest.skip("no SO_PEERPIDFD here")
        with pidfd:
            assert pidfd.kind == "pidfd"
            assert not os.get_inheritable(pidfd.fileno())
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            assert poll.poll(0) == []
            signal.pidfd_send_signal(pidfd.fileno(), 0)
            server.send("go")
            assert poll.poll(20_000)
            child.result()
            with pytest.raises(ProcessLookupError):  # and not whoever has its pid next
                signal.pidfd_send_signal(pidfd.fileno(), 0)


def wait_for_the_end(path: str, transport: str) -> None:
    with connect(path, transport=transport) as channel:
        assert channel.recv(timeout=20) == "go"


@needs_linux
def test_pidfd_of_pipes_sockets_and_closed_ones() -> None:
    near, far = Pipe()
    with near, far:
        for end in (near, near._transport.sock):
            pidfd = peer_pidfd(end)
            assert pidfd is None or pidfd.kind == "pidfd"
            if pidfd is not None:
                pidfd.close()
    with pytest.raises(fdshare.ClosedError):
        peer_pidfd(near)
    with socket.socket(socket.AF_UNIX) as alone, pytest.raises(OSError, match=r"."):
        peer_pidfd(alone)
