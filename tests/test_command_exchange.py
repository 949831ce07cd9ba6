"""``fdshare send`` and ``fdshare recv``: with each other, with Python programs, and with programs that are not fdshare."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
from c_programs import CPrograms, compiled_programs
from command import COMMAND, ROOT, TIMEOUT, run, run_as_nobody, start
from helpers import requires_proc, wait_until
from unix_sockets import socket_kind, type_of

import fdshare
from fdshare import cli
from fdshare.command import exchange
from fdshare.command.arrivals import find_items, is_plain, listen_name, shortened

__all__ = ["compiled_programs", "socket_kind"]  # fixtures

PATIENCE = "--timeout=30"
CONTENT = b"what it holds\n"


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a file"
    path.write_bytes(CONTENT)
    return path


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err


def expect(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end of a process that must say nothing on standard error; return what it printed."""
    ended, out, err = finished(process)
    assert (ended, err) == (code, "")
    return out


# --- with each other ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["recv", "send"])
@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["channel", "raw"])
def test_pair_in_any_order(first: str, raw: list[str], address: str, file: Path, tmp_path: Path) -> None:
    commands = {
        "recv": ["recv", address, PATIENCE, *raw],
        "send": ["send", PATIENCE, *raw, address, file, tmp_path],
    }
    second = "send" if first == "recv" else "recv"
    with start(*commands[first]) as one, start(*commands[second]) as other:
        processes = {first: one, second: other}
        assert expect(processes["send"]) == ""
        out = expect(processes["recv"])
        sender = processes["send"].pid
    head, *lines = out.splitlines()
    assert head == f"message 1 from pid {sender} of uid {os.getuid()}: 2 descriptors"
    if raw:
        assert lines.pop(0) == r"  1 byte: b'\x00'"
    assert lines[0].split() == ["NAME", "KIND", "ACCESS", "OFFSET", "SIZE", "FLAGS", "WHAT"]
    names = ["0", "1"] if raw else [str(file), str(tmp_path)]
    assert lines[1].split() == [*names[0].split(), "file", "r", "0", str(len(CONTENT)), *str(file).split()]
    assert lines[2].split() == [names[1], "directory", "r", str(tmp_path)]
    assert len(lines) == 3
    assert not os.path.exists(address)


def test_send_listens_and_recv_connects(address: str, file: Path) -> None:
    options = ["--transport", "stream", PATIENCE]
    with start("send", address, file, "--listen", *options) as sender:
        out = run("recv", address, "--connect", "--cat", *options)
        assert (out.returncode, out.stdout.encode(), out.stderr) == (0, CONTENT, "")
        assert expect(sender) == ""
    assert not os.path.exists(address)


def test_standard_input(address: str, tmp_path: Path) -> None:
    """A pipe into ``send -`` comes out of ``recv --cat``, read by the receiver itself."""
    content = os.urandom(3 << 20)
    copy = tmp_path / "copy"
    with open(copy, "wb") as output, start("recv", address, "--cat", PATIENCE, stdout=output) as receiver:
        with subprocess.Popen([*COMMAND, "send", address, "-"], cwd=ROOT, stdin=subprocess.PIPE) as sender:
            assert sender.stdin is not None
            assert sender.wait(TIMEOUT) == 0  # the pipe outlives it
            sender.stdin.write(content)
        receiver.communicate(timeout=TIMEOUT)
    assert receiver.returncode == 0
    assert copy.read_bytes() == content


def test_modes(address: str, tmp_path: Path) -> None:
    """What is sent is open as asked for: here for appending, through a command on the other side."""
    log = tmp_path / "log"
    log.write_text("first\n")
    shell = ["sh", "-c", "echo second >&3"]
    with start("recv", address, PATIENCE, "--exec", *shell) as receiver:
        assert run("send", address, "--mode", "a", log).returncode == 0
        assert expect(receiver) == ""
    assert log.read_text() == "first\nsecond\n"


