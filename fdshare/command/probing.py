"""What a look at one feature of the system finds, and the list of such looks.

A probe is a function with :func:`probe` above it.  It tries the thing itself and never judges by a version::

    @probe("descriptors", "eventfd", without="events are made of pipes")
    def _() -> Finding:
        ...
        return ok("counts to three")

An OSError or an absent name in it means that the system has not got the thing; ``without`` then says what that means.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import attrs

from fdshare.errors import FdShareError

__all__ = ["MISSING", "OK", "WARN", "Finding", "Probe", "ok", "probe", "probes", "run", "warn"]

State = Literal["ok", "warn", "missing"]
OK: State = "ok"
WARN: State = "warn"
MISSING: State = "missing"


@attrs.frozen(kw_only=True)
class Finding:
    """What a probe found: ``found`` in words, ``values`` for programs, and ``advice`` unless all is well."""

    state: State
    found: str
    advice: str = ""
    values: dict[str, Any] = attrs.field(factory=dict)


def ok(found: str, **values: Any) -> Finding:
    """It is there and works."""
    return Finding(state=OK, found=found, values=values)


def warn(found: str, advice: str, **values: Any) -> Finding:
    """It is there, and something about it is worth knowing."""
    return Finding(state=WARN, found=found, advice=advice, values=values)


@attrs.frozen
class Probe:
    """One look: its place in the report, and what it means where the thing is missing."""

    group: str
    name: str
    look: Callable[[], Finding]
    without: str
    needed: bool


probes: list[Probe] = []


def probe(
    group: str, name: str, *, without: str, needed: bool = False
) -> Callable[[Callable[[], Finding]], Callable[[], Finding]]:
    """Put the function below on the list.

    Args:
        group: the heading under which it is reported.
        name: what it looks at.
        without: what a system without it means to a user, as advice.
        needed: whether fdshare cannot do its work without it.
    """

    def add(look: Callable[[], Finding]) -> Callable[[], Finding]:
        probes.append(Probe(group, name, look, without, needed))
        return look

    return add


def run(one: Probe) -> Finding:
    """Look, and take an error for an answer."""
    try:
        return one.look()
    except (OSError, EOFError, AttributeError, ImportError, FdShareError) as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Finding(state=MISSING, found=" ".join(text.split()), advice=one.without)
