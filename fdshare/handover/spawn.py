"""Starting the next generation from the one that serves, as for a reload.

Not as its child: the service manager must be told when it dies, and not a process that is about to end.  So a process between
the two starts it and ends, and the kernel gives it to the manager (or to init).

It runs what a new start would run, which may be another release than this process's.  The kernel keeps the directory that a
process was started in, and not its name: where ``/srv/current`` is a link to a release, it still means the old one once the
link says otherwise.  The name is what a shell has put into PWD; and the command is the one that was given, word by word, since
a relative path in it means something in that directory alone, whatever directory this process is in by now.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable

from fdshare.handle import own_pipe

__all__ = ["start"]

BETWEEN = """
import os, sys
report = int(sys.argv[1])
os.set_inheritable(report, False)
os.write(report, b"%d" % os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ))
"""


def _program(words: list[str]) -> tuple[str, str]:
    """Return what a Python that was called with ``words`` runs: "c" or "m" and what follows that option, or "" and a path.

    The path is "-" where it is standard input.
    """
    rest = iter(words[1:])
    for word in rest:
        if word == "--":
            return "", next(rest, "-")
        if word == "-" or not word.startswith("-"):
            return "", word
        if word == "--check-hash-based-pycs":
            next(rest, "")
        for place, letter in enumerate(word) if word[1] != "-" else ():
            if letter in "cm":
                return letter, word[place + 1 :] or next(rest, "")
            if letter in "WX":
                if not word[place + 1 :]:
                    next(rest, "")
                break
    return "", "-"


def _traced_directory() -> str | None:
    """Return the directory that this process was started in, where that shows in the full path of a program given without one."""
    main = sys.modules.get("__main__")
    path = getattr(main, "__file__", None) or ""
    option, given = _program(sys.orig_argv)
    if option == "m":
        name = getattr(getattr(main, "__spec__", None), "name", "")
        directory = path.removesuffix(os.sep + name.replace(".", os.sep) + ".py")
        return directory if directory == sys.path[0] else None  # and no module that was installed
    for tail in ("", os.sep + "__main__.py"):  # of a directory, or a zip file
        directory = path.removesuffix(os.sep + given + tail)
        if not option and directory != path:
            return directory
    return None


def _started_in() -> str:
    """Return the directory that this process was started in, by the name that a shell has left in PWD, if it is one.

    As far as that can be told, where the program has gone elsewhere before it asked for this module.

    Raises:
        OSError: it is gone.
    """
    directory, name = _traced_directory() or os.getcwd(), os.environ.get("PWD", "")
    try:
        return name if os.path.isabs(name) and os.path.samefile(name, directory) else directory
    except OSError:  # an old name
        return directory


def _python(directory: str) -> str:
    """Return this interpreter as it was called: where by a relative path, there is the one of another release too."""
    called, executable = sys.orig_argv[0] if sys.orig_argv else "", sys.executable
    try:
        if os.sep in called and os.path.samefile(os.path.join(directory, called), executable):
            return called
    except OSError:  # called by a name that is none
        pass
    return executable


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


class _Start:
    """How this process was started, as it was when this module was imported: programs change their directory."""

    def __init__(self) -> None:
        self.directory: str | None
        try:
            self.directory = _started_in()
        except OSError:
            self.directory = None
        self.identity = _identity(self.directory or "")
        self.python = _python(self.directory or "")

    def command(self) -> list[str]:
        """Return the command of this process, to be run in its directory.

        Raises:
            OSError: nobody can run it again.
        """
        if not self.python:
            raise OSError("this program does not know its interpreter: say the command of its successor")
        if _program(sys.orig_argv) == ("", "-"):
            raise OSError("this program was read from standard input: say the command of its successor")
        return [self.python, *sys.orig_argv[1:]]

    def directory_for(self, same: bool) -> str | None:
        """Return where a successor is to begin: the ``same`` command where this one did, another one where this process is."""
        if self.directory is None or not os.path.isdir(self.directory):
            return None
        return self.directory if same or _identity(".") == self.identity else None


_began = _Start()


def start(command: Iterable[str] | None) -> int:
    """Start ``command``, or this program again; return its pid.

    Raises:
        OSError: it cannot be started.
    """
    arguments = _began.command() if command is None else list(command)
    directory = _began.directory_for(command is None)
    # What systemd has handed to this process is not for the next one, which asks its predecessor.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LISTEN_")}
    if directory is not None:
        environment["PWD"] = directory
    reader, writer = own_pipe()
    with reader, writer:
        between = subprocess.run(
            [
                os.path.join(_began.directory or "", _began.python),
                "-S",
                "-E",
                "-c",
                BETWEEN,
                str(writer.fileno()),
                *arguments,
            ],
            env=environment,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            pass_fds=[writer.fileno()],
            check=False,
        )
        if between.returncode:
            raise OSError(f"cannot start {arguments[0]!r} as a successor")
        return int(os.read(reader.fileno(), 20))