def test_abstract_name(file: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("abstract names exist on Linux only")
    name = f"@fdshare-test-{os.getpid()}"
    with start("recv", name, "--json", PATIENCE) as receiver:
        assert run("send", name, file, PATIENCE).returncode == 0
        assert json.loads(expect(receiver))["descriptors"][0]["name"] == str(file)
    with pytest.raises(FileNotFoundError):
        os.stat(ROOT / name)


def test_path_of_any_length(tmp_path: Path, file: Path) -> None:
    folder = tmp_path / ("x" * 150)
    folder.mkdir()
    with start("recv", folder / "socket", "--cat", PATIENCE) as receiver:
        assert run("send", folder / "socket", file, PATIENCE).returncode == 0
        assert expect(receiver).encode() == CONTENT


# --- with Python programs -----------------------------------------------------------------------------------


def test_python_program_receives(address: str, file: Path, tmp_path: Path) -> None:
    with fdshare.Listener(address) as listener, start("send", address, file, "--mode=r+", PATIENCE) as sender:
        with listener.accept(TIMEOUT) as channel:
            assert channel.peer.pid == sender.pid
            message = channel.recv(timeout=TIMEOUT)
            assert is_plain(message)
            ((name, received),) = message.items()
            assert name == str(file)
            assert isinstance(received, io.FileIO)
            with received:
                assert (received.name, received.mode, received.read()) == (str(file), "rb+", CONTENT)
            with pytest.raises(fdshare.PeerClosedError):
                channel.recv(timeout=TIMEOUT)
        assert expect(sender) == ""


@attrs.define
class Job:
    log: Any
    other: Any = None


def test_python_program_sends(address: str, file: Path) -> None:
    """Any message: everything with a descriptor is found and told of, once, and the rest is shortened."""
    with start("recv", address, "--json", PATIENCE) as receiver:
        wait_until(lambda: os.path.exists(address))
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            channel = enter(fdshare.connect(address))
            reader = enter(file.open())
            near, far = map(enter, socket.socketpair())
            reader.read(4)
            channel.send({"jobs": [1, {"input": reader}, reader], "text": "x" * 1000})
            channel.send([near, fdshare.move(far)])
            channel.send("nothing in it")
            channel.close()
        first, second, third = map(json.loads, expect(receiver).splitlines())
    assert [one["message"] for one in (first, second, third)] == [1, 2, 3]
    assert first["peer"] == {"pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid()}
    assert [(one["item"], one["kind"], one["offset"]) for one in first["descriptors"]] == [
        ("jobs.1.input", "file", 4)
    ]
    assert len(first["text"]) < 300
    assert [(one["item"], one["kind"], one["flags"]) for one in second["descriptors"]] == [
        ("0", "socket", []),
        ("1", "socket", []),
    ]
    assert (third["text"], third["descriptors"]) == ("'nothing in it'", [])


def test_count(address: str, file: Path) -> None:
    with start("recv", address, "--count", "2", PATIENCE) as receiver:
        wait_until(lambda: os.path.exists(address))
        with fdshare.connect(address) as channel:
            for number in range(2):
                channel.send(number)
            out = expect(receiver)  # though the channel stays open
    assert re.findall(r"^message (\d)", out, re.MULTILINE) == ["1", "2"]


def test_sender_waits_until_it_was_taken(address: str, file: Path) -> None:
    with fdshare.Listener(address) as listener:
        early = run("send", address, file, "--timeout", "0.2")
        assert (early.returncode, early.stdout) == (1, "")
        assert early.stderr == "fdshare send: the other side did not take it within 0.2 s\n"
        listener.accept(TIMEOUT).close()
        with start("send", address, file, PATIENCE) as sender, listener.accept(TIMEOUT) as channel:
            assert sender.poll() is None
            channel.recv(timeout=TIMEOUT)[str(file)].close()
            assert expect(sender) == ""


@pytest.mark.parametrize(
    ("accepted", "raw", "kind"),
    [
        (True, [], "seqpacket"),
        (False, [], "stream"),
        (True, ["--raw"], "stream"),
        (False, ["--raw"], "seqpacket"),
    ],
)
def test_other_side_closes_before_it_took_anything(
    accepted: bool, raw: list[str], kind: str, address: str, file: Path
) -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, type_of(kind)))
        listener.bind(address)
        listener.listen()
        sender = stack.enter_context(start("send", address, file, PATIENCE, "--transport", kind, *raw))
        fdshare.wait([listener], TIMEOUT)
        if accepted:
            peer, _ = listener.accept()
            with peer:
                fdshare.wait([peer], TIMEOUT)
        else:
            listener.close()
        code, out, err = finished(sender)
    assert (code, out) == (1, "")
    assert err == "fdshare send: the other side closed before it had taken everything\n"


