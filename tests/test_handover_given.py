"""Sockets of a service manager in a Handover: found by name, at whatever address, or refused."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from handovers import first, listen, port_of

from fdshare import FdHandle
from fdshare.handle import own, own_pipe
from fdshare.handover import Handover, HandoverError, HandoverSocket
from fdshare.handover import handover as handover_module


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control"


def given(monkeypatch: pytest.MonkeyPatch, *pairs: tuple[str, socket.socket]) -> None:
    """Let the next Handover find what a service manager has handed over."""
    monkeypatch.setattr(
        handover_module,
        "listen_fds",
        lambda: [(name, FdHandle.dup(sock)) for name, sock in pairs],
    )


def connects_to(ours: HandoverSocket, address: Any) -> bool:
    with socket.socket(ours.family) as client:
        client.connect(address)
        with ours.accept()[0] as served:
            served.sendall(b"!")
        return client.recv(10) == b"!"


ADDRESSES = {
    "any-ipv6": (socket.AF_INET6, ("::", 0)),
    "ipv6": (socket.AF_INET6, ("::1", 0)),
    "another-port": (socket.AF_INET, ("127.0.0.1", 0)),
    "path": (socket.AF_UNIX, "sock"),
    "abstract": (socket.AF_UNIX, f"\0fdshare-given-{os.getpid()}"),
}


@pytest.mark.parametrize("kind", ADDRESSES)
@pytest.mark.parametrize("asked", ["ipv4", "ipv6", "path"])
def test_a_socket_of_that_name_is_used_whatever_its_family(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, asked: str
) -> None:
    """And by the generations after that one, which find no manager's sockets."""

    def ask_for(handover: Handover) -> HandoverSocket:
        if asked == "path":
            return handover.listen_unix("http", tmp_path / "asked")
        return handover.listen("http", "127.0.0.1" if asked == "ipv4" else "::1", 1)

    family, address = ADDRESSES[kind]
    if kind == "path":
        address = os.fspath(tmp_path / "sock")
    with socket.socket(family) as made, ExitStack() as stack:
        made.bind(address)
        made.listen()
        address, inode = made.getsockname(), os.fstat(made.fileno()).st_ino
        given(monkeypatch, ("http", made))
        made = stack.enter_context(FdHandle.dup(made))
        generations = []
        for _ in range(3):
            generations.append(stack.enter_context(Handover(path)))
            monkeypatch.setattr(handover_module, "listen_fds", list)
            sock = ask_for(generations[-1])
            assert (sock.family, sock.getsockname(), os.fstat(sock.fileno()).st_ino) == (
                family,
                address,
                inode,
            )
            generations[-1].ready()
            assert connects_to(sock, address)
            for old in generations[:-1]:
                old.close()
        generations[-1].close()
    assert kind != "path" or (tmp_path / "sock").exists()  # it is the manager's
    assert not (tmp_path / "asked").exists()


def test_of_several_of_that_name_the_likest_is_used(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack:
        six = stack.enter_context(socket.create_server(("::1", 0), family=socket.AF_INET6))
        other = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        four = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        given(monkeypatch, *[("http", sock) for sock in (udp, six, other, four)])
        with Handover(path) as handover:
            assert port_of(listen(handover, port=port_of(four))) == port_of(four)
            handover.ready()
    assert caplog.text.count("is not used, and closed") == 3


@pytest.mark.parametrize("same", [True, False])
def test_what_the_predecessor_has_goes_before_what_the_manager_gives(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, same: bool
) -> None:
    """And if that is another socket, the log tells of its end."""
    with first(path) as (_, old_sock), socket.create_server(("127.0.0.1", 0)) as other:
        given(monkeypatch, ("http", old_sock if same else other))
        with Handover(path) as new:
            assert port_of(listen(new)) == port_of(old_sock)
            new.ready()
    assert caplog.text.count("is not used, and closed") == (not same)


@pytest.mark.parametrize("kind", ["datagrams", "bound", "connected", "pipe", "seqpacket", "path"])
def test_what_cannot_serve_is_refused_by_name(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It is not closed in silence, and another one bound."""
    with ExitStack() as stack:
        thing: Any
        if kind == "pipe":
            thing, writer = own_pipe()
            stack.enter_context(writer)
        elif kind == "seqpacket":
            thing = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            thing.bind(os.fspath(tmp_path / "sock"))
            thing.listen()
        elif kind == "path":
            with socket.create_server(os.fspath(tmp_path / "sock"), family=socket.AF_UNIX):
                thing = own(os.open, tmp_path / "sock", os.O_PATH)
        elif kind == "connected":
            thing, other = socket.socketpair()
            stack.enter_context(other)
        else:
            thing = socket.socket(
                socket.AF_INET, getattr(socket, f"SOCK_{'DGRAM' if kind == 'datagrams' else 'STREAM'}")
            )
            thing.bind(("127.0.0.1", 0))
        stack.enter_context(thing)
        given(monkeypatch, ("http", thing))
        with Handover(path) as handover:
            for _ in range(2):
                with pytest.raises(HandoverError, match="'http' is a "):
                    listen(handover)
            with handover.inherited("http") or pytest.fail("it is gone"):
                pass
            listen(handover)
            handover.ready()


def test_a_socket_of_another_name_is_told_of_where_the_address_is_taken(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        given(monkeypatch, ("app.socket", sock))
        with Handover(path) as handover, pytest.raises(OSError, match="cannot listen") as caught:
            listen(handover, port=port_of(sock))
    assert "'app.socket', and nothing called 'http'" in caught.value.__notes__[0]
