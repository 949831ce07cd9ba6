"""The command line: exit codes, errors on one line, and what a terminal does to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from command import ROOT, run

import fdshare
from fdshare import cli


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"fdshare {fdshare.__version__}\n", "")


def test_help_names_every_command() -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for name, (function, _) in cli._commands.items():
        assert name in result.stdout
        assert function.__doc__
        help_of_command = run(name, "--help")
        assert (help_of_command.returncode, help_of_command.stderr) == (0, "")
        assert f"usage: fdshare {name}" in help_of_command.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["--nonsense"],
        ["--vers"],
        ["demo", "extra"],
        ["demo", "--requests"],
        ["demo", "--requests", "1"],
        ["demo", "--requests", "many"],
        ["demo", "--requests", "-5"],
        ["demo", "--requests", "1001"],
    ],
)
def test_wrong_call_is_one_line_and_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("fdshare")
    assert "--help" in printed.err


def test_wrong_call_of_the_program() -> None:
    result = run("nonsense")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def failing() -> Iterator[Any]:
    """A function that adds a subcommand ``fail``, which raises what it is given."""

    def add(error: BaseException) -> None:
        def fail(arguments: Any) -> int:
            """Fail."""
            raise error

        cli.command()(fail)

    yield add
    del cli._commands["fail"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (fdshare.NotSendableError("cannot send message['a']: no"), "cannot send message['a']: no"),
        # A broken pipe as well, but not that of the standard output:
        (fdshare.PeerClosedError("the peer has closed"), "the peer has closed"),
        (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory: 'x'"),
        (OSError("on two\nlines"), "on two lines"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_failure_is_one_line_and_exit_1(
    error: Exception, line: str, failing: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(error)
    assert cli.main(["fail"]) == cli.FAILED
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"fdshare fail: {line}\n"


def test_interrupt_is_exit_130(failing: Any, capsys: pytest.CaptureFixture[str]) -> None:
    failing(KeyboardInterrupt())
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr().err == ""


def test_bug_keeps_its_traceback(failing: Any) -> None:
    failing(ZeroDivisionError("a bug"))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fail"])


def test_reader_that_has_gone_away() -> None:
    """As in ``fdshare demo | true``: silence, and the exit code that a shell gives for SIGPIPE."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as gone:
        result = subprocess.run(
            [sys.executable, "-m", "fdshare", "demo"],
            cwd=ROOT,
            stdout=gone,
            stderr=subprocess.PIPE,
            timeout=45,
            check=False,
        )
    assert (result.returncode, result.stderr) == (cli.READER_GONE, b"")


def test_interrupt_of_the_whole_group_leaves_no_traceback() -> None:
    """Ctrl-C reaches the workers too, while they are starting up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fdshare", "demo"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("1. "):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=45)
    assert (process.returncode, errors) == (cli.INTERRUPTED, "")