def test_another_user_is_refused(file: Path) -> None:
    """An abstract name lets everybody connect, and both sides look who the other is."""
    if sys.platform != "linux":
        pytest.skip("abstract names exist on Linux only")
    name = f"@fdshare-refusal-{os.getpid()}"
    with start("recv", name, "--cat", PATIENCE) as receiver:
        # Of what nobody may read there is enough without the checkout.
        refused = run_as_nobody("send", name, "/dev/null", PATIENCE)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert refused.stderr.count("\n") == 1
        assert "is not trusted here: uid 0" in refused.stderr
        assert run("send", name, file, PATIENCE).returncode == 0
        assert expect(receiver).encode() == CONTENT


@pytest.mark.parametrize("connects", ["send", "recv"])
def test_raw_at_an_abstract_name_is_for_one_user(connects: str, file: Path) -> None:
    """Unless it was asked for: such a name has no mode that would keep others out."""
    if sys.platform != "linux":
        pytest.skip("abstract names exist on Linux only")
    name = f"@fdshare-raw-{connects}-{os.getpid()}"
    listening = ["send", name, str(file), "--listen"] if connects == "recv" else ["recv", name, "--cat"]
    calling = ["recv", name, "--connect", "--cat"] if connects == "recv" else ["send", name, "/dev/null"]
    with start(*listening, "--raw", PATIENCE) as listener:
        refused = run_as_nobody(*calling, "--raw", PATIENCE)
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "another user listens at" in refused.stderr
        insists = run_as_nobody(*calling, "--raw", "--any-user", PATIENCE)  # and the other side does not
        assert (insists.returncode, insists.stdout) == (1, "")
        own = run(*calling, "--raw", PATIENCE)
        assert own.returncode == 0, own.stderr
        assert listener.wait(TIMEOUT) == 0
    with start(*listening, "--raw", "--any-user", PATIENCE) as listener:
        both = run_as_nobody(*calling, "--raw", "--any-user", PATIENCE)
        assert both.returncode == 0, both.stderr
        assert listener.wait(TIMEOUT) == 0


def test_strangers_without_end_do_not_keep_a_raw_receiver_beyond_its_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enough = 100
    with contextlib.ExitStack() as stack, socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")  # at an abstract name that the kernel chooses
        listener.listen(enough + 1)
        came: list[socket.socket] = []

        def refuse(meeting: exchange.Meeting, sock: socket.socket, name: object) -> bool:
            if len(came) < enough:
                came.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
                came[-1].connect(listener.getsockname())
            return False

        monkeypatch.setattr(exchange.Meeting, "admits", refuse)
        meeting = exchange.Meeting(
            address=f"fd:{listener.fileno()}",
            listens=True,
            raw=True,
            any_user=False,
            transport=None,
            timeout=0,
        )
        refuse(meeting, listener, b"")
        with pytest.raises(TimeoutError, match="nobody connected"):
            exchange._accept_raw(meeting, "stream")
    assert len(came) < enough


def test_raw_at_a_path_is_for_whom_the_mode_lets_in(address: str, file: Path) -> None:
    with start("recv", f"{address}", "--raw", "--cat", PATIENCE) as receiver:
        assert run("send", address, file, "--raw", PATIENCE).returncode == 0
        assert expect(receiver).encode() == CONTENT


