"""The ``fdshare`` command: its subcommands, one function each, and how their ends become exit codes.

====  ==============================================================
exit  when
====  ==============================================================
0     all is well
1     it failed, and one line on stderr says why
2     it was called wrongly
130   interrupted (Ctrl-C)
141   whoever read the output has gone away
====  ==============================================================

A subcommand is a function with :func:`command` above it: it takes the parsed arguments and returns its exit code; the first line
of its docstring is its help.  It imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import fdshare

__all__ = ["FAILED", "INTERRUPTED", "READER_GONE", "USAGE", "build_parser", "command", "main"]

FAILED = 1
USAGE = 2
INTERRUPTED = 128 + 2  # as a shell tells of SIGINT
READER_GONE = 128 + 13  # and of SIGPIPE

Run = Callable[[argparse.Namespace], int]
Argument = tuple[tuple[str, ...], dict[str, Any]]

_commands: dict[str, tuple[Run, tuple[Argument, ...]]] = {}


def argument(*names: str, **options: Any) -> Argument:
    """Declare an argument of a subcommand, in the words of ``ArgumentParser.add_argument``."""
    return names, options


def command(*arguments: Argument) -> Callable[[Run], Run]:
    """Make the function below a subcommand of its name."""

    def add(run: Run) -> Run:
        _commands[run.__name__] = run, arguments
        return run

    return add


# --- the subcommands ------------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    from fdshare.demo import WORKERS

    if not text.isdecimal() or not WORKERS <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {WORKERS} to 1000")
    return int(text)


@command(argument("--requests", type=_count, default=20, help="HTTP requests to make (default: 20)"))
def demo(arguments: argparse.Namespace) -> int:
    """Let two processes serve HTTP on what they were sent in one message; then send 64 MiB."""
    from fdshare.demo import main as play

    return play(arguments.requests)


# --- around them --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong on one line; the usage is asked for with --help."""
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(prog="fdshare", description=fdshare.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"fdshare {fdshare.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, (run, arguments) in _commands.items():
        text = (run.__doc__ or "").strip().splitlines()[0]
        subparser = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        for names, options in arguments:
            subparser.add_argument(*names, **options)
        subparser.set_defaults(run=run, command=name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; None for those of the process.

    Raises:
        SystemExit: after --help and --version (0), and where the call is wrong (2), as argparse does.
    """
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()  # here, where a reader that has gone away can be told from a success
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except (
        fdshare.FdShareError
    ) as error:  # before OSError: a peer that closed is a broken pipe too, but not stdout's
        return _failed(arguments.command, error)
    except BrokenPipeError:
        _drop_output()
        return READER_GONE
    except OSError as error:
        return _failed(arguments.command, error)


def _failed(command: str, error: Exception) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"fdshare {command}: {text}", file=sys.stderr)
    return FAILED


def _drop_output() -> None:
    """Let what is still in stdout's buffer go nowhere, or the interpreter would complain while it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
