"""Attributes that are made when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["OnFirstUse"]

T = TypeVar("T")


class OnFirstUse(Generic[T]):
    """An attribute that is made once, however many threads ask for it first; then it is an ordinary one.

    Args:
        make: returns it for an instance.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> T:
        made: T = vars(instance).setdefault(self._name, self._make(instance))  # atomic
        return made
