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
import importlib.util
import logging
import os
import pickle
import sys
import threading
import uuid
from collections import deque
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
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
        _undo.append(partial(_dismiss, watcher))
        for name in _NEIGHBOURS:
            module = sys.modules.get(name)
            if module is not None:
                watcher.see_to(name, module)


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


def _dismiss(watcher: _Watcher) -> None:
    for place, finder in enumerate(sys.meta_path):  # in which others are compared as they please
        if finder is watcher:
            del sys.meta_path[place]
            return


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

    batched = module.BatchedSend  # another one after a reload
    batched.__init__ = init
    _undo.append(lambda: setattr(batched, "__init__", original))


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
    """Attends to a neighbour right after it was loaded, by whatever loader, which is left as it is.

    A loader may serve all modules, be a class, have slots, or be a proxy of another one's; so nothing is written into it.  The
    spec gets a loader of ours that holds the other, and puts it back where it belongs before that one looks.
    """

    def __init__(self) -> None:
        self._asking = _Asking()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        attend = _NEIGHBOURS.get(fullname)
        if attend is None or fullname in self._asking.names:
            return None
        self._asking.names.add(fullname)
        try:
            # As the interpreter itself asks: finders may have no find_spec, or ask others in turn.
            spec: ModuleSpec | None = importlib._bootstrap._find_spec(fullname, path, target)  # type: ignore[attr-defined]
        finally:
            self._asking.names.discard(fullname)
        if spec is not None and spec.loader is not None and not isinstance(spec.loader, _Held):
            _hold(spec, partial(self.see_to, fullname))
        return spec

    def see_to(self, name: str, module: Any, *, used: bool = False) -> None:
        """Attend to a neighbour that was loaded, or will be when it is first used.

        Args:
            used: whether it is lazy, and has just been used and loaded: from 3.13 on it becomes an ordinary one only then.
        """
        with _lock:
            if not any(finder is self for finder in sys.meta_path):
                return
            try:
                if type(module) is _LAZY and not used:
                    _hold(object.__getattribute__(module, "__spec__"), partial(self.see_to, name))
                else:
                    _NEIGHBOURS[name](module)
            except Exception:  # it is not what we know by this name, and its import is not to fail for that
                logging.getLogger("fdshare").warning("install() cannot attend to %s", name, exc_info=True)


def _hold(spec: Any, attend: Callable[..., object]) -> None:
    """Have ``attend`` called after the module of ``spec`` was loaded."""
    kind = _Attending if hasattr(spec.loader, "exec_module") else _AttendingOld
    try:
        spec.loader = kind(spec, attend)
    except AttributeError:  # a spec of somebody's own, which keeps its loader
        pass


class _Asking(threading.local):
    """The neighbours that this thread is looking for."""

    def __init__(self) -> None:
        self.names: set[str] = set()


class _Held:
    """A loader that holds another one, and answers as that does."""

    def __init__(self, spec: Any, attend: Callable[..., object]) -> None:
        self._fdshare_held = spec.loader
        self._fdshare_spec = spec
        self._fdshare_attend = attend

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_fdshare"):  # of one that is just being made, by copy or pickle
            raise AttributeError(name)
        return getattr(self._fdshare_held, name)


class _Attending(_Held):
    """One that loads as loaders do since Python 3.4."""

    def create_module(self, spec: Any) -> Any:
        """Have the module made; raises as the other loader."""
        spec.loader = self._fdshare_held
        try:
            return self._fdshare_held.create_module(spec)
        finally:
            spec.loader = self

    def exec_module(self, module: Any) -> None:
        """Have it executed, then attend to it; raises as the other loader."""
        for spec in (self._fdshare_spec, module.__spec__):
            if spec is not None and spec.loader is self:
                spec.loader = self._fdshare_held
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = self._fdshare_held
        lazy = type(module) is _LAZY
        self._fdshare_held.exec_module(module)
        self._fdshare_attend(module, used=lazy)


class _AttendingOld(_Held):
    """One that only has ``load_module``."""

    def load_module(self, name: str) -> Any:
        """Have the module loaded, then attend to it; raises as the other loader."""
        self._fdshare_spec.loader = self._fdshare_held
        module = self._fdshare_held.load_module(name)
        self._fdshare_attend(sys.modules.get(name, module))
        return module


_LAZY: Any = getattr(importlib.util, "_LazyModule", None)
"""What LazyLoader makes: loaded when it is first used, by the loader that stands in its spec then."""