def test_garbage_is_one_line(address: str) -> None:
    with start("recv", address, "--transport=stream", PATIENCE) as receiver:
        wait_until(lambda: os.path.exists(address))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(address)
            sock.sendall(os.urandom(1000))
            code, out, err = finished(receiver)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith("fdshare recv: ")


def test_peer_that_sends_nothing(address: str) -> None:
    for raw in ([], ["--raw", "--transport=seqpacket"]):
        with start("recv", address, PATIENCE, *raw) as receiver:
            wait_until(lambda: os.path.exists(address))
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(address)
            result = finished(receiver)
        assert result == (1, "", "fdshare recv: the other side closed without sending anything\n")


# --- with programs that are not fdshare ---------------------------------------------------------------------


def test_c_program_sends(c_programs: CPrograms, kind: str, address: str, file: Path) -> None:
    """Three messages of two descriptors: of a stream they may run together, and no descriptor is lost."""
    with start("recv", address, "--raw", "--transport", kind, "--json", PATIENCE) as receiver:
        wait_until(lambda: os.path.exists(address))
        with c_programs.start("send_many", f"connect:{kind}:{address}", 2, 3, file, file) as peer:
            peer.finish()
        arrivals = [json.loads(line) for line in expect(receiver).splitlines()]
    names = [one["item"] for arrival in arrivals for one in arrival["descriptors"]]
    assert len(names) == 6
    assert arrivals[0]["peer"]["pid"] == peer.pid
    if kind == "seqpacket":
        assert [(one["text"], len(one["descriptors"])) for one in arrivals] == [(r"1 byte: b'\x02'", 2)] * 3


@pytest.mark.parametrize(("listens", "kind"), [(True, "stream"), (False, "seqpacket")])
def test_c_program_receives(
    c_programs: CPrograms, kind: str, listens: bool, address: str, file: Path
) -> None:
    options = ["--raw", "--transport", kind, "--data", "some text", PATIENCE]
    if listens:
        with c_programs.start("recv_one", f"listen:{kind}:{address}") as peer:
            peer.wait_for_line("listening")
            assert run("send", address, file, *options).returncode == 0
            printed = peer.finish()
    else:
        with start("send", address, file, "--listen", *options) as sender:
            wait_until(lambda: os.path.exists(address))
            with c_programs.start("recv_one", f"connect:{kind}:{address}") as peer:
                printed = peer.finish()
            assert expect(sender) == ""
    assert printed == (CONTENT.decode(), "some text")


def test_more_descriptors_than_one_message_takes(c_programs: CPrograms, address: str, tmp_path: Path) -> None:
    files = [tmp_path / str(n) for n in range(300)]
    for path in files:
        path.write_text(f"{path.name} ")
    with c_programs.start("recv_many", f"listen:seqpacket:{address}") as peer:
        peer.wait_for_line("listening")
        sent = run("send", address, *files, "--raw", "--transport=seqpacket", PATIENCE)
        assert (sent.returncode, sent.stderr) == (0, "")
        out, _ = peer.finish()
    assert out.split("1 253\n")[1].replace("1 47\n", "").split() == [str(n) for n in range(300)]


def test_python_without_fdshare(kind: str, address: str, file: Path) -> None:
    """The standard library's send_fds and recv_fds."""
    options = ["--raw", "--transport", kind, PATIENCE]
    with socket.socket(socket.AF_UNIX, type_of(kind)) as listener:
        listener.bind(address)
        listener.listen()
        with start("send", address, file, "--data=x", *options) as sender:
            sock, _ = listener.accept()
            with sock:
                data, fds, _, _ = socket.recv_fds(sock, 100, 10)
                with open(fds[0], "rb") as received:
                    assert (data, len(fds), received.read()) == (b"x", 1, CONTENT)
            assert expect(sender) == ""
    os.unlink(address)
    with start("recv", address, "--cat", *options) as receiver:
        wait_until(lambda: os.path.exists(address))
        with socket.socket(socket.AF_UNIX, type_of(kind)) as sock, open(file, "rb") as given:
            sock.connect(address)
            socket.send_fds(sock, [b"data"], [given.fileno()])
        assert expect(receiver).encode() == CONTENT


