"""Stock pools carry descriptors: ``install()`` teaches their picklers to leave files, sockets and handles with the broker.

Each pool has a pickler of its own, and each looks types up in tables:

======================================== ======================================================================
``multiprocessing``, concurrent.futures  ForkingPickler: its own table, then copyreg's
loky, joblib                             a cloudpickle: loky's own table, then cloudpickle's, then copyreg's
Dask                                     pickle, and where that fails or meets ``__main__``, cloudpickle
======================================== ======================================================================

So the types go into copyreg's table, and replace what the others say of the same types; libraries that are not loaded yet
are seen to when they are.  Workers need the same for their results.  A forked one inherits it; any other gets it with the
configuration that every multiprocessing process takes from the one that starts it (loky's and Dask's workers are such
processes); and each pickle that is made here brings it along.
"""

from __future__ import annotations

import copyreg
import functools
import importlib.abc
import os
import pickle
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from itertools import islice
from multiprocessing import connection, process, queues, reduction
from multiprocessing.context import get_spawning_popen
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fdshare import broker, handoff

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

__all__ = ["install", "installed", "uninstall"]

_KEY = "fdshare"
"""Where the installation stands in a process's configuration."""

_lock = threading.RLock()
_undo: list[Callable[[], object]] = []
_types: tuple[type, ...] = ()
_refused: tuple[type, ...] = ()
_declined = False


def install(*, lease: float | None = None) -> None:
    """Make stock pools carry files, sockets, pipes, Connections, Channels, FdHandles and registered types, both ways.

    Call it before the pool is made, and after ``fdshare.register``; a second call takes in what was registered
    meanwhile.  What is passed must stay open until the pool has pickled it, which is later than ``submit`` returns;
    ``Queue.put`` alone pickles at once.

    Args:
        lease: seconds that a descriptor waits for the worker to unpickle it, in workers too; None leaves it as it is
            (600).

    Raises:
        ValueError: the lease is not above zero.
    """
    global _declined, _refused, _types
    with _lock:
        if lease is not None:
            broker.set_lease(lease)
        _remove()
        _declined = False
        _types = tuple(handoff.carried_types())
        for cls in _types:
            _enter(copyreg.dispatch_table, cls, _reduce)
        _refused = tuple(handoff.refused_types())
        for cls in _refused:
            _refuse(cls)
        _override(reduction.ForkingPickler._extra_reducers)  # type: ignore[attr-defined]
        for queue in (queues.Queue, queues.JoinableQueue):
            _attend_queue(queue)
        _set(process.current_process()._config, _KEY, _Bootstrap())  # type: ignore[attr-defined]
        watcher = _Watcher()
        sys.meta_path.insert(0, watcher)
        _undo.append(lambda: sys.meta_path.remove(watcher))
        for name, attend in _NEIGHBOURS.items():
            module = sys.modules.get(name)
            if module is not None:
                attend(module)


def uninstall() -> None:
    """Put back what was there before :func:`install`; never raises.  Workers that run already keep theirs."""
    global _declined
    with _lock:
        _remove()
        _declined = True


def installed() -> bool:
    """Whether :func:`install` is in effect in this process; never raises."""
    return bool(_undo)


def _remove() -> None:
    while _undo:
        _undo.pop()()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


os.register_at_fork(after_in_child=_after_fork)


# --- tables -------------------------------------------------------------------------------------------------------------

_ABSENT: Any = object()


def _set(table: MutableMapping[Any, Any], key: Any, value: Any) -> None:
    before = table.get(key, _ABSENT)

    def restore() -> None:
        if table.get(key) is value:  # else somebody has replaced ours, and means it
            if before is _ABSENT:
                del table[key]
            else:
                table[key] = before

    table[key] = value
    _undo.append(restore)


def _enter(table: MutableMapping[Any, Any], cls: type, reduce: Any) -> None:
    _set(table, cls, _reduce_connection if cls is connection.Connection else reduce)


def _override(table: MutableMapping[Any, Any]) -> None:
    """Replace what a table says of our types; where it says nothing, copyreg's table is asked."""
    for cls in _types:
        if cls in table:
            _enter(table, cls, _reduce)


def _refuse(cls: type) -> None:
    """Let a type say why it does not travel; where it is made in Python, to all of its subclasses too."""
    try:
        cls.__reduce_ex__ = _reduce_refused  # type: ignore[assignment, method-assign]
    except TypeError:  # made in C
        _set(copyreg.dispatch_table, cls, _reduce)
    else:
        _undo.append(lambda: delattr(cls, "__reduce_ex__"))


def _reduce_refused(obj: Any, protocol: Any) -> Any:
    cls: Any = type(obj)
    if sys._getframe(1).f_globals.get("__name__") == "copy" or cls.__reduce__ is not object.__reduce__:
        return object.__reduce_ex__(obj, protocol)
    return handoff.reduce_outside(obj)


# --- reduce and rebuild ---------------------------------------------------------------------------------------------------


def _reduce(obj: Any) -> Any:
    if sys._getframe(1).f_globals.get("__name__") == "copy":  # it asks copyreg too, and is no pickler
        return obj.__reduce_ex__(4)
    return _reduce_for_picklers(obj)


def _reduce_connection(obj: Any) -> Any:
    if sys._getframe(1).f_globals.get("__name__") == "copy":
        return obj.__reduce_ex__(4)
    if get_spawning_popen() is not None:  # the pools' own plumbing
        return connection.reduce_connection(obj)  # type: ignore[attr-defined]
    return _reduce_for_picklers(obj)


