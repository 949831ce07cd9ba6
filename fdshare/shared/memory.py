"""``SharedMemory``: memory that several processes see, as one descriptor that travels.

States: writable, and then sealed for ever; open, and then closed in this holder alone.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

from fdshare import reducers
from fdshare.closing import Closing
from fdshare.errors import ClosedError, DecodeError
from fdshare.handle import FdHandle, Outside
from fdshare.shared import allocation, references
from fdshare.shared.mapping import Holder, Mapping, is_sealed, mapped

__all__ = ["SharedMemory"]


class SharedMemory(Closing):
    """Memory that every holder sees: what one writes, the others read.

    It has no name and no tracker.  It travels in messages, as an argument of processes and pools and in their results, at
    any time, and each process that receives it is a holder like any other; the kernel frees it when the last one
    is gone, however it went.  Its size is fixed, and all of it is there from the start, zeroed.

    A holder that is dropped needs no ``close``.

    Args:
        size: bytes; 0 is allowed.

    Raises:
        ValueError: ``size`` is negative.
        NoSpaceError: there is no room for it.
        FdLimitError: no descriptor left.
    """

    __slots__ = ("__weakref__", "_holder", "_size")

    def __init__(self, size: int) -> None:
        self._holder: Holder | None = None
        self._size = operator.index(size)
        if self._size < 0:
            raise ValueError(f"shared memory of {size} bytes")
        # An empty file could not be mapped.
        self._holder = Holder.of(allocation.allocate(max(self._size, 1)))

    @classmethod
    def from_buffer(cls, b: Any) -> SharedMemory:
        """Return new shared memory with a copy of ``b``, any object with a buffer: bytes, a bytearray, an array.

        Raises:
            TypeError: ``b`` has no buffer.
            NoSpaceError, FdLimitError: as for ``SharedMemory(size)``.
        """
        view = memoryview(b)
        if not view.nbytes:
            return cls(0)
        view = view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
        return rebuild_memory(allocation.copy_in([view]), len(view))

    @classmethod
    def from_handle(cls, handle: FdHandle, *, sealed: bool = False) -> SharedMemory:
        """Consume a descriptor that came without pickle, as in a typed message or by ``recv_fds``: hold the memory behind it.

        Args:
            handle: of a memory file of this library, or any other that is sealed against shrinking.
            sealed: True takes only memory that nobody can change any more, as from a stranger.

        Raises:
            DecodeError: it is no such memory, and ``handle`` stays usable; or there is no room to map it.
            ClosedError: ``handle`` is closed.
        """
        if sealed and not is_sealed(handle.fileno()):
            raise DecodeError("this memory is not sealed: its sender could change it while it is read")
        mapping = mapped(handle.fileno(), lambda: handle)
        handle.close()  # where this process had it already
        return rebuild_memory(mapping, mapping.extent)

    @property
    def buf(self) -> memoryview:
        """The memory, as a new view each time; read-only once it is sealed.

        A view stays good after ``close``, and keeps the memory.  Raises ClosedError where this holder is closed.
        """
        if "numpy" in sys.modules:
            references.attend_numpy()
        view = memoryview(self._held().get())
        return view if len(view) == self._size else view[: self._size]

    @property
    def size(self) -> int:
        """Its size in bytes, known also after ``close``."""
        return self._size

    @property
    def sealed(self) -> bool:
        """Whether nobody can change it any more.  Raises ClosedError where this holder is closed."""
        return is_sealed(self._held().get().fd)

    def seal(self) -> None:
        """Make it unchangeable for everybody and for ever, so that it is safe to share with strangers; twice is harmless.

        The kernel sees to it.  It does so only where nothing is left that could write: no view of ``buf`` and no array on it in
        this process, and no other process that has received it unsealed, or was forked meanwhile.

        Raises:
            SealError: something is left (errno EBUSY), and nothing has changed; or the system has no seals (ENOTSUP).
            ClosedError: this holder is closed.
        """
        self._held().seal()

    def fileno(self) -> int:
        """Borrow the descriptor's number, as for ``mmap.mmap``.

        Raises:
            ClosedError: this holder is closed.
        """
        return self._held().get().fd

    def close(self) -> None:
        """Give this holder up; twice is harmless, and it never raises.

        Views and arrays that look into the memory stay good: it is unmapped, and its descriptor closed, with the last of them.
        """
        self._holder = None

    @property
    def closed(self) -> bool:
        """Whether this holder was closed."""
        return self._holder is None

    def _held(self) -> Holder:
        if self._holder is None:
            raise ClosedError("this SharedMemory was closed")
        return self._holder

    def __repr__(self) -> str:
        if self._holder is None:
            return f"<SharedMemory {self._size} bytes closed>"
        return f"<SharedMemory {self._size} bytes fd={self.fileno()}{' sealed' if self.sealed else ''}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)


def reduce_memory(shared: SharedMemory, context: reducers.Context) -> reducers.Reduced:
    if shared._holder is None:
        raise reducers.Refused(shared, "it is closed")
    if context.moving:
        context.consume(shared.close)
    return rebuild_memory, (shared._held().get(), shared._size)


def rebuild_memory(mapping: Mapping, size: int) -> SharedMemory:
    if not 0 <= size <= mapping.extent:
        raise DecodeError(f"shared memory of {size} bytes in a file of {mapping.extent}")
    shared = SharedMemory.__new__(SharedMemory)
    shared._holder, shared._size = Holder.of(mapping), size
    return shared


reducers.known[SharedMemory] = reduce_memory
reducers.resolved.clear()
