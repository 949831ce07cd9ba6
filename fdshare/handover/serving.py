"""What a generation is to its door: what it offers, how it stops, and what is to be done once it is succeeded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fdshare.handle import FdHandle
from fdshare.handover import protocol, systemd
from fdshare.handover.gate import Gate, GateState, Retired
from fdshare.handover.hooks import Hooks
from fdshare.handover.listeners import Listeners
from fdshare.handover.succession import Control

__all__ = ["Serving"]

logger = logging.getLogger("fdshare.handover")


class Serving:
    """The generation that serves, as the threads of its door see it (``door.Host``).

    Args:
        generation: how many handovers have led to it.
        control, listeners, gate: what it serves with.
        retired: set at the end.
    """

    def __init__(
        self, generation: int, control: Control, listeners: Listeners, gate: Gate, retired: Retired
    ) -> None:
        self.states: dict[str, Callable[[], Any]] = {}
        self.hooks = Hooks(gate)
        self._generation = generation
        self._control = control
        self._listeners = listeners
        self._gate = gate
        self._retired = retired

    def what_to_offer(self) -> Mapping[str, Any]:
        """Return the fields of an offer; the handles are the caller's.

        Raises:
            OSError: no descriptor left.
        """
        handles = self._listeners.to_offer()
        try:
            control = FdHandle.dup(self._control.handle)
        except BaseException:
            protocol.close_handles(handles)
            raise
        return {
            "generation": self._generation,
            "control": control,
            "identity": self._control.identity,
            "listeners": handles,
        }

    def answer_state(self, name: str) -> Any:
        """Return application state; KeyError where there is none of that name."""
        return self.states[name]()

    def final_states(self, names: list[str]) -> dict[str, Any]:
        """Return those of these states that there are."""
        return {name: self.states[name]() for name in names if name in self.states}

    def begin_offer(self) -> None:
        """A successor is being given the sockets."""
        systemd.notify(*systemd.reloading())

    def end_offer(self) -> None:
        """It came to nothing."""
        systemd.notify("READY=1")

    def stop(self) -> Callable[[], None]:
        """Stop accepting; return what resumes it."""
        return self.hooks.stop()

    def retire(self, successor: int, kept: Collection[str]) -> None:
        """The process ``successor`` serves now, with the listeners in ``kept``."""
        try:
            self._gate.move(GateState.RETIRED, kept)
            systemd.notify(*systemd.serving(successor))
            systemd.barrier()  # or our end could be seen before the successor is known, and would be the service's
            self._listeners.remove_files(kept)
            self._control.handle.close()
            logger.info("process %d has succeeded process %d", successor, os.getpid())
        finally:
            self._retired._retire()  # whatever went wrong: there are two of us
