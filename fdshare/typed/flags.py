"""Combined members of Flag classes, which live no longer than somebody has them.

An enum keeps in its class, for good, each combination that was ever asked for, and who sends messages could ask for millions.
So the dict by which a class finds its members is exchanged for one that holds combinations weakly, from the first codec on
that speaks of the class; what the program makes of received members with ``|``, ``&`` and ``~`` goes the same way.
Equal combinations are still one object as long as there is one.
"""

from __future__ import annotations

import enum
import weakref
from typing import Any

__all__ = ["let_go"]

MOST_KEPT = 256
"""Combinations that are kept of a class whose members cannot be referred to weakly, such as an IntFlag, the latest ones.  They
are equal to others by their number, and need not be one object."""


class _Members(dict[Any, Any]):
    """The members of a class by their values."""

    def __init__(self, members: dict[Any, Any], weak: bool) -> None:
        super().__init__(members)
        self._combined: Any = weakref.WeakValueDictionary() if weak else _Latest()

    def __missing__(self, value: Any) -> Any:
        return self._combined[value]

    def __contains__(self, value: object) -> bool:
        return super().__contains__(value) or value in self._combined

    def get(self, value: Any, default: Any = None) -> Any:
        try:
            return self[value]
        except KeyError:
            return default

    def setdefault(self, value: Any, member: Any = None) -> Any:
        if super().__contains__(value):
            return self[value]
        return self._combined.setdefault(value, member)

    def __setitem__(self, value: Any, member: Any) -> None:
        self._combined[value] = member


class _Latest(dict[Any, Any]):
    def setdefault(self, value: Any, member: Any = None) -> Any:
        found = super().setdefault(value, member)
        while len(self) > MOST_KEPT:
            try:
                self.pop(next(iter(self)), None)
            except (RuntimeError, StopIteration):  # another thread does the same
                break
        return found

    def __setitem__(self, value: Any, member: Any) -> None:
        self.setdefault(value, member)


def let_go(cls: type[enum.Flag]) -> None:
    """Let a class keep the combinations it has, and those to come no longer than they are referred to."""
    members = cls._value2member_map_
    if isinstance(members, _Members):
        return
    try:
        weak = all(weakref.ref(member) for member in cls.__members__.values())
    except TypeError:
        weak = False
    cls._value2member_map_ = _Members(members, weak)