# --- copying ------------------------------------------------------------------------------------------------


def test_cat_of_several(address: str, file: Path) -> None:
    """One after the other, from its own offset, with what was read ahead of a stream; also a pipe that does not block."""
    with start("recv", address, "--cat", PATIENCE) as receiver, contextlib.ExitStack() as stack:
        wait_until(lambda: os.path.exists(address))
        seeked = stack.enter_context(open(file, "rb"))
        seeked.seek(5)
        reader, writer = os.pipe()
        os.write(writer, b"ahead\nof it\n")
        stream = open(reader, "rb")  # noqa: SIM115 -- moved
        assert stream.readline() == b"ahead\n"
        slow, slow_writer = os.pipe2(os.O_NONBLOCK)
        late = stack.enter_context(open(slow_writer, "wb", buffering=0))
        with fdshare.connect(address) as channel, fdshare.FdHandle(slow) as handle:
            channel.send([seeked, fdshare.move(stream), handle])
        os.write(writer, b"the stream's end\n")
        os.close(writer)
        assert receiver.stdout is not None
        lines = [receiver.stdout.readline() for _ in range(3)]
        late.write(b"late\n")
        late.close()
        lines.append(receiver.stdout.readline())
        assert expect(receiver) == ""
    assert lines == [CONTENT[5:].decode(), "of it\n", "the stream's end\n", "late\n"]


def test_cat_of_what_cannot_be_read(address: str, file: Path, tmp_path: Path) -> None:
    for what, mode, why in ((tmp_path, "r", "it is a directory"), (file, "a", "it is not open for reading")):
        with start("recv", address, "--cat", PATIENCE) as receiver:
            assert run("send", address, what, "--mode", mode, PATIENCE).returncode == 0
            assert finished(receiver) == (1, "", f"fdshare recv: {what} cannot be read: {why}\n")


def test_cat_into_a_reader_that_has_gone(address: str) -> None:
    with start("recv", address, "--cat", PATIENCE) as receiver:
        assert receiver.stdout is not None
        receiver.stdout.close()
        assert run("send", address, "/dev/zero", PATIENCE).returncode == 0
        assert receiver.stderr is not None
        assert (receiver.stderr.read(), receiver.wait(TIMEOUT)) == ("", 141)


# --- handing on ---------------------------------------------------------------------------------------------

SHOW = """
import json, os, signal, sys
names = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")
read = [os.read(3 + n, 100).decode() for n in range(int(os.environ["LISTEN_FDS"]))]
print(json.dumps({
    "pid": os.getpid(), "arguments": sys.argv[1:], "read": read,
    "environment": {name: os.environ.get(name) for name in names},
    "open": [n for n in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{n}")],
    "inherited": [os.get_inheritable(3 + n) for n in range(len(read))],
    "ignored": [s.name for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN],
}))
sys.exit(7)
"""


