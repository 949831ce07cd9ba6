"""The listener's file: when it appears and with what mode, whose place it takes, which paths are too long, and who removes it."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import requires_seqpacket, running

from fdshare import Listener, any_user, connect, socketfile
from fdshare.rights import open_numbers
from fdshare.testing import Child, checked_child

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "sock")


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that every user can reach and write to, as /tmp is."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="fdshare-test-") as name:
        os.chmod(name, 0o1777)
        yield Path(name)


@pytest.fixture(params=["proc", "links"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How long paths are made short: through /proc, or as where there is none."""
    if request.param == "proc" and not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc here")
    monkeypatch.setattr(socketfile, "HAVE_PROC", request.param == "proc")
    return str(request.param)


def become_nobody() -> None:
    os.setgroups([])
    os.setregid(NOBODY, NOBODY)
    os.setreuid(NOBODY, NOBODY)


# mode


@pytest.mark.parametrize("umask", [0, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666])
def test_mode_whatever_the_umask(path: str, mode: int, umask: int) -> None:
    before = os.umask(umask)
    try:
        with Listener(path, mode=mode):
            assert stat.S_IMODE(os.stat(path).st_mode) == mode
    finally:
        os.umask(before)


def test_there_is_no_moment_at_which_a_stranger_could_come_in(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is linked to its place has its mode, and listens; until then it is where nobody else can go."""
    seen = []
    link = os.link

    def watched(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int, **options: Any) -> None:
        seen.append(target)
        assert stat.S_IMODE(os.fstat(src_dir_fd).st_mode) == 0o700
        assert stat.S_IMODE(os.stat(source, dir_fd=src_dir_fd).st_mode) == 0o640
        private = next(name for name in os.listdir(os.path.dirname(path)) if name.startswith(".sock-"))
        connect(os.path.join(os.path.dirname(path), private, source)).close()
        assert not os.path.lexists(path)
        link(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **options)

    monkeypatch.setattr(os, "link", watched)
    before = os.umask(0)
    try:
        with Listener(path, mode=0o640) as listener:
            listener.accept().close()
    finally:
        os.umask(before)
    assert seen == ["sock"]


def test_nothing_is_left_beside_it(path: str) -> None:
    directory = os.path.dirname(path)
    with Listener(path):
        assert os.listdir(directory) == ["sock"]
        with pytest.raises(OSError, match="listens here already"):
            Listener(path)
        assert os.listdir(directory) == ["sock"]
    assert os.listdir(directory) == []


@needs_root
@pytest.mark.parametrize(("mode", "who"), [(0o600, "denied"), (0o666, "in")])
def test_mode_keeps_another_user_out(public: Path, mode: int, who: str) -> None:
    path = str(public / "sock")
    with Listener(path, mode=mode, allow=any_user):
        assert checked_child(try_as_nobody, path, method="fork") == who


def try_as_nobody(path: str) -> str:
    become_nobody()
    try:
        connect(path, allow=any_user).close()
    except PermissionError as error:
        return "denied" if "mode" in str(error) else str(error)
    return "in"


# dead and live ones


LISTEN_AND_WAIT = (
    "import sys, fdshare; l = fdshare.Listener(sys.argv[1]); print('listens', flush=True); l.accept()"
)


@contextlib.contextmanager
def listening_process(path: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", LISTEN_AND_WAIT, path], stdout=subprocess.PIPE)
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"listens\n"
            yield process
        finally:
            process.kill()


def test_killed_listener_is_replaced_at_once(path: str) -> None:
    with listening_process(path) as process:
        with pytest.raises(OSError, match=r"process of uid \d+ listens here already.*sock") as caught:
            Listener(path)
        assert caught.value.errno == errno.EADDRINUSE
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert os.path.exists(path)
        with Listener(path) as listener, connect(path) as client, listener.accept() as server:
            client.send(1)
            assert server.recv() == 1
    assert not os.path.exists(path)


@requires_seqpacket
@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_socket_of_any_type_is_dead_or_alive(path: str, kind: int) -> None:
    """Also one that is bound and does not listen yet."""
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(path)
        with pytest.raises(OSError, match="listens here already"):
            Listener(path)
    Listener(path).close()
    assert not os.path.exists(path)


def test_asking_who_listens_is_not_a_visit(path: str) -> None:
    with Listener(path) as listener:
        with pytest.raises(OSError, match="listens here already"):
            Listener(path)
        with pytest.raises(TimeoutError):
            listener.accept(0.0)


@pytest.mark.parametrize("what", ["file", "directory", "link", "dangling"])
def test_what_is_no_socket_stays(path: str, what: str) -> None:
    if what == "file":
        Path(path).write_text("precious")
    elif what == "directory":
        os.mkdir(path)
    else:
        os.symlink("/etc/hostname" if what == "link" else "nowhere", path)
    with pytest.raises(OSError, match="no socket is in the way") as caught:
        Listener(path)
    assert caught.value.errno == errno.EADDRINUSE
    assert os.path.lexists(path)
    assert os.listdir(os.path.dirname(path)) == ["sock"]


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="directory of the socket is not there"):
        Listener(tmp_path / "missing" / "sock")


@requires_seqpacket
@needs_root
def test_another_users_directory_and_dead_socket(public: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(public / "dead"))
    os.chmod(public / "dead", 0o666)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as closed:
        closed.bind(str(public / "closed"))
    os.chmod(public / "closed", 0o600)
    os.mkdir(public / "locked", 0o755)
    errors = checked_child(listen_as_nobody, str(public), method="fork")
    assert errors == [
        ("dead", errno.EADDRINUSE, True),
        ("closed", errno.EADDRINUSE, True),
        ("locked/sock", errno.EACCES, True),
        ("mine", 0, True),
    ]
    assert sorted(os.listdir(public)) == ["closed", "dead", "locked"]


def listen_as_nobody(directory: str) -> list[tuple[str, int, bool]]:
    become_nobody()
    results = []
    for name, words in (
        ("dead", "another user"),
        ("closed", "cannot be asked"),
        ("locked/sock", "cannot make"),
    ):
        try:
            Listener(os.path.join(directory, name))
        except OSError as error:
            results.append((name, error.errno or 0, words in str(error)))
    with Listener(os.path.join(directory, "mine")) as listener:
        found = os.stat(listener.address)
        results.append(("mine", 0, (found.st_uid, stat.S_IMODE(found.st_mode)) == (NOBODY, 0o600)))
    return results


# several start at once


def start_one(path: str, barrier: threading.Barrier, won: list[Listener], lost: list[OSError]) -> None:
    barrier.wait()
    try:
        won.append(Listener(path))
    except OSError as error:
        lost.append(error)


@requires_seqpacket
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("count", [8])
def test_of_threads_that_start_at_once_one_wins(
    path: str, stale: bool, hard_links: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a dead listener's file as on a free path; also where the file system has no hard links."""
    if not hard_links:

        def refuse(source: str, target: str, **options: Any) -> None:
            raise OSError(errno.EPERM, "no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    for _ in range(10):
        if stale:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
                dead.bind(path)
        won: list[Listener] = []
        lost: list[OSError] = []
        start = functools.partial(start_one, path, threading.Barrier(count), won, lost)
        with running(*[start] * count):
            pass
        assert len(won) == 1
        assert {error.errno for error in lost} == {errno.EADDRINUSE}
        with won[0] as listener, connect(path) as client, listener.accept(20) as server:
            client.send(1)
            assert server.recv() == 1
        assert os.listdir(os.path.dirname(path)) == []


@requires_seqpacket
def test_of_processes_that_start_at_once_one_wins(path: str) -> None:
    for _ in range(3):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(path)
        go, said = os.pipe(), os.pipe()
        children = [Child(start_and_serve, path, go, said[1], method="fork") for _ in range(4)]
        os.close(go[0])
        os.close(go[1])  # the last one: the children's reads end
        os.close(said[1])
        with open(said[0], "rb", buffering=0) as results:
            assert sorted(results.read(1) for _ in children) == [b"l", b"l", b"l", b"w"]
        with connect(path, timeout=20) as client:
            client.send(1)
            assert client.recv() == 1
        for child in children:
            child.result()


def start_and_serve(path: str, go: tuple[int, int], said: int) -> None:
    os.close(go[1])
    os.read(go[0], 1)
    os.close(go[0])
    try:
        listener = Listener(path)
    except OSError as error:
        os.write(said, b"l" if error.errno == errno.EADDRINUSE else b"?")
        os.close(said)
        return
    os.write(said, b"w")
    os.close(said)
    with listener, listener.accept(20) as server:
        server.send(server.recv())


@requires_seqpacket
def test_foreign_lock_on_the_directory_means_nothing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for it, and of those who start over a dead listener's file still one wins."""
    import fcntl

    monkeypatch.setattr(socketfile, "LOCK_SECONDS", 1e9)
    directory = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        for _ in range(5):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
                dead.bind(path)
            won: list[Listener] = []
            lost: list[OSError] = []
            with running(*[functools.partial(start_one, path, threading.Barrier(4), won, lost)] * 4):
                pass
            assert (len(won), len(lost)) == (1, 3)
            won[0].close()
    finally:
        os.close(directory)


@requires_seqpacket
def test_start_between_another_ones_look_and_its_taking_keeps_its_place(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one has found a dead listener's file, and takes that of the faster one: it is given back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    take, first = socketfile._take, []

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(socketfile, "_take", take)
        monkeypatch.setattr(socketfile, "LOCK_SECONDS", 0.0)  # it would wait for the one that we are in
        first.append(Listener(path))
        take(*arguments)

    monkeypatch.setattr(socketfile, "_take", late)
    with pytest.raises(OSError, match="listens here already"):
        Listener(path)
    with first[0] as listener, connect(path), listener.accept(20):
        assert os.listdir(os.path.dirname(path)) == ["sock"]


@requires_seqpacket
def test_start_that_lost_its_place_says_so(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    confirm = socketfile._confirm

    def beaten(*arguments: Any) -> None:
        os.rename(path, path + ".lost")
        confirm(*arguments)

    monkeypatch.setattr(socketfile, "_confirm", beaten)
    with pytest.raises(OSError, match="has taken the place") as caught:
        Listener(path)
    assert caught.value.errno == errno.EADDRINUSE


# what is left of those that were killed, and interrupted


KILLED = """
import os, signal, sys, fdshare
from fdshare import socketfile
name = sys.argv[2]
if name == "mkdir":
    make = os.mkdir
    def die(*args, **options):
        make(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    os.mkdir = die
else:
    def die(*args, **options):
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(os if hasattr(os, name) else socketfile, name, die)
fdshare.Listener(sys.argv[1])
"""


@pytest.mark.parametrize("where", ["mkdir", "fchmod", "link", "rmdir", "_drop_old"])
def test_what_a_killed_start_leaves_is_swept_by_the_next(path: str, where: str) -> None:
    directory = os.path.dirname(path)
    if where == "_drop_old":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
    killed = subprocess.run([sys.executable, "-c", KILLED, path, where], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any(name.startswith(".sock-") for name in os.listdir(directory))
    if where == "rmdir":  # it had its place, and is dead
        assert os.path.exists(path)
    Listener(path).close()
    assert os.listdir(directory) == []


def test_only_what_is_nobodys_is_swept(path: str) -> None:
    """Not what another start holds, nor what belongs to others or only looks alike."""
    import fcntl

    directory = Path(path).parent
    for name in (".sock-0123abcd", ".sock-0123abce", ".sock-0123abcde", ".other-0123abcd"):
        (directory / name).mkdir(0o700)
    (directory / ".sock-0123abcf").symlink_to(directory / ".other-0123abcd")
    (directory / ".sock-0123abce").chmod(0o755)  # others may be in it
    held = os.open(directory / ".sock-0123abcd", os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)
        place = socketfile._Place(path, str(directory), "sock", os.open(directory, os.O_RDONLY))
        try:
            for name in place.private_ones():
                socketfile._sweep(place, name)
        finally:
            os.close(place.parent)
        left = {".sock-0123abcd", ".sock-0123abce", ".sock-0123abcde", ".other-0123abcd", ".sock-0123abcf"}
        assert set(os.listdir(directory)) == left
    finally:
        os.close(held)


class Interrupt(KeyboardInterrupt):
    pass


def _interrupted(path: str, stale: bool) -> int:
    """Interrupt a start at every step of it; return how many there were."""

    def interrupt(*_: object) -> None:
        raise Interrupt

    signal.signal(signal.SIGUSR1, interrupt)
    directory, step, done = os.path.dirname(path), 0, False
    before = len(open_numbers())
    while not done:
        step += 1
        if stale:
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(path)
        left = step

        def count(frame: Any, event: str, arg: object) -> None:
            nonlocal left
            if event in ("call", "c_return") and "fdshare" in frame.f_code.co_filename:
                if any(one.f_code.co_name == "__del__" for one in (frame, frame.f_back)):
                    return  # what is raised there is lost
                left -= 1
                if not left:
                    sys.setprofile(None)
                    os.kill(os.getpid(), signal.SIGUSR1)

        listener = None
        sys.setprofile(count)
        try:
            listener = Listener(path)
            sys.setprofile(None)
            done = True
        except Interrupt:
            pass
        finally:
            sys.setprofile(None)
            if listener is not None:
                listener.close()
        gc.collect()
        assert len(open_numbers()) == before, step
        assert [name for name in os.listdir(directory) if name != "sock"] == [], step
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return step


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("stale", [False, True])
def test_interrupt_at_any_step_leaves_nothing(path: str, stale: bool) -> None:
    handler = signal.getsignal(signal.SIGUSR1)
    try:
        assert _interrupted(path, stale) > 20
    finally:
        signal.signal(signal.SIGUSR1, handler)


# names in others' directories


@needs_root
@requires_seqpacket
def test_stranger_who_exchanges_names_gets_nothing_changed(
    public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root listens in his directory: after each call he puts his link in the place of what it has made."""
    os.chmod(public, 0o755)
    os.chown(public, NOBODY, NOBODY)
    victims = tmp_path / "victims"
    victims.mkdir(0o711)
    (victims / "sock").touch(0o600)
    (victims / "victim").touch(0o600)

    def exchanging(function: Any) -> Any:
        def wrapper(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            for name in os.listdir(public):
                found = os.lstat(public / name)
                if name.startswith(".sock-") and stat.S_ISDIR(found.st_mode) and found.st_uid == 0:
                    os.rename(public / name, public / f"moved{len(os.listdir(public))}")
                    os.symlink(victims, public / name)
            return result

        return wrapper

    for name in ("mkdir", "open", "fchmod", "chmod", "stat"):
        monkeypatch.setattr(os, name, exchanging(getattr(os, name)))
    try:
        Listener(str(public / "sock"), mode=0o666).close()
    except OSError:
        pass
    monkeypatch.undo()
    assert sorted(os.listdir(victims)) == ["sock", "victim"]
    for name, mode in (("sock", 0o600), ("victim", 0o600), (".", 0o711)):
        assert stat.S_IMODE(os.stat(victims / name).st_mode) == mode


# long paths


@requires_seqpacket
@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("name", ["s", "n" * 100, "ü" * 127])
@pytest.mark.parametrize("depth", [0, 5])
def test_path_of_any_length(tmp_path: Path, name: str, depth: int) -> None:
    directory = tmp_path.joinpath(*["d" * 200] * depth)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    for _ in range(2):
        dead = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with dead, socketfile.short_for_bind(str(directory / "dead")) as short:
            dead.bind(short)
        os.rename(directory / "dead", path)
        with Listener(path) as listener:
            assert os.listdir(directory) == [name]
            with pytest.raises(OSError, match="listens here already"):
                Listener(path)
            with connect(path) as client, listener.accept() as server:
                client.send(1)
                assert server.recv() == 1
        assert os.listdir(directory) == []
    with pytest.raises(FileNotFoundError, match="start the listener first"):
        connect(path)


@pytest.mark.usefixtures("ways")
def test_full_backlog_at_a_long_path(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 200)
    with contextlib.ExitStack() as stack, Listener(path, backlog=1) as listener:
        with contextlib.suppress(TimeoutError):
            while True:
                stack.enter_context(connect(path, timeout=0.0))
        with pytest.raises(TimeoutError):
            connect(path, timeout=0.02)
        with running(lambda: connect(path, timeout=20).close()):
            listener.accept(20).close()


def test_name_of_bytes(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe"
    with Listener(path) as listener, connect(path) as client, listener.accept() as server:
        client.send(1)
        assert server.recv() == 1
        assert os.fsencode(listener.address) == path


# the end


def test_close_after_the_directory_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with Listener("relative") as listener:
        assert listener.address == "relative"
        connect("relative").close()
        monkeypatch.chdir("/")
    assert not (tmp_path / "relative").exists()


@pytest.mark.parametrize("how", ["renamed away", "removed", "a file", "another listener"])
def test_what_took_its_place_is_not_removed(path: str, how: str) -> None:
    second: Any = None
    with Listener(path) as first:
        if how == "renamed away":
            os.rename(path, path + ".old")
        else:
            os.unlink(path)
        if how == "a file":
            Path(path).write_text("precious")
        elif how == "another listener":
            second = Listener(path)
        first.close()
    if how == "a file":
        assert Path(path).read_text() == "precious"
    elif how == "another listener":
        with second:
            connect(path).close()
        assert not os.path.exists(path)
    elif how == "renamed away":
        assert os.listdir(os.path.dirname(path)) == ["sock.old"]


@needs_root
def test_listener_that_gave_up_its_rights(public: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It cannot remove its file any more: it says so in the log, and closes."""
    os.chmod(public, 0o755)
    path = str(public / "sock")
    with Listener(path) as listener:
        assert "stays behind" in checked_child(close_as_nobody, listener, method="fork")
    assert not os.path.exists(path)


def close_as_nobody(listener: Listener) -> str:
    import logging

    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]  # the point
    logging.getLogger("fdshare").addHandler(handler)
    become_nobody()
    listener._owner = os.getpid()  # as if it had made the listener itself
    listener.close()
    assert listener.closed
    return " ".join(said)


# abstract names


needs_abstract = pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")


@needs_abstract
@pytest.mark.parametrize("length", [5, 107])
def test_abstract_name(length: int, tmp_path: Path) -> None:
    address = "\0" + f"fdshare-test-{os.getpid()}-{tmp_path}".ljust(length, "x")[-length:]
    with Listener(address) as listener:
        assert listener.address == address
        with pytest.raises(OSError, match="somebody has this abstract name") as caught:
            Listener(address)
        assert caught.value.errno == errno.EADDRINUSE
        with connect(address) as client, listener.accept() as server:
            client.send(1)
            assert server.recv() == 1
    with pytest.raises(ConnectionRefusedError, match="abstract name: start the listener first"):
        connect(address)
    Listener(address).close()


def test_at_sign_is_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As anything else that does not begin with a zero byte: nobody gets an abstract socket without asking for it."""
    monkeypatch.chdir(tmp_path)
    with Listener("@name"):
        assert (tmp_path / "@name").is_socket()


@pytest.mark.soak
def test_listeners_that_are_killed_and_started_again_and_again(tmp_path: Path) -> None:
    program = Path(__file__).with_name("listener_stress.py")
    environment = {**os.environ, "PYTHONPATH": str(program.parent.parent)}
    subprocess.run([sys.executable, program, tmp_path, "20"], check=True, timeout=50, env=environment)
    assert {"lock"} <= set(os.listdir(tmp_path)) <= {"lock", "sock"}
