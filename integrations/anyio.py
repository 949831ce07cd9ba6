"""anyio and trio: the same channels, which wait and are cancelled by their rules.

:class:`AnyioChannel` is an :class:`~fdshare.aio.AsyncChannel`, under trio with trio's way to wait, and an
``anyio.abc.ObjectStream``.  Every call is a checkpoint, before anything is sent or taken: one that is cancelled has
done nothing.  What it raises is fdshare's error and anyio's at once:

=================== ========================================================
fdshare             anyio
=================== ========================================================
``ClosedError``     ``ClosedResourceError``
``PeerClosedError`` ``EndOfStream`` (receiving), ``BrokenResourceError`` (sending)
=================== ========================================================
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import fdshare
from fdshare import Channel, ClosedError, PeerClosedError
from fdshare.aio import AsyncChannel
from fdshare.aio import Listener as AsyncioListener
from fdshare.aio.held import Held
from fdshare.aio.waiting import Turn, Waits

if TYPE_CHECKING:
    from anyio import abc
    from anyio.abc import TaskGroup
    from trio.lowlevel import TrioToken

    class _Stream(AsyncChannel, abc.ObjectStream[Any]):
        pass

    class _Listener(AsyncioListener, abc.Listener["AnyioChannel"]):
        pass

else:
    _Stream, _Listener = AsyncChannel, AsyncioListener

Address = str | bytes | os.PathLike[str] | os.PathLike[bytes]

__all__ = ["AnyioChannel", "AnyioListener", "Pipe", "connect"]

T = TypeVar("T")

FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.002, 0.1
"""The pauses between tries to connect to a full backlog, or to accept without a descriptor left: each twice the one before."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


def _trio_token() -> TrioToken | None:
    """Return what stands for the trio loop that runs now; None where it is another library's."""
    if "trio" not in sys.modules:
        return None
    import trio

    try:
        return trio.lowlevel.current_trio_token()
    except RuntimeError:
        return None


def _lowlevel() -> Any:
    """Return the module with the checkpoints of the library that runs now."""
    if _trio_token() is not None:
        return sys.modules["trio"].lowlevel
    import anyio.lowlevel

    return anyio.lowlevel


class _TrioWaits:
    """How the tasks of a trio loop wait for one socket."""

    def __init__(self, fd: int, token: TrioToken) -> None:
        import trio

        self.sending = Turn(trio.Event)
        self.receiving = Turn(trio.Event)
        self.sleep = trio.sleep
        self._fd = fd
        self._token = token
        self._pid = os.getpid()

    def is_here(self) -> bool:
        return _trio_token() is self._token

    async def readable(self) -> None:
        import trio

        with contextlib.suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(self._fd)

    async def writable(self) -> None:
        import trio

        with contextlib.suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_writable(self._fd)

    async def run(self, function: Callable[[], T], discard: Callable[[T], object]) -> T:
        import trio

        return await trio.to_thread.run_sync(function)  # not cancelled before the thread's end, nor at it

    def leave(self, close: Callable[[], object] | None) -> None:
        import trio

        if self._pid != os.getpid():
            pass  # a forked child, which must not touch the parent's poller
        elif self.is_here():
            trio.lowlevel.notify_closing(self._fd)
        else:
            try:
                if close is not None:
                    self._token.run_sync_soon(self.leave, close)
                    return
                self._token.run_sync_soon(bool)
            except trio.RunFinishedError:
                pass
            else:
                raise RuntimeError("this channel is in use by the trio loop of another thread")
        if close is not None:
            close()


@functools.cache
def _errors() -> tuple[type[ClosedError], type[PeerClosedError], type[PeerClosedError]]:
    """Return the errors for a closed end, the end of the stream, and a broken one."""
    import anyio

    class Closed(ClosedError, anyio.ClosedResourceError):
        def __reduce__(self) -> tuple[Any, ...]:
            return ClosedError, self.args

    class Ended(PeerClosedError, anyio.EndOfStream):
        def __reduce__(self) -> tuple[Any, ...]:
            return PeerClosedError, self.args

    class Broken(PeerClosedError, anyio.BrokenResourceError):
        def __reduce__(self) -> tuple[Any, ...]:
            return PeerClosedError, self.args

    return Closed, Ended, Broken


