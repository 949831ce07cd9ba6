"""Memory that is shared, and tensors: a reference there, a small answer back.

``shared-new``: 1 MiB that is there is put into new memory, sent, read and given up, each time anew.

* fdshare: ``SharedMemory.from_buffer(content)``, ``send`` it; the receiver reads a byte of each page of ``buf`` and drops it.
* SharedMemory: ``multiprocessing.shared_memory``: create, copy in, send the name over a Pipe; attach, read, close; close and
  unlink.

``shared-1KiB``, ``shared-1GiB``: an array in shared memory is sent; the receiver adds one to its first element and drops the
array.  The memory is made once.

* fdshare: ``shared_array(...)``, ``send`` it.
* SharedMemory: the name and the shape over a Pipe; attach, ``numpy.ndarray(buffer=...)``, close.

``tensors-1000``, ``tensor-shared``: a thousand tensors of 16 bytes, and one of 64 MiB in shared memory; PyTorch's own way
moves what it sends into shared memory at the first time, which is not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from benchmarks.cases.support import End, need_descriptors, pipe_of, with_partner
from benchmarks.measure import measure
from benchmarks.model import Measurement, Skipped

__all__ = ["run_array", "run_new", "run_tensor", "run_tensors"]

NEW_SIZE = 1 << 20
PAGE = 4096
TENSORS = 1000
TENSOR_SIZE = 64 << 20


def _measured(
    pair: tuple[End, End],
    serve: Callable[[End], None],
    budget: float,
    send: Callable[[End], Any],
    expected: Any,
) -> Measurement:
    with with_partner(pair, serve) as end:

        def operate(n: int) -> float:
            start = perf_counter()
            for _ in range(n):
                answer = send(end)
            took = perf_counter() - start
            if expected is not None and answer != expected:
                raise RuntimeError(f"the receiver answered {answer}, not {expected}")
            return took

        return Measurement(measure(operate, budget))


def _start_tracker() -> None:
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # before the fork: one tracker for both, as multiprocessing itself does it


def _read(buffer: memoryview) -> int:
    with buffer[:NEW_SIZE:PAGE] as pages:
        return max(pages)


def run_new(peer: str, budget: float) -> Measurement:
    """Measure new memory, filled, sent, read and given up."""
    content = b"\x07" * NEW_SIZE
    if peer == "fdshare":
        import fdshare

        def serve(end: End) -> None:
            while True:
                end.send(_read(end.recv().buf))

        def send(end: End) -> Any:
            end.send(fdshare.SharedMemory.from_buffer(content))
            return end.recv()

    else:
        from multiprocessing.shared_memory import SharedMemory

        _start_tracker()

        def serve(end: End) -> None:
            while True:
                shared: Any = SharedMemory(end.recv())
                answer = _read(shared.buf)
                shared.close()
                end.send(answer)

        def send(end: End) -> Any:
            shared: Any = SharedMemory(create=True, size=NEW_SIZE)
            shared.buf[:NEW_SIZE] = content
            end.send(shared.name)
            answer = end.recv()
            shared.close()
            shared.unlink()
            return answer

    return _measured(pipe_of(peer), serve, budget, send, 7)


def run_array(peer: str, budget: float, *, size: int) -> Measurement:
    """Measure an array of ``size`` bytes that lies in shared memory."""
    try:
        import numpy as np
    except ImportError:
        raise Skipped("NumPy is not installed") from None
    if peer == "fdshare":
        import fdshare

        array = fdshare.shared_array(size, "u1")

        def serve(end: End) -> None:
            while True:
                received = end.recv()
                received[0] += 1
                end.send(received.shape)

        def send(end: End) -> Any:
            end.send(array)
            return end.recv()

        return _measured(pipe_of(peer), serve, budget, send, array.shape)
    from multiprocessing.shared_memory import SharedMemory

    _start_tracker()

    def serve_name(end: End) -> None:
        while True:
            name, shape = end.recv()
            there: Any = SharedMemory(name)
            received = np.ndarray(shape, "u1", buffer=there.buf)
            received[0] += 1
            shape = received.shape
            del received
            there.close()
            end.send(shape)

    shared: Any = SharedMemory(create=True, size=size)
    try:
        return _measured(
            pipe_of(peer),
            serve_name,
            budget,
            lambda end: (end.send((shared.name, (size,))), end.recv())[1],
            (size,),
        )
    finally:
        shared.close()
        shared.unlink()


def _torch() -> Any:
    try:
        import torch
        import torch.multiprocessing
    except ImportError:
        raise Skipped("PyTorch is not installed") from None
    torch.set_num_threads(1)  # its threads do not survive the fork
    from fdshare.integrations.torch import install

    install()
    return torch


def _serve_tensors(end: End) -> None:
    while True:
        tensors = end.recv()
        for tensor in tensors[:1]:
            tensor[0] += 1
        answer = len(tensors)
        del tensors, tensor
        end.send(answer)


def run_tensors(peer: str, budget: float) -> Measurement:
    """Measure a thousand small tensors in one message."""
    torch = _torch()
    need_descriptors(4 * TENSORS)  # PyTorch has one for each, and duplicates them for the message
    tensors = [torch.full((4,), float(number)) for number in range(TENSORS)]
    return _measured(
        pipe_of(peer), _serve_tensors, budget, lambda end: (end.send(tensors), end.recv())[1], TENSORS
    )


def run_tensor(peer: str, budget: float) -> Measurement:
    """Measure one large tensor that lies in shared memory."""
    torch = _torch()
    tensor = torch.zeros(TENSOR_SIZE // 4)
    if peer == "fdshare":
        import fdshare

        tensor = fdshare.share(tensor)
    else:
        tensor.share_memory_()
    measured = _measured(
        pipe_of(peer), _serve_tensors, budget, lambda end: (end.send([tensor]), end.recv())[1], 1
    )
    if not tensor[0]:
        raise RuntimeError("the receiver wrote into memory of its own")
    return measured
