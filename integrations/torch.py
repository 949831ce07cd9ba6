"""PyTorch: ``install()`` lets CPU tensors travel by their storages, whatever holds them.

========================================= =========================================================================
a storage                                 travels
========================================= =========================================================================
ordinary                                  by value: small ones in the message, all large ones in one segment of it
in memory of ``fdshare.share``, of        by reference: what one process writes, the others see
``fdshare.shared_array`` (by from_numpy)
of ``tensor.share_memory_()``             by reference, with PyTorch's own descriptor, one for each such storage
========================================= =========================================================================

A tensor is its storage, seen in some way: two views of one storage arrive as two views of one storage, and a storage is sent
whole, also for a view of a part of it.  What is more than a plain tensor (sparse, quantized, a Parameter, a subclass,
a module) goes PyTorch's own way, which ends in plain tensors and storages.

A process that receives a tensor has ``install()`` done for it, so that it answers in kind.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import stat
from typing import TYPE_CHECKING, Any

from fdshare import DecodeError, reducers
from fdshare.shared import arrays, mapping

if TYPE_CHECKING:
    import torch

__all__ = ["install", "installed", "is_shared"]


def install() -> None:
    """Let tensors travel over Channels and through pools, both ways, and let ``fdshare.share`` take them; again is harmless.

    Raises:
        ImportError: PyTorch is not installed.
    """
    import torch
    from torch.storage import TypedStorage

    if torch.Tensor in reducers.known:
        return
    for cls, reduce in (
        (torch.Tensor, reduce_tensor),
        (torch.UntypedStorage, reduce_storage),
        (TypedStorage, reduce_typed_storage),
    ):
        reducers.beside_pickle.add(
            reduce
        )  # subclasses know by themselves, and other picklers have PyTorch's reductions
        reducers.known[cls] = reduce
    reducers.resolved.clear()


def installed() -> bool:
    """Whether :func:`install` was called in this process, by hand or by what it received; never raises."""
    return reduce_tensor in reducers.beside_pickle


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory is shared with other processes, fdshare's way or PyTorch's; it travels by reference then.

    ``tensor.is_shared()`` knows of PyTorch's way alone.

    Raises:
        AttributeError: it is no tensor.
    """
    storage = tensor.untyped_storage()
    return storage.is_shared() or mapping.find(storage.data_ptr(), storage.nbytes()) is not None


# --- tensors --------------------------------------------------------------------------------------------------------------


def reduce_tensor(tensor: torch.Tensor, context: reducers.Context) -> reducers.Reduced:
    import torch

    if tensor.requires_grad and not tensor.is_leaf:
        raise reducers.Refused(
            tensor,
            "gradients do not flow between processes, and this tensor is computed from others: detach() it first",
        )
    if tensor.device.type not in ("cpu", "meta"):
        raise reducers.Refused(tensor, f"its memory is of the device {tensor.device}: send tensor.cpu()")
    plain = (
        tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not tensor.__dict__
        and not tensor._backward_hooks
    )
    if not plain:
        return NotImplemented  # PyTorch's own way
    place = tensor.storage_offset(), tuple(tensor.size()), tensor.stride()
    return rebuild_tensor, (tensor.untyped_storage(), tensor.dtype, *place, tensor.requires_grad)


def rebuild_tensor(
    storage: torch.UntypedStorage,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
) -> torch.Tensor:
    """Look into a storage; raises RuntimeError where the tensor would reach beyond it."""
    import torch

    tensor = torch.empty(0, dtype=dtype)
    tensor.set_(storage, offset, size, stride)
    if requires_grad:
        tensor.requires_grad = True
    return tensor


# --- storages -------------------------------------------------------------------------------------------------------------


def reduce_storage(storage: torch.UntypedStorage, context: reducers.Context) -> reducers.Reduced:
    if storage.device.type != "cpu":
        raise reducers.Refused(storage, f"its memory is of the device {storage.device}: send tensor.cpu()")
    size = storage.nbytes()
    if storage.is_shared() and not isinstance(context, arrays.Sharer):
        fd = _descriptor(storage)
        if fd >= 0:
            return rebuild_shared_storage, (context.lend(fd, storage), size)
    # A window on the memory, which holds it.
    window: Any = (ctypes.c_ubyte * size).from_address(storage.data_ptr())
    window.owner = storage
    return rebuild_storage, (pickle.PickleBuffer(window),)


def rebuild_storage(buffer: Any) -> torch.UntypedStorage:
    """Make a storage of a buffer, which it keeps; raises TypeError where that is none."""
    import torch

    install()
    view = memoryview(buffer)
    if not view.nbytes:
        return torch.UntypedStorage(0)
    if view.readonly:  # PyTorch knows no such thing, and would write into what cannot be written
        buffer = bytearray(view)
    return torch.frombuffer(buffer, dtype=torch.uint8).untyped_storage()


def _descriptor(storage: torch.UntypedStorage) -> int:
    """Borrow PyTorch's descriptor of shared memory; -1 where it keeps none."""
    from torch.multiprocessing import get_sharing_strategy

    if get_sharing_strategy() != "file_descriptor":
        # Asked for a descriptor, PyTorch would give this storage other memory than those that share it have.
        raise reducers.Refused(
            storage,
            "it is shared by a name (PyTorch's strategy file_system), which is bound to PyTorch's own queues: use "
            "fdshare.share() in place of share_memory_(), or the strategy file_descriptor",
        )
    fd: int = storage._share_fd_cpu_()[0]
    return fd


def rebuild_shared_storage(index: int, size: int) -> torch.UntypedStorage:
    """Map what ``share_memory_()`` made.

    Raises:
        DecodeError: the descriptor is not of a file of this size.
    """
    import torch

    install()
    handle = reducers.take(index, stat.S_IFREG)
    with handle:  # PyTorch duplicates it
        actual = os.fstat(handle.fileno()).st_size
        if not 0 < size <= actual:
            raise DecodeError(f"a shared storage of {size} bytes in a file of {actual}")
        storage: torch.UntypedStorage = torch.UntypedStorage._new_shared_fd_cpu(handle.fileno(), size)
        return storage


def reduce_typed_storage(storage: Any, context: reducers.Context) -> reducers.Reduced:
    return rebuild_typed_storage, (storage._untyped_storage, storage.dtype)


def rebuild_typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> Any:
    from torch.storage import TypedStorage

    return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
