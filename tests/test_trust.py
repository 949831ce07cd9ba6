"""What docs/trust.md says, where no other test holds it: its code, and facts about the kernel that the page builds on."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fdshare import FdHandle, Listener, NotSendableError, connect, same_user
from fdshare.credentials import peer_credentials

PAGE = Path(__file__).resolve().parent.parent / "docs" / "trust.md"
CLONE_NEWUSER = 0x10000000
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


def become(uid: int) -> None:
    os.setgroups([])
    os.setregid(uid, uid)
    os.setreuid(uid, uid)


def in_child(function: Callable[[], object], *, uid: int | None = None) -> int:
    """Run ``function`` in a forked child, as another user; return its exit status: 0, or 1 where it raised."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if uid is not None:
                become(uid)
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- the page's own code ----------------------------------------------------------------------------------------------


def test_code_of_the_page(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    found: dict[str, object] = {"__name__": "page"}
    exec(compile(code, "page", "exec", dont_inherit=True), found)
    server, client, opened, wanted = (found[name] for name in ("server", "client", "Opened", "Open"))
    path = str(tmp_path / "opener")
    (tmp_path / "file").write_text("content")
    with (
        Listener(path, codec=server) as listener,
        connect(path, codec=client) as here,
        listener.accept(10) as there,
    ):  # type: ignore[arg-type]  # of a page
        here.send(wanted("file"))  # type: ignore[operator]  # of a page
        request = there.recv(timeout=10)
        with FdHandle(os.open(tmp_path / request.path, os.O_RDONLY)) as handle:
            there.send(opened(handle))  # type: ignore[operator]  # of a page
        with here.recv(timeout=10).file as file:
            assert os.read(file.fileno(), 100) == b"content"
        with FdHandle(os.open(tmp_path / "file", os.O_RDWR)) as handle, pytest.raises(NotSendableError):
            there.send(opened(handle))  # type: ignore[operator]  # of a page
        with (
            FdHandle(os.open(tmp_path / "file", os.O_RDONLY)) as handle,
            pytest.raises(ValueError, match="send_fds is 0"),
        ):
            here.send(opened(handle))  # type: ignore[operator]  # of a page


def test_what_the_page_links_to_is_there() -> None:
    text = PAGE.read_text()
    for name in re.findall(r"`((?:examples|tests|docs|fdshare)/[\w./]+)`", text):
        assert (PAGE.parent.parent / name).exists(), name
    targets = set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    assert set(re.findall(r"\]\(#([\w-]+)\)", text)) <= targets


# --- who is there -----------------------------------------------------------------------------------------------------


@needs_root
def test_credentials_are_of_the_time_of_the_connection() -> None:
    """Whoever connected as root still shows as root."""
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def drop() -> None:
            become(NOBODY)
            assert peer_credentials(theirs).uid == 0
            theirs.send(b"x")

        assert in_child(drop) == 0
        assert ours.recv(1) == b"x"
        assert peer_credentials(ours).uid == 0


def _server_in_a_namespace(address: str, ready: FdHandle) -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER):
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        os.chmod(address, 0o777)
        listener.listen()
        with ready:
            os.write(ready.fileno(), b"x")
        connection, _ = listener.accept()
        with connection:
            peer = peer_credentials(connection)
    return f"{peer.uid == os.geteuid()} {same_user(peer)}"


@needs_root
def test_user_without_a_number_is_nobodys_own(tmp_path: Path) -> None:
    """In a user namespace without a map everybody shows as 65534, this process itself too."""
    if not os.path.exists("/proc/self/uid_map"):
        pytest.skip("no user namespaces here")
    reader, writer = map(FdHandle, os.pipe())
    tmp_path.chmod(0o777)
    for parent in list(tmp_path.parents)[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    address = str(tmp_path / "s")

    def stranger() -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            sock.recv(1)

    with reader:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                reader.close()
                result = _server_in_a_namespace(address, writer)
                status = {"True False": 0, f"unshare: {os.strerror(errno.EPERM)}": 2}.get(result, 1)
            finally:
                os._exit(status)
        writer.close()
        if os.read(reader.fileno(), 1):
            assert in_child(stranger, uid=1234) == 0
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == 2:
        pytest.skip("user namespaces are not allowed here")
    assert status == 0


# --- what is in the nature of descriptors ---------------------------------------------------------------------------------


@needs_root
def test_read_only_descriptor_is_opened_again_by_who_may_write(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    with FdHandle(os.open(path, os.O_RDONLY)) as handle:

        def again() -> None:
            os.close(os.open(f"/proc/self/fd/{handle.fileno()}", os.O_RDWR))

        path.chmod(0o644)
        assert in_child(again, uid=NOBODY) == 1
        path.chmod(0o666)
        assert in_child(again, uid=NOBODY) == 0


@needs_root
def test_directory_leads_out_of_a_chroot(tmp_path: Path) -> None:
    """Which is why a directory must be declared."""
    (tmp_path / "empty").mkdir()
    with FdHandle(os.open("/", os.O_RDONLY)) as root:

        def escape() -> None:
            os.chroot(tmp_path / "empty")
            os.chdir("/")
            become(NOBODY)
            assert os.listdir("/") == []
            os.fchdir(root.fileno())
            assert "etc" in os.listdir(".")

        assert in_child(escape) == 0


def test_terminal_can_be_read_by_whoever_has_it() -> None:
    """In a session of its own, too; typing into it is another matter."""
    master, slave = map(FdHandle, os.openpty())
    with master, slave:

        def read() -> None:
            os.setsid()
            assert os.read(slave.fileno(), 100) == b"secret\n"

        os.write(master.fileno(), b"secret\n")
        assert in_child(read) == 0


def test_flags_of_a_description_are_the_senders_too(tmp_path: Path) -> None:
    reader, writer = map(FdHandle, os.pipe())
    with reader, writer, FdHandle.dup(reader) as other:
        flags = fcntl.fcntl(other.fileno(), fcntl.F_GETFL)
        fcntl.fcntl(other.fileno(), fcntl.F_SETFL, flags | os.O_NONBLOCK)
        with pytest.raises(BlockingIOError):
            os.read(reader.fileno(), 1)