def test_exec(address: str, tmp_path: Path) -> None:
    """Systemd's way: from 3 on, by name; whatever numbers the descriptors had, and whatever was inherited in their place."""
    names = ["a:b", "plain", "ümlaut"]
    for name in names:
        (tmp_path / name).write_text(name)
    with contextlib.ExitStack() as stack:
        given = [stack.enter_context(open(os.devnull)).fileno() for _ in range(3)]
        shell = [
            "sh",
            "-c",
            'exec "$@" 3<&- 4</dev/null',
            "sh",
            *COMMAND,
            "recv",
            address,
            PATIENCE,
            "--exec",
        ]
        shell += [sys.executable, "-S", "-c", SHOW, "--json", "-x"]
        process = subprocess.Popen(
            shell,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=given,
            env={**os.environ, "LISTEN_PIDFDID": "1", "LISTEN_FDS": "99"},
        )
        stack.enter_context(process)
        assert run("send", address, *(tmp_path / name for name in names), PATIENCE).returncode == 0
        shown = json.loads(expect(process, code=7))
    assert shown["read"] == names
    assert shown["environment"] == {
        "LISTEN_FDS": "3",
        "LISTEN_PID": str(process.pid),
        "LISTEN_FDNAMES": "a_b:plain:_mlaut",
        "LISTEN_PIDFDID": None,
    }
    assert shown["pid"] == process.pid
    assert shown["arguments"] == ["--json", "-x"]
    assert set(shown["open"]) == {0, 1, 2, 3, 4, 5, *given}
    assert shown["inherited"] == [True] * 3
    assert not os.path.exists(address)


def test_exec_of_a_program_that_knows_listen_fds(address: str, file: Path) -> None:
    code = "import fdshare; [(name, handle)] = fdshare.listen_fds(); print(name, handle.to_file().read())"
    with start("recv", address, PATIENCE, "--exec", sys.executable, "-W", "ignore", "-c", code) as receiver:
        assert run("send", address, file, PATIENCE).returncode == 0
        assert expect(receiver) == f"{file.name} {CONTENT!r}\n"


def test_exec_leaves_the_signals_as_they_were(address: str) -> None:
    """Python ignores SIGPIPE; a command that inherited that would go on writing to nobody."""
    shell = ["sh", "-c", "yes; echo $? >&2"]
    with start("recv", address, PATIENCE, "--exec", *shell) as receiver:
        assert receiver.stdout is not None
        receiver.stdout.close()
        assert run("send", address, os.devnull, PATIENCE).returncode == 0
        assert receiver.stderr is not None
        assert receiver.stderr.read() == "141\n"


CLOSED = ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"]
"""Standard streams that whoever starts the command has closed."""


def with_closed(closed: str, *arguments: object) -> subprocess.Popen[str]:
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *COMMAND, *map(str, arguments)]
    return subprocess.Popen(
        shell, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


TELL = """
import os, sys
path = sys.argv[1]
with open(path + ".new", "w") as file:
    for number in range(5):
        file.write(os.readlink(f"/proc/self/fd/{number}") + "\\n")
os.rename(path + ".new", path)
"""


@requires_proc
@pytest.mark.parametrize("closed", CLOSED)
@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["channel", "raw"])
def test_exec_and_send_with_closed_standard_streams(
    closed: str, raw: list[str], address: str, tmp_path: Path
) -> None:
    """Neither prints anything, and no descriptor on its way may take the place of a standard stream."""
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
    files = [tmp_path / "first", tmp_path / "second"]
    told = tmp_path / "told"
    tell = [sys.executable, "-S", "-c", TELL, told]
    with (
        with_closed(closed, "recv", *raw, address, PATIENCE, "--exec", *tell) as receiver,
        with_closed(closed, "send", *raw, address, PATIENCE, *files) as sender,
    ):
        expect(sender)
        expect(receiver)
    standard, given = told.read_text().splitlines()[:3], told.read_text().splitlines()[3:]
    assert given == [str(file) for file in files]
    assert all(name.startswith(("/dev/null", "pipe:")) for name in standard)
    for number, how in enumerate(CLOSED[:3]):
        assert how not in closed.split() or standard[number] == "/dev/null"


@pytest.mark.parametrize("name", ["-", "fd:0"])
def test_a_closed_standard_input_is_not_sent(name: str, address: str) -> None:
    with with_closed("<&-", "send", address, PATIENCE, name) as sender:
        code, _, err = finished(sender)
    assert code == 1
    assert "standard input is closed" in err or "descriptor 0: Bad file descriptor" in err


def test_a_receiver_that_cannot_print_takes_nothing(address: str, file: Path) -> None:
    for arguments in (["recv", address], ["recv", "--cat", address], ["--help"], ["send", "--help"]):
        with with_closed(">&-", *arguments) as process:
            assert finished(process) == (1, "", "fdshare: the standard output is closed\n")
    assert not os.path.exists(address)


