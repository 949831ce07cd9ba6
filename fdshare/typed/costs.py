"""What a typed message costs its receiver: counted before it is spent, for the whole message.

Memory is counted in values, of which a message may have ``max_items``.  A value takes some 100 bytes; what takes more counts for
more than the one that it is in MessagePack:

========================================== ===================================
in the message                             counts besides
========================================== ===================================
a set, a frozenset                         2, and 1 for each element
a dict                                     1
members of a Flag that are combined        4, where nobody has that combination
========================================== ===================================

Time is counted where keys and elements are numbers, or are made of them, since their sender can choose their hashes.  A table of
n keys takes up to n**2 looks at a hash; and where hashes are equal, each key is compared with each, in all that it holds.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

from fdshare.errors import DecodeError

__all__ = ["COMBINED", "DICT", "MAX_HASHED", "SET", "Cost", "scan"]

MAX_HASHED = 1 << 14
"""Most keys or elements of one container whose hashes a sender can choose.  Several containers of one message may have as many
squares together: looking at so many takes some 0.2 seconds at the worst."""

MAX_COMPARED = 1 << 20
"""Most values that are compared because the hashes of what holds them are equal: some 0.1 seconds.  Where nobody has made
them so on purpose there are a few, such as of points with coordinates of -1 and -2, whose hashes are one."""

SET, DICT, COMBINED = 2, 1, 4
"""What these count for, besides the one value that each is."""

_TEXT_UNIT = 256
"""Characters that are compared in the time of a value."""


class Cost:
    """What one message has cost so far.

    Args:
        max_items: the bound on values.
        payload: the message, where it arrived; what of the bound it takes by itself is found out when that matters.
        items: how many values are in it, where that is known.
    """

    __slots__ = ("_compared", "_left", "_looks", "_max_items", "_payload", "extra")

    def __init__(self, max_items: int, payload: Any = b"", items: int | None = None) -> None:
        self.extra = 0
        self._max_items = max_items
        self._payload = payload if items is None else b""
        self._left = max_items - (
            len(payload) if items is None else items
        )  # each value takes a byte at least
        self._looks = self._compared = 0

    def take(self, items: int) -> None:
        """Count values that are not in the message as such.

        Raises:
            DecodeError: over the bound.
        """
        self.extra += items
        if self.extra > self._left:
            if self._payload:
                self._left = self._max_items - scan(self._payload, self._max_items, len(self._payload))
                self._payload = b""
            if self.extra > self._left:
                raise DecodeError(
                    f"more than {self._max_items} values in one message (max_items), where sets, dicts and flags count for more"
                )

    def objection(self, keys: Collection[Any], made: bool) -> str | None:
        """Return why a table of these keys or elements takes too long, None where it does not.

        Args:
            made: whether they are made of others, and their hashes can be equal.
        """
        self._looks += len(keys) ** 2
        if self._looks > MAX_HASHED**2:
            return f"MAX_HASHED is {MAX_HASHED} in one message"
        if made and len(keys) > 1:
            self._compared += _compared(keys)
            if self._compared > MAX_COMPARED:
                return "their hashes are equal"
        return None


def _compared(keys: Collection[Any]) -> int:
    """Return how many values are compared, at most, to tell keys apart that have equal hashes."""
    hashes = sorted(map(hash, keys))
    if not any(map(int.__eq__, hashes, itertools.islice(hashes, 1, None))):
        return 0
    total = 0
    for _, same in itertools.groupby(sorted(keys, key=hash), key=hash):
        run = list(same)
        if len(run) > 1:
            total += (len(run) - 1) * sum(map(_weight, run)) // 2
    return total


def _weight(key: Any) -> int:
    """Return how many values are compared to find two keys like this one equal."""
    if type(key) is tuple:
        return 1 + sum(map(_weight, key))
    if type(key) is frozenset:  # each element is looked up in the other one
        return 1 + sum(map(_weight, key)) + 2 * _compared(key)
    if type(key) in (str, bytes):
        return 1 + len(key) // _TEXT_UNIT
    return 1


# --- counting without building --------------------------------------------------------------------------------------

# How MessagePack's first bytes read: bytes to skip after it, bytes of a size, what each unit of the size is.
_SIZED = {
    0xC4: (1, 0),  # bin
    0xC5: (2, 0),
    0xC6: (4, 0),
    0xD9: (1, 0),  # str
    0xDA: (2, 0),
    0xDB: (4, 0),
    0xDC: (2, 1),  # array
    0xDD: (4, 1),
    0xDE: (2, 2),  # map
    0xDF: (4, 2),
}
_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}


def scan(data: Any, max_items: int, max_depth: int) -> int:
    """Return how many values a MessagePack message has, building nothing; malformed bytes are left to the decoder.

    Takes some 0.2 us a value, and stops at the bound.

    Raises:
        DecodeError: over a bound.
    """
    position, size, items = 0, len(data), 0
    missing = [1]  # values that each open array or map still lacks
    while missing:
        if not missing[-1]:
            missing.pop()
            continue
        missing[-1] -= 1
        items += 1
        if items > max_items:
            raise DecodeError(f"more than {max_items} values in one message (max_items)")
        if position >= size:
            break  # truncated
        code = data[position]
        position += 1
        if code < 0x80 or code >= 0xE0:  # a small integer
            continue
        if code >= 0xA0:
            if code < 0xC0:  # a short str
                position += code & 0x1F
                continue
            position += _FIXED.get(code, 0)
            if code not in _SIZED:
                continue
            width, unit = _SIZED[code]
            count = int.from_bytes(data[position : position + width], "big")
            position += width
            if not unit:
                position += count
                continue
        else:
            count, unit = code & 0x0F, 1 if code >= 0x90 else 2
        missing.append(count * unit)
        if len(missing) - 1 > max_depth:
            raise DecodeError(f"a message is nested more than {max_depth} levels deep (max_depth)")
    return items
