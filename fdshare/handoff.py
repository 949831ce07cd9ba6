"""How picklers that are not a channel's take a descriptor: reduced to a ticket here, fetched by it there.

The names of the rebuild functions are the wire format; the protocol is drawn in ``broker.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import sys
import threading
import types
from collections.abc import Iterator, Sized
from importlib import import_module
from typing import Any

from fdshare import broker, reducers, rights, system
from fdshare.broker import BUNDLED, BUSY, DENIED, GIVEN, UNKNOWN
from fdshare.codec import Incoming, Outgoing, PickleCodec
from fdshare.credentials import peer_credentials, same_user
from fdshare.disposal import dispose
from fdshare.errors import AccessDeniedError, FdLimitError, HandoffExpiredError, ProtocolError
from fdshare.handle import FdHandle, HandleList, Handles, Moved, own
from fdshare.rendezvous import short_path
from fdshare.wire import MAX_FDS_PER_PACKET

__all__ = ["attempts", "carried_types", "fetch", "reduce_outside", "refused_types"]

_CODEC = PickleCodec()

# --- fetching -------------------------------------------------------------------------------------------------------------


def fetch(address: str, token: bytes, count: int, *, timeout: float | None = None) -> HandleList:
    """Take the ``count`` descriptors that wait at ``address`` under ``token``; they are the caller's.

    Args:
        timeout: seconds; None is the lease.  The sender's death ends the wait at once.

    Raises:
        HandoffExpiredError: they were fetched already, their lease ran out, or the sender has ended.
        AccessDeniedError: the sender is another user.
        FdLimitError: no room for them here, or too many in flight there: they wait on, and can be fetched again.
        TimeoutError: the sender does not answer.
    """
    if address == broker.current().address or token in broker.current():
        handles = broker.current().take(token)
        if handles is None:
            raise _expired("")
        return handles
    room = min(count, MAX_FDS_PER_PACKET) + 2  # the connection, and a directory where its path is long
    if not rights.has_room_for(room):
        raise rights.limit_error(count)
    timeout = min(broker.current().lease if timeout is None else timeout, broker.LONGEST_WAIT)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        # Not settimeout(): in a socket that does not block, connect fails at once when the backlog is full.
        sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, system.timeval(timeout + 1e-6)
        )  # 0 would be no limit
        try:
            with short_path(address) as short:
                sock.connect(short)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise _expired(", or the process that pickled it has ended") from error
        except PermissionError as error:
            raise AccessDeniedError(errno.EACCES, f"the broker at {address} is another user's") from error
        except BlockingIOError as error:
            raise TimeoutError(f"no connection to the broker at {address}") from error
        if not same_user(peer_credentials(sock)):
            dispose(sock, alone=True)
            raise AccessDeniedError(errno.EACCES, f"the broker at {address} is another user's")
        sock.settimeout(timeout)
        return _receive(sock, token, count)


def _receive(sock: socket.socket, token: bytes, count: int) -> HandleList:
    try:
        sock.sendall(token)
        answer, received = rights.recv_fds(sock, 1, MAX_FDS_PER_PACKET)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise _expired(", or the process that pickled it has ended") from error
    handles = Handles(received)
    if answer == BUNDLED and len(handles) == 1:
        return rights.unbundle(handles.pop(), count)
    if answer == GIVEN and len(handles) == count:
        return handles
    handles.close()
    if answer == BUSY:
        raise FdLimitError(errno.ETOOMANYREFS, "the sender has too many descriptors in flight", needed=count)
    if answer == DENIED:
        raise AccessDeniedError(errno.EACCES, "the broker admits only processes of its own user")
    if answer == UNKNOWN:
        raise _expired("")
    if not answer:
        raise _expired(", or the process that pickled it has ended")
    raise ProtocolError(f"a broker answered {answer!r} with {len(received)} descriptors for {count}")


def _expired(more: str) -> HandoffExpiredError:
    return HandoffExpiredError(
        f"the descriptors of this pickle were fetched already (a pickle can be loaded once), "
        f"or their lease ran out{more}"
    )


# --- reduce and rebuild -----------------------------------------------------------------------------------------------------


def reduce_outside(obj: object) -> tuple[Any, ...]:
    """Return what ``__reduce__`` would, for any pickler but a channel's: inherited while a process is started, else deposited.

    Raises:
        NotSendableError: it cannot travel.
        OSError: no descriptor left.
    """
    message = _CODEC.encode(obj)
    if isinstance(message, bytes):
        return rebuild_plain, (message, ())
    try:
        payload = b"".join(message.payload)
        buffers = [bytes(b) if b.readonly else bytearray(b) for b in message.buffers]
        if not message.fds:
            return rebuild_plain, (payload, buffers)
        inherited = _inherit(message)
        if inherited is not None:
            return rebuild_inherited, (payload, buffers, inherited)
        handles: HandleList = Handles()
        try:
            bundle = rights.keep_in_flight(message.fds)
            if bundle is None:
                handles.extend(map(FdHandle.dup, message.fds))
            else:
                handles.append(bundle)
            ticket = broker.current().deposit(handles, 0 if bundle is None else len(message.fds))
        except BaseException:
            handles.close()
            raise
        _attempt.note(obj, ticket[1])
        return rebuild_fetched, (payload, buffers, *ticket)
    finally:
        message.failed()


def _inherit(message: Outgoing) -> list[Any] | None:
    """Return multiprocessing's own tokens for descriptors that the process being started now will inherit; None without one."""
    context = sys.modules.get("multiprocessing.context")
    popen = None if context is None else context.get_spawning_popen()
    if popen is None or message._temporaries:
        return None
    # The child could not tell two owners of one number apart.
    if len(message.fds) + len(popen._fds) > MAX_FDS_PER_PACKET or set(message.fds) & set(popen._fds):
        return None
    from multiprocessing import reduction

    return [reduction.DupFd(fd) for fd in message.fds]


