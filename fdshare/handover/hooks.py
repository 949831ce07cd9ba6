"""What a program does to stop accepting, and to resume, around the gate that its sockets have."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from fdshare.handover.gate import Gate, GateState

__all__ = ["Hooks"]

logger = logging.getLogger("fdshare.handover")

Hook = Callable[[], Any]


class Hooks:
    """Pairs of functions, called in the order in which they were added, and undone in reverse.

    Args:
        gate: paused before the first of them, opened again after the last was undone.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._pairs: list[tuple[Hook, Hook | None]] = []

    def add(self, stop: Hook, resume: Hook | None) -> None:
        """Add a pair."""
        self._pairs.append((stop, resume))

    def stop(self) -> Hook:
        """Stop accepting; return what resumes it.  What a hook raises is raised here, after everything was resumed."""
        self._gate.move(GateState.PAUSED)
        called: list[Hook] = []

        def resume() -> None:
            for undo in reversed(called):
                try:
                    undo()
                except Exception:
                    logger.exception("a hook of on_stop could not resume")
            self._gate.move(GateState.OPEN)

        try:
            for stop, undo in self._pairs:
                if undo is not None:
                    called.append(undo)
                stop()
        except BaseException:
            resume()
            raise
        return resume
