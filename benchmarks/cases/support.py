"""What the cases share: a forked partner, the descriptor limit, the pair of ends that each peer talks over."""

from __future__ import annotations

import os
import resource
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

from benchmarks.model import Skipped

__all__ = ["End", "need_descriptors", "pipe_of", "with_partner"]


class End(Protocol):
    """One end of a two-way connection: what a Channel and a multiprocessing Connection have in common."""

    def send(self, obj: Any) -> None:
        """Send an object."""

    def recv(self) -> Any:
        """Receive an object."""

    def close(self) -> None:
        """Close this end."""

    def fileno(self) -> int:
        """Borrow the descriptor."""


def pipe_of(peer: str) -> tuple[End, End]:
    """Return the two connected ends of ``peer``; only what is measured gets imported."""
    if peer.startswith("fdshare"):
        import fdshare

        return cast("tuple[End, End]", fdshare.Pipe())
    if peer == "bare Python":
        from benchmarks.cases.bare import bare_pipe

        return bare_pipe()
    import multiprocessing

    return multiprocessing.Pipe()


@contextmanager
def with_partner(pair: tuple[End, End], serve: Callable[[End], None]) -> Iterator[End]:
    """Run ``serve`` on the second end in a forked process and yield the first; ``serve`` ends at EOFError."""
    here, there = pair
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            here.close()
            serve(there)
        except (EOFError, ConnectionError):
            status = 0
        except BaseException:  # noqa: BLE001 -- it must not run on as a second copy of the parent
            traceback.print_exc()
        finally:
            os._exit(status)
    there.close()
    try:
        yield here
    finally:
        here.close()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise RuntimeError(f"the partner process ended with {status}")


def need_descriptors(count: int) -> None:
    """Raise the soft RLIMIT_NOFILE to the hard one and check that ``count`` descriptors and some to spare fit.

    Raises:
        Skipped: they do not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS: the hard limit says infinity, the kernel has another bound
            pass
    if soft != resource.RLIM_INFINITY and soft < count + 200:
        raise Skipped(f"needs RLIMIT_NOFILE of {count + 200}, the limit is {soft}")