def _reduce_for_picklers(obj: object) -> tuple[Any, ...]:
    function, arguments = handoff.reduce_outside(obj)
    return rebuild_installed, (broker.get_lease(), function, *arguments)


def rebuild_installed(lease: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """Rebuild what a pickle holds, and be able to answer in kind; raises as the broker does."""
    _install_quietly(lease)
    return function(*arguments)


def _install_quietly(lease: float) -> None:
    with _lock:
        if not _undo and not _declined:
            install(lease=lease)


class _Bootstrap:
    """In the configuration of this process, which its children take over: unpickling it installs."""

    def __reduce__(self) -> tuple[Any, ...]:
        return start_installed, (broker.get_lease(),)


def start_installed(lease: float) -> _Bootstrap:
    """Install in a process that multiprocessing is starting; never raises for a lease that was valid."""
    _install_quietly(lease)
    return _Bootstrap()


# --- queues -------------------------------------------------------------------------------------------------------------------

_SCANNED = 100
"""Most items of each container that are looked at before it is put into a queue, three containers deep."""


class _Pickled:
    """What was pickled already: a pickle inside the pickle."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (self.data,)


def _attend_queue(cls: Any) -> None:
    """Let ``put`` pickle what holds descriptors, or is refused, at once: its thread would lose the item without a word."""
    original = cls.put

    @functools.wraps(original)
    def put(self: Any, obj: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is not cls or not _holds_ours(obj, 3):  # the pools' own queues are subclasses
            original(self, obj, *args, **kwargs)
            return
        with handoff.attempts():
            data = bytes(reduction.ForkingPickler.dumps(obj))
            original(self, _Pickled(data), *args, **kwargs)

    cls.put = put
    _undo.append(lambda: setattr(cls, "put", original))


def _holds_ours(obj: Any, depth: int) -> bool:
    cls = type(obj)
    if cls in (list, tuple, set, frozenset, dict):
        items = obj.values() if cls is dict else obj
        return depth > 0 and any(_holds_ours(item, depth - 1) for item in islice(items, _SCANNED))
    return cls in _types or any(base in _refused for base in cls.__mro__)


# --- neighbours, once they are loaded ---------------------------------------------------------------------------------------


def _attend_cloudpickle(module: ModuleType) -> None:
    # It would take a readable text file for its contents.  Older ones have no table of their own.
    _override(getattr(module.CloudPickler, "_dispatch_table", {}))


def _attend_loky(module: ModuleType) -> None:
    _override(module._dispatch_table)


def _attend_dask_tokenize(module: ModuleType) -> None:
    # Dask names a task by the pickle of its arguments, which would leave deposits.  No two uses of a file are the
    # same, so each gets a name of its own.
    table = getattr(getattr(module, "normalize_token", None), "_lookup", None)
    if table is not None:
        for cls in _types:
            _set(table, cls, _unique_token)


def _unique_token(obj: object) -> str:
    return uuid.uuid4().hex


def _attend_dask_pickle(module: ModuleType) -> None:
    original = module.dumps

    @functools.wraps(original)
    def dumps(*args: Any, **kwargs: Any) -> Any:
        global _dask_deposits
        with handoff.attempts() as deposits:  # it tries up to three picklers
            result = original(*args, **kwargs)
        _dask_deposits += bool(deposits)
        return result

    _set(vars(module), "dumps", dumps)


_dask_deposits = 0
"""How many of Dask's pickles had descriptors so far; a missed count between threads is none of zero."""


class _MessageLog(deque[Any]):
    """What a BatchedSend remembers of its last thousand messages, without the tasks' descriptors, which it would keep open."""

    _seen = -1

    def append(self, payload: Any) -> None:
        if self._seen != _dask_deposits:
            self._seen = _dask_deposits
            if isinstance(payload, list):
                payload = [
                    {**message, "run_spec": None}
                    if isinstance(message, dict) and "run_spec" in message
                    else message
                    for message in payload
                ]
        super().append(payload)


def _attend_dask_batched(module: ModuleType) -> None:
    original = module.BatchedSend.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        log = getattr(self, "recent_message_log", None)
        if type(log) is deque:
            self.recent_message_log = _MessageLog(log, log.maxlen)

    module.BatchedSend.__init__ = init
    _undo.append(lambda: setattr(module.BatchedSend, "__init__", original))


_NEIGHBOURS: dict[str, Callable[[ModuleType], None]] = {
    "cloudpickle.cloudpickle": _attend_cloudpickle,
    "joblib.externals.cloudpickle.cloudpickle": _attend_cloudpickle,
    "loky.backend.reduction": _attend_loky,
    "joblib.externals.loky.backend.reduction": _attend_loky,
    "dask.tokenize": _attend_dask_tokenize,
    "distributed.protocol.pickle": _attend_dask_pickle,
    "distributed.batched": _attend_dask_batched,
}


class _Watcher(importlib.abc.MetaPathFinder):
    """Attends to a neighbour right after it was loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        attend = _NEIGHBOURS.get(fullname)
        if attend is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                self._follow(spec.loader, attend)
                return spec
        return None

    def _follow(self, loader: Any, attend: Callable[[ModuleType], None]) -> None:
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            with _lock:
                if self in sys.meta_path:
                    attend(module)

        loader.exec_module = exec_module