def rebuild_plain(payload: bytes, buffers: Any) -> Any:
    return _CODEC.decode(Incoming(payload, Handles(), [memoryview(b) for b in buffers]))


def rebuild_inherited(payload: bytes, buffers: Any, tokens: list[Any]) -> Any:
    handles: HandleList = Handles()
    for token in tokens:
        handles.append(own(token.detach))
    for handle in handles:
        os.set_inheritable(handle.fileno(), False)
    return _CODEC.decode(Incoming(payload, handles, [memoryview(b) for b in buffers]))


def rebuild_fetched(payload: bytes, buffers: Any, address: str, token: bytes, count: int) -> Any:
    handles = fetch(address, token, count)
    return _CODEC.decode(Incoming(payload, handles, [memoryview(b) for b in buffers]))


def carried_types() -> list[type]:
    """Return the types that :func:`reduce_outside` takes at present, registered ones included; loads what holds them."""
    types_ = [
        cls
        for cls, reducer in reducers.known.items()
        if cls not in _MESSAGE_ONLY and reducer not in reducers.beside_pickle
    ]
    for name, reducer in reducers.known_by_name.items():
        if reducer not in reducers._refusals | reducers.beside_pickle:
            module, _, cls = name.rpartition(".")
            types_.append(getattr(import_module(module), cls))
    return types_


def refused_types() -> list[type]:
    """Return the loaded types whose objects hold numbers of this process, which others would take or refuse without a hint."""
    found: list[Any] = [type(select.poll())]  # select.poll itself is a function
    for name in reducers.OF_THIS_PROCESS:
        module, _, cls = name.rpartition(".")
        found.append(getattr(sys.modules.get(module), cls, None))
    return [cls for cls in found if isinstance(cls, type)]


_MESSAGE_ONLY = (reducers.Mark, Moved, types.FunctionType)


class _Attempt(threading.local):
    tokens: dict[int, bytes] | None = None

    def note(self, obj: object, token: bytes) -> None:
        if self.tokens is not None:
            _discard(self.tokens.get(id(obj)))
            self.tokens[id(obj)] = token


_attempt = _Attempt()


def _discard(token: bytes | None) -> None:
    if token is not None:
        broker.current().discard(token)


@contextlib.contextmanager
def attempts() -> Iterator[Sized]:
    """Around code that pickles the same objects again when a first pickler has failed: only the last attempt's deposits stay.

    Where the block raises, none does.  Gives what tells how many there are.
    """
    tokens: dict[int, bytes] = {}
    outer, _attempt.tokens = _attempt.tokens, tokens
    try:
        yield tokens
    except BaseException:
        for token in tokens.values():
            _discard(token)
        raise
    finally:
        _attempt.tokens = outer
