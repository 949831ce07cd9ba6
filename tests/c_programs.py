"""Compiles the C programs of ``tests/c`` once per test session and runs them as peers."""

from __future__ import annotations

import shutil
import socket
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).with_name("c")
FLAGS = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Wshadow", "-Wconversion", "-Werror", "-pedantic"]
TIMEOUT = 20.0
"""Seconds that one C program may take; they need milliseconds."""

UNSUPPORTED = 77
"""Exit status by which a program says that this system has not what it shows."""


class CPeer:
    """One running C program: what it printed is read at its end, by :meth:`finish`."""

    def __init__(self, process: subprocess.Popen[bytes], program: str) -> None:
        self.process = process
        self.program = program

    @property
    def pid(self) -> int:
        """The program's process id."""
        return self.process.pid

    def wait_for_line(self, expected: str) -> None:
        """Read one line of its stdout, which must be ``expected``."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline().decode().rstrip("\n") == expected

    def finish(self, *, status: int = 0) -> tuple[str, str]:
        """Wait for its end and return its stdout and stderr; any exit status but ``status`` fails the test."""
        out, err = self.process.communicate(timeout=TIMEOUT)
        if self.process.returncode == UNSUPPORTED:
            pytest.skip(err.decode().strip())
        if self.process.returncode != status:
            pytest.fail(f"{self.program} ended with {self.process.returncode}: {err.decode().strip()}")
        return out.decode(), err.decode().rstrip("\n")


class CPrograms:
    """The compiled programs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @contextmanager
    def start(self, program: str, endpoint: socket.socket | str, *args: object) -> Iterator[CPeer]:
        """Run ``program ENDPOINT ARGS...``; killed at the end of the block where it still runs.

        Args:
            program: name of the source file, without ``.c``.
            endpoint: a connected socket, which the program inherits and this process closes (so that the program's end
                is seen as end of file), or an endpoint in the programs' own notation.
            args: what follows on the command line.
        """
        sock = endpoint if isinstance(endpoint, socket.socket) else None
        name = endpoint if sock is None else f"fd:{sock.fileno()}"
        process = subprocess.Popen(
            [str(self.directory / program), str(name), *map(str, args)],
            pass_fds=[] if sock is None else [sock.fileno()],
            bufsize=0,  # communicate() does not see what a buffered reader has read ahead
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if sock is not None:
            sock.close()
        with process:
            try:
                yield CPeer(process, program)
            finally:
                if process.poll() is None:
                    process.kill()


@pytest.fixture(scope="session", name="c_programs")
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> CPrograms:
    """The programs of ``tests/c``, compiled into a directory of this session (and of this xdist worker)."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc or clang) on the PATH")
    directory = tmp_path_factory.mktemp("c")
    for source in sorted(SOURCES.glob("*.c")):
        command = [compiler, *FLAGS, "-o", str(directory / source.stem), str(source)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode != 0:
            pytest.fail(f"{source.name} does not compile:\n{result.stderr}")
    return CPrograms(directory)
