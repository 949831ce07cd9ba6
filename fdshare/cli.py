"""The ``fdshare`` command: its subcommands, one function each, and how their ends become exit codes.

A subcommand is a function with :func:`command` above it: it takes the parsed arguments and returns its exit code.  The first line
of its docstring is its help, the rest is added to what ``--help`` says of it alone.  It imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import errno
import inspect
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import fdshare

__all__ = ["FAILED", "INTERRUPTED", "READER_GONE", "USAGE", "build_parser", "command", "main"]

FAILED = 1
USAGE = 2
INTERRUPTED = 128 + 2  # as a shell tells of SIGINT
READER_GONE = 128 + 13  # and of SIGPIPE

EXIT_CODES = """\
exit codes:
  0    all is well
  1    it failed, and one line on standard error says why
  2    it was called wrongly
  130  interrupted (Ctrl-C)
  141  whoever read the output has gone away
"""

Run = Callable[[argparse.Namespace], int]
Argument = tuple[tuple[str, ...], dict[str, Any]]

_commands: dict[str, tuple[Run, tuple[Argument, ...]]] = {}
_usages: dict[str, str] = {}


def argument(*names: str, **options: Any) -> Argument:
    """Declare an argument of a subcommand, in the words of ``ArgumentParser.add_argument``."""
    return names, options


def command(*arguments: Argument, usage: str | None = None) -> Callable[[Run], Run]:
    """Make the function below a subcommand of its name; ``usage`` is its line of usage, where argparse's would mislead."""

    def add(run: Run) -> Run:
        _commands[run.__name__] = run, arguments
        if usage is not None:
            _usages[run.__name__] = usage
        return run

    return add


# --- the subcommands ------------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 to {MAX_SECONDS}")
    return seconds


MAX_SECONDS = 10**7
"""Longest timeout, seconds: what goes to the kernel in milliseconds has 31 bits, and beyond some weeks nobody waits."""


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


_MODES = ("r", "w", "a", "x", "r+", "w+", "a+", "x+")

_MEETING = (
    argument(
        "--raw",
        action="store_true",
        help="bare SCM_RIGHTS, for a program on the other side that is not fdshare",
    ),
    argument(
        "--any-user",
        action="store_true",
        help="with --raw and @NAME: also talk to other users, who all may connect to such a name",
    ),
    argument(
        "--transport",
        choices=("seqpacket", "stream"),
        help="type of socket (default: seqpacket where there is one; with --raw stream)",
    ),
    argument(
        "--timeout",
        type=_seconds,
        metavar="SECONDS",
        help="give up when the other side has been waited for so long, each time (default: wait for ever)",
    ),
)


def _meeting(arguments: argparse.Namespace, *, listens: bool) -> Any:
    """Return what the two commands have in common."""
    from fdshare.command.exchange import Meeting

    if not arguments.address:
        arguments.wrong("the address is empty")
    if arguments.address.startswith("fd:") and not listens:
        arguments.wrong("fd:N is a listening socket, and this side connects")
    if arguments.any_user and not arguments.raw:
        arguments.wrong("--any-user takes --raw: other messages are pickles, which are for one user")
    return Meeting(
        any_user=arguments.any_user,
        address=arguments.address,
        listens=listens,
        raw=arguments.raw,
        transport=arguments.transport,
        timeout=arguments.timeout,
    )


@contextmanager
def _tidy_when_terminated() -> Iterator[None]:
    """Let a SIGTERM be an orderly end in the block, which removes the socket's file; 128 + 15 as of a shell."""
    try:
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    except ValueError:  # only the main thread has to do with signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@command(
    argument("address", metavar="ADDRESS", help="path of the socket; @NAME for an abstract name (Linux)"),
    argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="what to open and send; - is the standard input, fd:N a descriptor that the command was given",
    ),
    argument("--mode", choices=_MODES, default="r", help="how to open the files, as in Python (default: r)"),
    argument(
        "--data", metavar="TEXT", help="with --raw: what goes with the descriptors (default: a zero byte)"
    ),
    argument("--listen", action="store_true", help="listen at ADDRESS, and let the other side connect"),
    *_MEETING,
    usage="fdshare send ADDRESS FILE... [options]",
)
def send(arguments: argparse.Namespace) -> int:
    """Open files and send their descriptors to who listens at ADDRESS.

    It waits until somebody listens, and ends when everything was taken.  The other side is `fdshare recv ADDRESS`, or
    a Python program, which gets a dict of open files by their names:

        with fdshare.Listener(ADDRESS) as listener, listener.accept() as channel:
            files = channel.recv()

    The receiver's descriptors share their offset with the files opened here, and keep the access they were opened for.
    A directory is sent as such.  Only processes of the same user talk to each other, except with --raw.

    With --raw it sends one message for each 253 descriptors.
    """
    from fdshare.command.exchange import STDIN
    from fdshare.command.exchange import send as send_files

    names = [STDIN if name == "-" else name for name in arguments.files]
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        arguments.wrong(f"{twice!r} is given twice")
    if arguments.data is not None and not (arguments.raw and arguments.data):
        arguments.wrong("--data takes at least one byte, and --raw")
    data = os.fsencode(arguments.data) if arguments.data else b"\0"
    meeting = _meeting(arguments, listens=arguments.listen)
    with _tidy_when_terminated():
        return send_files(meeting, arguments.files, mode=arguments.mode, data=data)