@functools.cache
def _register() -> None:
    from anyio import abc

    abc.ObjectStream.register(AnyioChannel)
    abc.Listener.register(AnyioListener)


class _Anyios(Held):
    """What a channel and a listener are by the rules of anyio."""

    def _make_waits(self) -> Waits:
        token = _trio_token()
        return super()._make_waits() if token is None else _TrioWaits(self.fileno(), token)

    async def aclose(self) -> None:
        """Close it, also where the task is cancelled; tasks that wait in it get ``anyio.ClosedResourceError``.

        Raises:
            OSError: as close(2).
        """
        self.close()
        await _lowlevel().checkpoint()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        """The typed attributes of anyio: none."""
        return {}

    if not TYPE_CHECKING:

        def extra(self, attribute: Any, default: Any = ...) -> Any:
            """Return a typed attribute of anyio; there is none.

            Raises:
                anyio.TypedAttributeLookupError: and no default was given.
            """
            if default is not ...:
                return default
            import anyio

            raise anyio.TypedAttributeLookupError("Attribute not found")


class AnyioChannel(_Anyios, _Stream):
    """One end of a connection for objects, for the tasks of anyio or trio; an ``anyio.abc.ObjectStream``.

    As :class:`fdshare.aio.AsyncChannel`, which tells the rest.

    Args:
        channel: an open Channel or AsyncChannel, which is spent.

    Raises:
        ClosedError: it is closed.
    """

    def __init__(self, channel: Channel | AsyncChannel) -> None:
        _register()
        super().__init__(channel)

    async def send(self, obj: Any) -> None:
        """Send one object, with every descriptor in it.

        Raises:
            anyio.BrokenResourceError: nobody can receive it any more; it is a PeerClosedError.
            anyio.ClosedResourceError: this side is closed, also while it waited; it is a ClosedError.
            NotSendableError, FdLimitError, NoSpaceError, MessageTooLargeError: nothing was sent.
        """
        await self._sending(super().send, obj)

    async def recv(self) -> Any:
        """Receive the next object.

        Raises:
            anyio.EndOfStream: the other side is closed and everything was received; it is a PeerClosedError.
            anyio.ClosedResourceError: this side is closed, also while it waited; it is a ClosedError.
            DecodeError, FdLimitError, DescriptorsLostError, ProtocolError: as for ``Channel.recv``.
        """
        return await self._receiving(super().recv)

    async def receive(self) -> Any:
        """Receive the next object: :meth:`recv` by the name that anyio's streams give it.

        Raises:
            anyio.EndOfStream, anyio.ClosedResourceError, DecodeError, …: as :meth:`recv`.
        """
        return await self._receiving(super().recv)

    async def send_bytes(self, buf: Any) -> None:
        """Send bytes as one message, for ``recv_bytes``.

        Raises:
            anyio.BrokenResourceError, anyio.ClosedResourceError, NoSpaceError: as :meth:`send`.
        """
        await self._sending(super().send_bytes, buf)

    async def recv_bytes(self) -> bytes:
        """Receive one message of ``send_bytes``.

        Raises:
            anyio.EndOfStream, anyio.ClosedResourceError, ProtocolError: as :meth:`recv`.
        """
        received: bytes = await self._receiving(super().recv_bytes)
        return received

    async def _sending(self, send: Callable[[Any], Awaitable[None]], what: Any) -> None:
        await _lowlevel().checkpoint()
        try:
            await send(what)
        except PeerClosedError as error:
            raise _errors()[2](*error.args) from error
        except ClosedError as error:
            raise _errors()[0](*error.args) from error

    async def _receiving(self, receive: Callable[[], Awaitable[Any]]) -> Any:
        lowlevel = _lowlevel()
        # What has to wait is a checkpoint by itself.
        waits = not self.closed and self.readable and not self.poll()
        await (lowlevel.checkpoint_if_cancelled() if waits else lowlevel.checkpoint())
        try:
            return await receive()
        except PeerClosedError as error:
            raise _errors()[1](*error.args) from error
        except ClosedError as error:
            raise _errors()[0](*error.args) from error

    async def send_eof(self) -> None:
        """Send nothing more: the peer finds the end after what was sent, and this end can still receive.

        Raises:
            anyio.ClosedResourceError: this side is closed.
        """
        await _lowlevel().checkpoint()
        self._end_output()


