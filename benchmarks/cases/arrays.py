"""Large arrays: one array of bytes there, a small answer back.

The sender has the array already and sends the same one each time.  The receiver reads one byte of each 4 KiB page (their
maximum, which the sender checks), lets go of the array, and answers: the same work for every peer, so a mapping that
was never looked at does not count as received.

* fdshare: ``send(array)`` and ``recv()``.
* multiprocessing: ``send(array)`` and ``recv()`` over ``Pipe()``.
* send_bytes: the same Pipe, without pickle: ``send_bytes(array)``, and a view of what ``recv_bytes()`` returns.
* SharedMemory: by hand: create, copy in, send the name over a Pipe; attach, view, close; after the answer close and unlink.
* memcpy: no message at all: a copy into memory that is already there, read in the same way.

Arrays are NumPy's where it is present; else bytearrays, read through a memoryview.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from benchmarks.cases.support import End, pipe_of, with_partner
from benchmarks.measure import measure
from benchmarks.model import Measurement

__all__ = ["run_array"]

PAGE = 4096
MARK = 251
"""The byte that the last page holds and no other: whoever reads all pages finds it as the maximum."""


def run_array(peer: str, budget: float, *, size: int) -> Measurement:
    """Measure one array of ``size`` bytes."""
    array = _make(size)
    if peer == "memcpy":
        return Measurement(measure(_copier(array), budget))
    if peer == "SharedMemory":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()  # before the fork: one tracker for both, as multiprocessing itself does it
    serve, send = _PEERS[peer]
    with with_partner(pipe_of(peer), serve) as end:

        def operate(n: int) -> float:
            start = perf_counter()
            for _ in range(n):
                answer = send(end, array)
            took = perf_counter() - start
            if answer != MARK:
                raise RuntimeError(f"the receiver read {answer}, not {MARK}")
            return took

        return Measurement(measure(operate, budget))


def _make(size: int) -> Any:
    try:
        import numpy as np
    except ImportError:
        data = bytearray(b"\x01") * size
        data[-PAGE] = MARK
        return data
    array = np.ones(size, dtype=np.uint8)
    array[-PAGE] = MARK
    return array


def _read(array: Any) -> int:
    if isinstance(array, (bytes, bytearray, memoryview)):
        with memoryview(array) as view, view[::PAGE] as pages:
            return max(pages)
    return int(array[::PAGE].max())


def _copier(array: Any) -> Callable[[int], float]:
    target = bytearray(len(array))
    source = memoryview(array)

    def operate(n: int) -> float:
        start = perf_counter()
        for _ in range(n):
            target[:] = source
            _read(target)
        return perf_counter() - start

    def operate_numpy(n: int) -> float:
        import numpy as np

        view = np.frombuffer(target, dtype=np.uint8)
        start = perf_counter()
        for _ in range(n):
            np.copyto(view, array)
            _read(view)
        return perf_counter() - start

    return operate if isinstance(array, bytearray) else operate_numpy


def _view(buffer: Any, sample: Any) -> Any:
    """Return ``buffer`` as the kind of array that ``sample`` is, without a copy."""
    if isinstance(sample, bytearray):
        return buffer
    import numpy as np

    return np.frombuffer(buffer, dtype=np.uint8)


def _serve_objects(end: End) -> None:
    while True:
        end.send(_read(end.recv()))


def _send_object(end: End, array: Any) -> Any:
    end.send(array)
    return end.recv()


def _serve_bytes(end: Any) -> None:
    sample = _make(PAGE)
    while True:
        end.send(_read(_view(end.recv_bytes(), sample)))


def _send_bytes(end: Any, array: Any) -> Any:
    end.send_bytes(array)
    return end.recv()


def _serve_shared(end: End) -> None:
    from multiprocessing.shared_memory import SharedMemory

    sample = _make(PAGE)
    while True:
        name, size = end.recv()
        shared: Any = SharedMemory(name)
        with shared.buf[:size] as buffer:
            answer = _read(_view(buffer, sample))
        shared.close()
        end.send(answer)


def _send_shared(end: End, array: Any) -> Any:
    from multiprocessing.shared_memory import SharedMemory

    shared: Any = SharedMemory(create=True, size=len(array))
    with shared.buf[: len(array)] as buffer:
        if isinstance(array, bytearray):
            buffer[:] = array
        else:
            _view(buffer, array)[:] = array
    end.send((shared.name, len(array)))
    answer = end.recv()
    shared.close()
    shared.unlink()
    return answer


_PEERS: dict[str, tuple[Callable[[Any], None], Callable[[Any, Any], Any]]] = {
    "fdshare": (_serve_objects, _send_object),
    "multiprocessing": (_serve_objects, _send_object),
    "send_bytes": (_serve_bytes, _send_bytes),
    "SharedMemory": (_serve_shared, _send_shared),
}