@command(
    argument(
        "address",
        metavar="ADDRESS",
        help="path of the socket; @NAME for an abstract name (Linux); fd:N for a listening socket that was inherited",
    ),
    argument(
        "--cat", action="store_true", help="copy what the descriptors have to read to the standard output"
    ),
    argument("--json", action="store_true", help="print a line of JSON for each message"),
    argument(
        "--count",
        type=_number,
        metavar="N",
        help="stop after N messages (default: when the other side closes)",
    ),
    argument("--connect", action="store_true", help="connect to ADDRESS, where the other side listens"),
    *_MEETING,
    argument(
        "--exec",
        dest="command_line",
        nargs=argparse.REMAINDER,
        metavar="COMMAND",
        help="become COMMAND, which inherits the descriptors; the rest of the line is its own",
    ),
    usage="fdshare recv ADDRESS [options] [--exec COMMAND [ARGUMENT...]]",
)
def recv(arguments: argparse.Namespace) -> int:
    """Listen at ADDRESS, take what somebody sends, and tell what arrived.

    The other side is `fdshare send ADDRESS FILE...`, or a Python program with fdshare.connect.  A message is a pickle, so
    only processes of the same user are admitted; --raw takes descriptors and bytes alone, from whoever may open the
    socket's file, and at an @NAME from the same user unless --any-user is said.

    The COMMAND of --exec is started when the messages are there, as a service manager would start it (sd_listen_fds(3)):
    descriptors from 3 on, LISTEN_FDS says how many, LISTEN_PID for whom, LISTEN_FDNAMES their names.  Its exit code
    is then that of fdshare; 127 where there is no such command, 126 where it cannot be started.
    """
    from fdshare.command.exchange import Taking, receive

    if arguments.command_line == []:
        arguments.wrong("--exec needs a command")
    if sum((arguments.cat, arguments.json, arguments.command_line is not None)) > 1:
        arguments.wrong("one of --cat, --json, --exec")
    how = "cat" if arguments.cat else "json" if arguments.json else "table"
    taking = Taking(count=arguments.count, how=how, command=arguments.command_line)
    meeting = _meeting(arguments, listens=not arguments.connect)
    with _tidy_when_terminated():
        return receive(meeting, taking)


@command(
    argument("pid", nargs="?", type=_number, metavar="PID", help="a process; without it, the command itself"),
    argument("--json", action="store_true", help="print one JSON object"),
)
def ls(arguments: argparse.Namespace) -> int:
    """List the descriptors of a process: kind, access, offset, size, flags, and who has the other end.

    Without PID it lists what the command itself was given by whoever started it, as in

        fdshare recv ADDRESS --exec fdshare ls

    Other ends of pipes and sockets are found in the processes that you may see; root sees all of them.  Where there is no
    /proc (macOS, FreeBSD), another process needs psutil, and fewer columns are known.
    """
    from fdshare.command.ls import main as list_descriptors

    return list_descriptors(arguments.pid, as_json_text=arguments.json)


@command(argument("--json", action="store_true", help="print one JSON object"))
def doctor(arguments: argparse.Namespace) -> int:
    """Tell what this system offers: each thing is tried, and what is missing or tight comes with advice.

    Each line is ok, warn or missing.  The exit code is 1 where something is missing without which fdshare cannot work, and
    0 otherwise, warnings or not.
    """
    from fdshare.command.doctor import main as examine

    return examine(as_json=arguments.json)


# --- around them --------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Say what is wrong on one line; the usage is asked for with --help."""
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="fdshare",
        description=fdshare.__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fdshare {fdshare.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for name, (run, arguments) in _commands.items():
        text = inspect.cleandoc(run.__doc__ or "")
        subparser = subparsers.add_parser(
            name,
            usage=_usages.get(name),
            help=text.partition("\n")[0],
            description=text,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for names, options in arguments:
            subparser.add_argument(*names, **options)
        subparser.set_defaults(run=run, command=name, wrong=subparser.error)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; None for those of the process.

    Raises:
        SystemExit: after --help and --version (0), and where the call is wrong (2), as argparse does.
    """
    command = ""
    try:
        can_print = _prepare_standard_streams()
        try:
            arguments = _parse(argv, can_print)
            command = f" {arguments.command}"
            return int(arguments.run(arguments))
        finally:
            sys.stdout.flush()  # here, where a reader that has gone away can be told from a success
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (
        fdshare.FdShareError
    ) as error:  # before OSError: a peer that closed is a broken pipe too, but not stdout's
        code = _failed(command, error)
    except BrokenPipeError:
        code = READER_GONE
    except OSError as error:
        code = _failed(command, error)
    _drop_output_that_fails()
    return code


def _failed(command: str, error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number
        text = error.strerror + (f": {error.filename!r}" if error.filename is not None else "")
    from fdshare.command.ls import printable

    # What a peer has sent may be quoted in it.
    line = printable(" ".join(text.split())) or type(error).__name__
    print(f"fdshare{command}: {line}", file=sys.stderr)
    return FAILED


def _parse(argv: Sequence[str] | None, can_print: bool) -> argparse.Namespace:
    """Return the arguments of a command that can do its work.

    Raises:
        SystemExit: as main.
        OSError: it prints, and there is no standard output.  Said before it takes anything from anybody.
    """
    no_output = OSError(errno.EBADF, "the standard output is closed")
    try:
        arguments = build_parser().parse_args(argv)
    except SystemExit as end:
        if can_print or end.code:
            raise
        raise no_output from None
    prints = arguments.run is not send and getattr(arguments, "command_line", None) is None
    if prints and not can_print:
        raise no_output
    return arguments


def _prepare_standard_streams() -> bool:
    """See to it that no file opened later becomes a standard stream, and that every name can be printed.

    Returns:
        whether there is a standard output.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # takes the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    can_print = sys.stdout is not None
    if not can_print:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return can_print


def _drop_output_that_fails() -> None:
    """Let what stdout's buffer cannot write go nowhere, or the interpreter would complain while it exits."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