class AnyioListener(_Anyios, _Listener):
    """Listens at an address, and gives an :class:`AnyioChannel` for each peer that is admitted; an ``anyio.abc.Listener``.

    As :class:`fdshare.aio.Listener`, which tells the rest.
    """

    _make_channel = AnyioChannel

    async def accept(self) -> AnyioChannel:
        """Wait for the next peer that is admitted.

        Raises:
            anyio.ClosedResourceError: the listener is closed, also while it waited; it is a ClosedError.
            FdLimitError: no descriptor left; who has connected stays queued.
        """
        await _lowlevel().checkpoint()
        try:
            channel = await super().accept()
        except ClosedError as error:
            raise _errors()[0](*error.args) from error
        assert isinstance(channel, AnyioChannel)
        return channel

    async def serve(
        self, handler: Callable[[AnyioChannel], Any], task_group: TaskGroup | None = None
    ) -> None:
        """Call ``handler`` in a task for each peer; return when the listener is closed.

        Args:
            handler: takes an AnyioChannel, and closes it; what it raises is the task group's.
            task_group: where its tasks run; None for one of its own, whose tasks are waited for.

        Raises:
            OSError: accepting has failed for good.
        """
        from anyio import create_task_group, sleep

        async with contextlib.AsyncExitStack() as stack:
            group = await stack.enter_async_context(create_task_group()) if task_group is None else task_group
            pause = FIRST_PAUSE_SECONDS
            while True:
                try:
                    channel = await self.accept()
                except ClosedError:
                    return
                except OSError as error:
                    if error.errno not in _EXHAUSTED:
                        raise
                    await sleep(pause)
                    pause = min(2 * pause, MAX_PAUSE_SECONDS)
                    continue
                pause = FIRST_PAUSE_SECONDS
                group.start_soon(handler, channel)


async def connect(address: Address, **options: Any) -> AnyioChannel:
    """Connect to a listener.

    Args:
        address: the path of its socket, or an abstract name.
        options: ``allow``, ``codec``, ``transport``, as for ``fdshare.connect``; for its timeout there is ``anyio.fail_after``.

    Raises:
        FileNotFoundError, ConnectionRefusedError, AccessDeniedError, PermissionError, OSError, ValueError: as
            ``fdshare.connect``.
    """
    from anyio import sleep

    await _lowlevel().checkpoint()
    pause = FIRST_PAUSE_SECONDS
    while True:
        try:
            return AnyioChannel(fdshare.connect(address, timeout=0.0, **options))
        except TimeoutError:  # a full backlog: nothing but a blocking connect could wait for it
            pass
        await sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


def Pipe(duplex: bool = True, **options: Any) -> tuple[AnyioChannel, AnyioChannel]:  # noqa: N802 -- as fdshare.Pipe
    """Return the two ends of a new connection; arguments are those of ``fdshare.Pipe``.

    Raises:
        ValueError: unknown transport.
        OSError: no descriptors left, or the system lacks the transport.
    """
    first, second = fdshare.Pipe(duplex, **options)
    return AnyioChannel(first), AnyioChannel(second)