def test_exec_of_what_is_not_there(address: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is noticed before anything was taken, and the codes are those of a shell."""
    missing = run("recv", address, "--exec", "no-such-command")
    assert (missing.returncode, missing.stdout) == (127, "")
    assert missing.stderr == "fdshare recv: no-such-command: No such file or directory\n"
    assert cli.main(["recv", address, "--exec", str(file)]) == 126
    assert capsys.readouterr().err == f"fdshare recv: {file}: Permission denied\n"
    assert not os.path.exists(address)


def test_exec_refuses_what_was_read_ahead(address: str) -> None:
    with start("recv", address, PATIENCE, "--exec", "true") as receiver:
        wait_until(lambda: os.path.exists(address))
        with fdshare.connect(address) as channel:
            reader, writer = os.pipe()
            os.write(writer, b"one\ntwo\n")
            os.close(writer)
            stream = open(reader, "rb")  # noqa: SIM115 -- moved
            stream.readline()
            channel.send({"stream": fdshare.move(stream)})
        code, _, err = finished(receiver)
    assert code == 1
    assert "read ahead of stream" in err


@pytest.mark.parametrize(("soft", "left"), [(20, 299), (400, 400)])
def test_soft_limit_of_descriptors(soft: int, left: int, address: str, tmp_path: Path) -> None:
    """It is raised for what passes through, and is for the command what it was, where that leaves it room."""
    files = [tmp_path / str(n) for n in range(40)]
    for path in files:
        path.touch()

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, 500))

    shell = ["sh", "-c", "ulimit -S -n; ulimit -H -n; echo $LISTEN_FDS"]
    with start("recv", address, PATIENCE, "--exec", *shell, preexec_fn=lower) as receiver:
        sent = run("send", address, *files, PATIENCE, preexec_fn=lower)
        assert (sent.returncode, sent.stderr) == (0, "")
        assert expect(receiver).split() == [str(left), "500", "40"]


# --- by number ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [[], ["--raw"]], ids=["channel", "raw"])
def test_inherited_listening_socket(raw: list[str], address: str, file: Path) -> None:
    """As of a service manager; its file is not ours to remove."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        number = listener.fileno()
        with start("recv", f"fd:{number}", "--cat", PATIENCE, *raw, pass_fds=[number]) as receiver:
            assert run("send", address, file, "--transport=stream", PATIENCE, *raw).returncode == 0
            assert expect(receiver).encode() == CONTENT
    assert os.path.exists(address)


def test_descriptor_by_number(address: str, file: Path) -> None:
    near, far = socket.socketpair()
    with near, far, start("recv", address, "--json", PATIENCE) as receiver:
        number = far.fileno()
        assert run("send", address, f"fd:{number}", PATIENCE, pass_fds=[number]).returncode == 0
        (told,) = json.loads(expect(receiver))["descriptors"]
    assert (told["item"], told["kind"], told["socket"]["family"]) == (f"fd:{number}", "socket", "unix")
    assert (os.getpid(), near.fileno()) in [
        (peer["pid"], peer["fd"]) for peer in told["peers"]
    ] or near.fileno() < 0


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["send", "s", "fd:77"], "descriptor 77: Bad file descriptor"),
        (["send", "s", "fd:99999999999"], "descriptor 99999999999: Bad file descriptor"),
        (["recv", "fd:77"], "descriptor 77: Bad file descriptor"),
        (["send", "s", "/nowhere/x"], "No such file or directory: '/nowhere/x'"),
        (["send", "s", "--mode=w", "/"], "Is a directory: '/'"),
        (["send", "s", "--mode=x", "/dev/null"], "File exists: '/dev/null'"),
        (["send", "/nowhere/s", "/dev/null", "--timeout=0"], "nobody listens here"),
        (["recv", "/nowhere/s"], "cannot make a socket here"),
        (["recv", "s", "--timeout=0.01"], "nobody connected to s within 0.01 s"),
        (["recv", "s", "--raw", "--timeout=0.01"], "nobody connected to s within 0.01 s"),
        (["recv", "s", "--connect", "--timeout=0"], "nobody listens here"),
    ],
)
def test_failures(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(arguments) == cli.FAILED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"fdshare {arguments[0]}: {line}")
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before


