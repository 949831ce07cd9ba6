"""What the system gives is tried: a name that is there may be refused, and what is refused has another way."""

from __future__ import annotations

import errno
import fcntl
import os
import select

import pytest
from helpers import requires_epoll

from fdshare import system


def raises(number: int) -> int:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL])
def test_refused_call_is_not_given(number: int) -> None:
    assert not system.is_given(lambda: raises(number))


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_want_of_room_says_nothing(number: int) -> None:
    assert system.is_given(lambda: raises(number))


def test_name_that_is_not_there_is_not_given() -> None:
    assert not system.is_given(lambda: int(os.no_such_call()))  # type: ignore[attr-defined]


def test_what_was_tried_is_closed() -> None:
    assert system.is_given(lambda: os.dup(0))  # the leak fixture looks


@requires_epoll
def test_epoll_is_tried_while_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number belongs to nobody, or to another thread's file, once it is closed."""
    duplicated: list[int] = []

    def dup(fd: int) -> int:
        os.fstat(fd)
        duplicated.append(fd)
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)

    monkeypatch.setattr(os, "dup", dup)
    assert system.is_given(system._make_epoll)
    assert len(duplicated) == 1


def test_names_and_answers_agree() -> None:
    """Nothing is said to be there that this Python has no name for."""
    for given, module, name in (
        (system.HAVE_MEMFD, os, "memfd_create"),
        (system.HAVE_EVENTFD, os, "eventfd"),
        (system.HAVE_PIDFD, os, "pidfd_open"),
        (system.HAVE_EPOLL, select, "epoll"),
    ):
        assert hasattr(module, name) or not given
