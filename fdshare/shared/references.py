"""What lies in shared memory travels as a reference to it: mappings, buffers, and NumPy arrays of any shape.

======================== ============================================ ===========================================
what                     is reduced to                                and rebuilt as
======================== ============================================ ===========================================
a mapping                its descriptor, once in a message            the mapping of that file in this process
a buffer of protocol 5   a window: mapping, offset, size              a view of the mapping
an array                 mapping, type, shape, strides, offset        an array on the mapping
======================== ============================================ ===========================================

Whether something lies in shared memory is asked of its address, so it does not matter how it was derived: a slice of a
transpose, a column of a DataFrame, an Arrow buffer.  Importing this module is what makes messages look; nothing looks as long as
the process has no shared memory.

Arrays travel so by multiprocessing's own pickler too, as arguments of a Process and in stock queues and pools: by value they
would arrive as something that is not shared any more, without a word.  Other picklers take the values.
"""

from __future__ import annotations

import functools
import sys
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

from fdshare import reducers
from fdshare.errors import DecodeError
from fdshare.handle import Outside, format_of
from fdshare.shared.mapping import Mapping, address_of, find, mapped

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "NO_OBJECTS",
    "Window",
    "find_array",
    "make_array",
    "open_window",
    "rebuild_array",
    "rebuild_mapping",
]

NO_OBJECTS = "an array of Python objects cannot be shared: they are addresses, of one process alone"


# --- mappings -------------------------------------------------------------------------------------------------------------


def reduce_mapping(mapping: Mapping, context: reducers.Context) -> reducers.Reduced:
    fd = mapping.fd
    return rebuild_mapping, (context.lend(fd, mapping), format_of(fd))


def rebuild_mapping(index: int, format: int) -> Mapping:
    return mapped(reducers.peek(index), lambda: reducers.take(index, format))


# --- buffers --------------------------------------------------------------------------------------------------------------


class Window:
    """Stands for a buffer that lies in shared memory, while a message is made."""

    __slots__ = ("arguments",)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return open_window, self.arguments


def find_window(view: memoryview) -> Window | None:
    """Return the window for a contiguous buffer; None where it lies elsewhere, or has no bytes."""
    size, owner = view.nbytes, view.obj
    if not size or (
        type(owner) in _arrays and find_array(owner) is None
    ):  # ordinary arrays are the most, and told fast
        return None
    found = find(address_of(view), size)
    return None if found is None else Window(*found, size, view.readonly)


def open_window(mapping: Mapping, offset: int, size: int, readonly: bool) -> memoryview:
    """Return ``size`` bytes of a mapping, for reading alone where that is all that the sender had.

    Raises:
        DecodeError: they lie outside.
    """
    if min(offset, size) < 0 or offset + size > mapping.extent:
        raise DecodeError(f"a window of {size} bytes at {offset} in shared memory of {mapping.extent}")
    view = memoryview(mapping)[offset : offset + size]
    return view.toreadonly() if readonly else view


# --- arrays ---------------------------------------------------------------------------------------------------------------


_arrays: set[type] = set()
"""NumPy's classes that are taken here, once NumPy is there."""


def find_array(array: Any) -> tuple[Mapping, int] | None:
    """Return the mapping in which an array lies, and the offset of its first element there; None where it lies elsewhere."""
    base: Any = array
    while type(base) in _arrays:  # one or two steps
        base = base.base
    return None if base is None else find(array.ctypes.data, 0)


def reduce_array(array: NDArray[Any], context: reducers.Context) -> reducers.Reduced:
    """Take an array that lies in shared memory; leave any other to NumPy's own reduction."""
    found = find_array(array)
    dtype = array.dtype
    if found is None or dtype.hasobject:
        return NotImplemented
    strides = None if array.flags.c_contiguous else array.strides
    # A name is shorter and faster than a dtype object; fields, byte orders and types of other libraries need the object.
    kind = dtype.str if dtype.isbuiltin == 1 and dtype.metadata is None else dtype
    attend_numpy()
    cls = type(array)
    subclass = () if cls is sys.modules["numpy"].ndarray else (cls,)
    return rebuild_array, (found[0], kind, array.shape, strides, found[1], array.flags.writeable, *subclass)


def rebuild_array(
    mapping: Mapping,
    dtype: Any,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    offset: int,
    writeable: bool,
    cls: Any = None,
) -> NDArray[Any]:
    _check_place(mapping, shape, strides, offset)
    array = make_array(mapping, dtype, shape, strides, offset)
    if not writeable:
        array.flags.writeable = False
    return array if cls is None else array.view(type=cls)  # anything else it would take for a dtype


def _check_place(
    mapping: Mapping, shape: tuple[int, ...], strides: tuple[int, ...] | None, offset: int
) -> None:
    """Check that no element begins outside; NumPy does, but not before the memory, and not where the sum of strides overflows."""
    low = high = offset
    if strides is not None and 0 not in shape:
        for size, step in zip(shape, strides, strict=True):
            reach = (size - 1) * step
            if reach < 0:
                low += reach
            else:
                high += reach
    if min(shape, default=0) < 0 or low < 0 or high > mapping.extent:  # and to NumPy -1 is "what is left"
        raise DecodeError(
            f"an array of shape {shape} at {offset} reaches beyond shared memory of {mapping.extent}"
        )


def make_array(
    mapping: Mapping,
    dtype: Any,
    shape: int | tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    order: Any = "C",
) -> NDArray[Any]:
    """Return an array on a mapping, which lives as long as the array does.

    Raises:
        TypeError: of Python objects.
        ValueError: it would reach beyond the mapping.
    """
    import numpy as np

    attend_numpy()
    kind = np.dtype(dtype)
    if kind.hasobject:
        raise TypeError(NO_OBJECTS)
    # Not on the mapping itself: what NumPy takes as `buffer` it does not export, and the mapping could be closed below it.
    # frombuffer exports.
    return np.ndarray(shape, kind, np.frombuffer(mapping, np.uint8), offset, strides, order)


# --- multiprocessing ------------------------------------------------------------------------------------------------------


@functools.cache
def attend_numpy() -> None:
    """Teach multiprocessing's pickler about arrays; once NumPy is there, and memory that one may look into."""
    numpy = sys.modules["numpy"]
    for cls in (numpy.ndarray, numpy.recarray, numpy.matrix):
        _arrays.add(cls)
        ForkingPickler.register(cls, reduce_for_processes)


def reduce_for_processes(array: NDArray[Any]) -> Any:
    """Return what pickle would, but for an array in shared memory a way to it; raises as the broker does."""
    if find_array(array) is None:
        return array.__reduce__()
    return Outside.reduce(array)


for _reducer in (reduce_mapping, reduce_array):
    reducers.beside_pickle.add(_reducer)
reducers.known[Mapping] = reduce_mapping
for _name in (
    "ndarray",
    "recarray",
    "rec.recarray",
    "matrix",
):  # other subclasses may know more than their memory
    reducers.known_by_name[f"numpy.{_name}"] = reduce_array
reducers.resolved.clear()
reducers.find_window = find_window
