"""The examples of hot restarts as real processes: one generation after the other, each with its own words."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from handovers import reserved_port

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 40.0

EXAMPLES = {"hot_restart_asyncio.py": r"serves http", "hot_restart_uvicorn.py": r"serves at"}


class Program:
    def __init__(self, name: str, *arguments: object) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )
        self.output = ""

    def wait_for(self, pattern: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if re.search(pattern, line):
                return
        pytest.fail(f"it ended without a word of {pattern!r}:\n{self.output}")

    def ended(self) -> int:
        output, _ = self.process.communicate(timeout=TIMEOUT)
        self.output += output
        return self.process.returncode

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self.process:
            if self.process.poll() is None:
                self.process.kill()


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=TIMEOUT) as answer:
        return str(answer.read().decode())


@pytest.mark.parametrize("name", EXAMPLES)
def test_generations_of_an_example(name: str, tmp_path: Path, stack: ExitStack) -> None:
    if "uvicorn" in name:
        pytest.importorskip("uvicorn")
    port = stack.enter_context(reserved_port())
    arguments = ["--port", port, "--control", tmp_path / "control"]
    first = stack.enter_context(Program(name, *arguments, "--greeting", "first"))
    first.wait_for(EXAMPLES[name])
    assert ask(port) == f"first from {first.process.pid}\n"

    crashed = stack.enter_context(Program(name, *arguments, "--crash"))
    assert crashed.ended() != 0
    assert "as I was told" in crashed.output
    assert ask(port) == f"first from {first.process.pid}\n"

    # An idle connection moves: its next request is answered by the next generation.
    idle = stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT))
    words = idle.makefile("rb")
    stack.callback(words.close)
    idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = read_answer(words)
    assert answer == f"first from {first.process.pid}\n".encode()

    second = stack.enter_context(Program(name, *arguments, "--greeting", "second"))
    second.wait_for(EXAMPLES[name])
    assert first.ended() == 0, first.output
    assert ask(port) == f"second from {second.process.pid}\n"
    idle.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert read_answer(words) == f"second from {second.process.pid}\n".encode()
    assert words.read() == b""
    words.close()
    idle.close()

    second.process.send_signal(signal.SIGHUP)  # the third is its own doing, and nobody's child
    second.wait_for("generation 2|Generation 2")
    third = re.findall(r"from (\d+)", ask(port))[0]
    assert int(third) not in (first.process.pid, second.process.pid)
    os.kill(int(third), signal.SIGTERM)
    second.ended()
    assert not (tmp_path / "control").exists()


def test_generations_of_the_gunicorn_example(tmp_path: Path, stack: ExitStack) -> None:
    pytest.importorskip("gunicorn")
    port = stack.enter_context(reserved_port())
    arguments = ["--port", port, "--control", tmp_path / "control", "--workers", 1]
    first = stack.enter_context(Program("hot_restart_gunicorn.py", *arguments, "--greeting", "first"))
    first.wait_for("Booting worker")
    assert ask(port).startswith("first from ")
    crashed = stack.enter_context(Program("hot_restart_gunicorn.py", *arguments, "--crash"))
    assert crashed.ended() != 0
    assert "as_I_was_told" in crashed.output
    assert ask(port).startswith("first from ")
    second = stack.enter_context(Program("hot_restart_gunicorn.py", *arguments, "--greeting", "second"))
    second.wait_for("Booting worker")
    assert first.ended() == 0, first.output
    assert ask(port).startswith("second from ")
    second.process.terminate()
    assert second.ended() == 0
    assert not (tmp_path / "control").exists()


def ask_at(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TIMEOUT)
        sock.connect(os.fspath(path))
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        with sock.makefile("rb") as words:
            return read_answer(words).decode()


def test_gunicorn_at_a_path_keeps_the_file(tmp_path: Path, stack: ExitStack) -> None:
    pytest.importorskip("gunicorn")
    path, control = tmp_path / "app.sock", tmp_path / "control"
    arguments = ["--uds", path, "--control", control, "--workers", 1]
    first = stack.enter_context(Program("hot_restart_gunicorn.py", *arguments, "--greeting", "first"))
    first.wait_for(f"Listening at: unix:{path} ")
    first.wait_for("Booting worker")
    assert ask_at(path).startswith("first from ")
    found = path.stat()
    assert found.st_mode & 0o777 == 0o666
    second = stack.enter_context(Program("hot_restart_gunicorn.py", *arguments, "--greeting", "second"))
    second.wait_for("Booting worker")
    assert first.ended() == 0, first.output
    assert path.stat().st_ino == found.st_ino
    assert ask_at(path).startswith("second from ")
    second.process.send_signal(signal.SIGUSR2)  # the third is its own doing, and nobody's child
    second.wait_for("Started a successor")
    second.wait_for("Booting worker")
    assert path.stat().st_ino == found.st_ino
    third = int(re.findall(r"Started a successor \(pid: (\d+)\)", second.output)[0])
    assert ask_at(path).startswith("second from ")  # its greeting
    os.kill(third, signal.SIGTERM)
    second.ended()
    assert not path.exists()
    assert not control.exists()


def test_gunicorns_umask_is_that_of_the_path(tmp_path: Path, stack: ExitStack) -> None:
    pytest.importorskip("gunicorn")
    script = tmp_path / "server.py"
    script.write_text(
        "import sys\nfrom fdshare.integrations import gunicorn\n"
        "gunicorn.run(lambda environ, start: [], sys.argv[1], bind='unix:' + sys.argv[2], umask='0o027')\n"
    )
    program = stack.enter_context(Program(os.fspath(script), tmp_path / "control", tmp_path / "sock"))
    program.wait_for("Booting worker")
    assert (tmp_path / "sock").stat().st_mode & 0o777 == 0o640
    program.process.send_signal(signal.SIGHUP)  # gunicorn's own reload makes its listeners anew
    program.wait_for("Booting worker")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(tmp_path / "sock"))
    program.process.terminate()
    assert program.ended() == 0


def read_answer(words: object) -> bytes:
    """Read one answer off a connection; return its body."""
    length = 0
    while (line := words.readline().lower()) != b"\r\n":  # type: ignore[attr-defined]
        assert line, "the connection has ended"
        if line.startswith(b"content-length:"):
            length = int(line.split(b":")[1])
    return bytes(words.read(length))  # type: ignore[attr-defined]
