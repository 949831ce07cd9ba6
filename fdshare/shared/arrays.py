"""``shared_array`` and ``share``: arrays in shared memory, new ones and copies of what there is."""

from __future__ import annotations

import io
import math
import operator
import pickle
import sys
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from fdshare import reducers, wire
from fdshare.codec import PROTOCOL
from fdshare.handle import FdHandle
from fdshare.shared import allocation
from fdshare.shared.references import NO_OBJECTS, find_array, make_array, open_window

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Sharer", "share", "shared_array"]

T = TypeVar("T")


def shared_array(shape: int | Iterable[int], dtype: Any = "float64", order: str = "C") -> NDArray[Any]:
    """Return a new NumPy array of zeros in shared memory.

    The array, and every view of it, travels by reference: whoever receives it sees the same memory, and a message takes as long
    for a gibibyte as for a byte.  The memory is freed when the last array on it is gone, in every process.

    Args:
        shape: its size in each direction; an int for one direction, () for a single value.
        dtype: what ``numpy.dtype`` takes, structured types included, but no Python objects.
        order: "C" or "F": which index changes fastest in memory, the last or the first.

    Raises:
        TypeError: ``dtype`` holds Python objects.
        ValueError: ``order`` is neither, or a size is negative.
        NoSpaceError: there is no room for it.
        FdLimitError: no descriptor left.
        ImportError: NumPy is not installed.
    """
    import numpy as np

    kind = np.dtype(dtype)
    if order not in ("C", "F"):
        raise ValueError(f"order is 'C' or 'F', not {order!r}")
    if kind.hasobject:
        raise TypeError(NO_OBJECTS)
    sizes = tuple(map(operator.index, shape)) if isinstance(shape, Iterable) else (operator.index(shape),)
    if min(sizes, default=0) < 0:
        raise ValueError(f"an array of shape {sizes}")
    return make_array(allocation.allocate(max(math.prod(sizes) * kind.itemsize, 1)), kind, sizes, order=order)


def share(obj: T) -> T:
    """Return an equal object whose buffers lie in shared memory, so that it travels by reference.

    Works with whatever lends its memory to pickle protocol 5: NumPy arrays, DataFrames and Series of pandas, tables of
    Arrow, PyTorch's tensors after ``fdshare.integrations.torch.install()``, your own classes that use
    ``pickle.PickleBuffer``, and containers of them.  All buffers of one call lie in one piece of memory, which is one
    descriptor in a message.  What has no buffer, such as a column of Python strings, is copied and travels by value.
    An array that lies in shared memory already is returned as it is.

    Raises:
        TypeError: nothing in ``obj`` has a buffer to share, or it holds what pickle does not take.
        NoSpaceError: there is no room for it.
        FdLimitError: no descriptor left.
    """
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(obj, numpy.ndarray):
        if obj.dtype.hasobject:
            raise TypeError(NO_OBJECTS)
        if find_array(obj) is not None:
            return obj
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    sharer = Sharer(file, PROTOCOL, buffer_callback=buffers.append)
    try:
        sharer.dump(obj)
    except (reducers.Refused, pickle.PicklingError, AttributeError) as error:
        raise TypeError(f"cannot share this {type(obj).__name__}: {error}") from error
    views = [buffer.raw() for buffer in buffers]
    if not views:
        raise TypeError(
            f"nothing in this {type(obj).__name__} lends its memory to pickle: SharedMemory.from_buffer() takes "
            "bytes, and channels send everything else"
        )
    parts, size = wire.lay_out([], 0, views)
    mapping = allocation.copy_in(parts) if size else allocation.allocate(1)
    windows, offset = [], 0
    for view in views:
        offset = wire.align(offset, view.nbytes)
        windows.append(open_window(mapping, offset, view.nbytes, view.readonly))
        offset += view.nbytes
    shared: T = pickle.loads(file.getbuffer(), buffers=windows)
    return shared


class Sharer(pickle.Pickler):
    """Pickles what may lie in shared memory; a context for reducers that lends nothing."""

    by_value = False
    moving = 0

    def reducer_override(self, obj: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(obj, numpy.ndarray):
            return _reduce_array(obj, numpy)
        if isinstance(obj, type | types.FunctionType):
            return NotImplemented  # it stays in this process
        reduce = reducers.find_reducer(type(obj))
        return NotImplemented if reduce is None else reduce(obj, self)

    def lend(self, fd: int, owner: object) -> int:
        raise reducers.Refused(owner, f"a {type(owner).__name__} is no memory: send it beside what is shared")

    def consume(self, close: Callable[[], object]) -> None:
        raise reducers.Refused(close, "move() has a meaning only in a message")

    def borrow_temporary(self, handle: FdHandle) -> None:
        handle.close()
        raise reducers.Refused(handle, "a descriptor is no memory: send it beside what is shared")


def _reduce_array(array: NDArray[Any], numpy: Any) -> Any:
    """Make an array lend its memory: NumPy copies one that has gaps, or holds dates, or is of a subclass."""
    cls, dtype = type(array), array.dtype
    if dtype.hasobject or not dtype.itemsize:
        return NotImplemented  # by value, in what else is shared
    if cls is not numpy.ndarray:
        if cls in (numpy.recarray, numpy.matrix):
            return as_class, (numpy.asarray(array), cls)
        return NotImplemented
    order: Any = "F" if array.flags.fnc else "C"
    flat = array.ravel(order).view(numpy.uint8)  # a copy where there are gaps
    return array_of_bytes, (pickle.PickleBuffer(flat), dtype, array.shape, order)


def array_of_bytes(buffer: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    """Return an array on a buffer, which has just its size; raises where it has not."""
    import numpy as np

    array: NDArray[Any] = np.frombuffer(buffer, np.uint8).view(dtype)
    return array.reshape(shape, order=order)


def as_class(array: NDArray[Any], cls: Any) -> NDArray[Any]:
    """Return the array as one of a subclass, on the same memory; raises where that is none."""
    return array.view(cls)