# --- waiting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code", "raw"),
    [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, []), (signal.SIGINT, 130, ["--raw"])],
)
def test_interrupt_while_nobody_comes(number: int, code: int, raw: list[str], address: str) -> None:
    with start("recv", address, *raw) as receiver:
        wait_until(lambda: os.path.exists(address) and is_asleep(receiver.pid))
        receiver.send_signal(number)
        assert finished(receiver) == (code, "", "")
    assert not os.path.exists(address)


def is_asleep(pid: int) -> bool:
    """Whether the process waits for something."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_silent_peer(address: str) -> None:
    with start("recv", address, "--timeout", "0.3") as receiver:
        wait_until(lambda: os.path.exists(address))
        with fdshare.connect(address):
            assert finished(receiver) == (1, "", "fdshare recv: the other side sent nothing within 0.3 s\n")


def test_person_at_a_terminal_is_told(address: str, file: Path) -> None:
    """And nobody else: see the empty standard error everywhere above."""
    for arguments, text in (
        (["send", address, file], "waiting for somebody"),
        (["recv", address], "listening at"),
    ):
        master, slave = pty.openpty()
        with open(master, "rb", buffering=0) as terminal, start(*arguments, stderr=slave) as process:
            os.close(slave)
            assert f"fdshare: {text}" in terminal.read(100).decode()
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=TIMEOUT)
            assert process.returncode == 130


# --- called wrongly -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "send",
        "send s",
        "send s x x",
        "send s - stdin",
        "send s x --mode=rb",
        "send s x --data=x",
        "send s x --raw --data=",
        "send s x --any-user",
        "send fd:3 x",
        "send s x --timeout=-1",
        "send s x --timeout=inf",
        "send s x --transport=tcp",
        "recv",
        "recv s x",
        "recv s --cat --json",
        "recv s --cat --exec true",
        "recv s --exec",
        "recv s --count=0",
        "recv fd:3 --connect",
    ],
)
def test_wrong_call(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1


def test_empty_address() -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["recv", ""])


# --- what is in a message -----------------------------------------------------------------------------------


@pytest.fixture
def three() -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(open(os.devnull)) for _ in range(3)]


def test_items_are_found_wherever_they_are(three: list[Any]) -> None:
    a, b, c = three
    cyclic: dict[str, Any] = {"job": Job(a, (b, [c, b]))}
    cyclic["self"] = cyclic
    assert [(item.name, item.thing) for item in find_items(cyclic)] == [
        ("job.log", a),
        ("job.other.0", b),
        ("job.other.1.0", c),
    ]
    assert [item.name for item in find_items(a)] == ["message"]
    assert find_items({"text": "x", "number": 1, "none": None}) == []


def test_closed_and_very_deep_things_are_left_out() -> None:
    with open(os.devnull) as file:
        deep: Any = file
        for _ in range(1000):
            deep = [deep]
        assert find_items(deep) == []
    assert find_items([file, io.BytesIO()]) == []


def test_names_for_listen_fdnames() -> None:
    assert [
        listen_name(name) for name in ("/a/b.txt", "x:y", "é\n", "/a/b/", "", "stdin", "/", "z" * 300)
    ] == [
        "b.txt",
        "x_y",
        "__",
        "b",
        "unknown",
        "stdin",
        "/",
        "z" * 255,
    ]


def test_long_messages_are_shortened() -> None:
    assert len(shortened({str(n): list(range(1000)) for n in range(1000)})) < 1000
    assert len(shortened(b"x" * 10**6)) < 100
