"""What runs in a worker process: take a call, run it, send what came of it, until told to stop.

The worker says nothing when it begins a task: what it has taken out of its inbox and not answered is what it is running, and
the parent holds a duplicate of the inbox.  It dies with its parent, in whatever code it is at that moment.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import signal
import warnings
from collections.abc import Callable
from concurrent.futures import _base
from typing import Any

from fdshare import parcel, recycle
from fdshare.channel import Channel
from fdshare.codec import Outgoing
from fdshare.errors import DecodeError, NotSendableError, PeerClosedError
from fdshare.handle import FdHandle
from fdshare.pool.calls import FunctionCache, encode_result, typed
from fdshare.pool.life import die_with_parent
from fdshare.pool.raised import Raised
from fdshare.pool.tasks import (
    CALL,
    CANNOT_RECEIVE,
    ERROR,
    INITIALIZER_FAILED,
    KIND_BITS,
    KIND_MASK,
    READY,
    RESULT,
)

__all__ = ["main"]

LOOK_EVERY = 8
"""After so many tasks a worker that used to wait for each looks whether they come faster now: a wait in vain takes a tenth of
a small task's time, and so does a look."""

_READY_MESSAGE = parcel.seal(pickle.dumps(None, 5), READY)

_pid = 0
"""The worker's process: what a task forks is not it."""


def main(
    channel: Channel,
    life: FdHandle,
    initializer: Callable[[], object] | None,
    max_tasks: int | None,
    fragile: bool,
) -> None:
    """Serve tasks.

    Args:
        channel: the worker's end; calls come in, results go out.
        life: an end of the pool's life line, see life.py.
        initializer: called before the first task.
        max_tasks: how many tasks to run before leaving; None for no limit.
        fragile: die of a call that cannot be decoded, as the standard executor's workers do.
    """
    global _pid
    _pid = os.getpid()
    _take_signals()
    die_with_parent(life)
    _look_after(life)
    with channel:  # the process object has it too, until the interpreter ends
        if initializer is not None:
            try:
                initializer()
            except BaseException as error:  # noqa: BLE001 -- the standard executor's behaviour
                _base.LOGGER.critical("Exception in initializer:", exc_info=True)
                _answer(channel, INITIALIZER_FAILED, [(0, error)])
                return
        try:
            parcel.send(channel, _READY_MESSAGE)
            _serve(channel, max_tasks, fragile)
        except PeerClosedError:
            pass


def _take_signals() -> None:
    """Let SIGTERM end this process, whatever the parent does with it, and tell the parent's event loop of no signal.

    A forked process has the parent's handlers and its wakeup descriptor, into which the signal's number is written for all who
    share it: the parent's loop would take the worker's signal for its own.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, (signal.SIGTERM,)
    )  # held back until now, or by the parent's thread


def _look_after(life: FdHandle) -> None:
    """Have ``multiprocessing.parent_process()`` look at the life line: the pipe that it comes with is closed in the parent."""
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(parent, "_sentinel"):
        parent._sentinel = life.fileno()


def _serve(channel: Channel, max_tasks: int | None, fragile: bool) -> None:
    cache = FunctionCache()
    done = 0
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    receive = parcel.receive_now
    queued = False  # whether calls have come faster than they were taken, so that the next one is there without a look
    while max_tasks is None or done < max_tasks:
        try:
            if not queued:
                queued = not done % LOOK_EVERY and bool(poll.poll(0))
                if not queued:
                    # Not in the receiving call: killed there, a process may take a message along that it never saw.
                    recycle.poll_idly(poll, None)
            message = receive(channel)
        except KeyboardInterrupt:
            queued = True  # it may have been taken from the kernel
            continue  # meant for the parent, which ends this process by closing the channel
        except PeerClosedError:
            raise
        except OSError as error:
            # Descriptors that do not fit, or were dropped: this process cannot be trusted with the next task either.
            _answer(channel, CANNOT_RECEIVE, [(parcel.next_tag(channel, error) >> KIND_BITS, error)])
            return
        if message is None:
            queued = False
            continue
        tag = parcel.tag_of(message)
        if tag & KIND_MASK != CALL:
            return
        number = tag >> KIND_BITS
        if type(message) is bytes:
            _perform(channel, message, number, cache, fragile)
        else:
            with warnings.catch_warnings():
                # Its descriptors end here unless the function took them over: that is no fault of the function.
                warnings.simplefilter("ignore", ResourceWarning)
                _perform(channel, message, number, cache, fragile)
        del message
        done += 1


def _perform(
    channel: Channel, message: parcel.Message, number: int, cache: FunctionCache, fragile: bool
) -> None:
    """Run one task and send what comes of it."""
    loaded = False
    try:
        call = parcel.open_message(channel, message)
        if len(call) == 3:
            function, args, kwargs = call
        else:
            function, args, kwargs = cache.load(call[0], call[1]), call[2], call[3]
        del call, message
        loaded = True
        value = [function(*args, **kwargs)]
        kind = RESULT
    except BaseException as error:
        if fragile and not loaded:
            raise
        value, kind = [Raised(error if loaded else typed(error, DecodeError))], ERROR
    function = args = kwargs = None
    if os.getpid() != _pid:
        os._exit(0)  # a child that the task forked, and that came back: it is not the worker
    _answer(channel, number << KIND_BITS | kind, value)


def _answer(channel: Channel, tag: int, value: list[Any]) -> None:
    """Send a result or exception, the only item of ``value``; where it cannot travel, say that instead.

    Raises:
        PeerClosedError: the parent is gone.
    """
    try:
        _send(channel, tag, value)
        return
    except PeerClosedError:
        raise
    except BaseException as failure:  # sys.exit() while a result is pickled, too
        if not value:
            raise  # it could be encoded, so it is the channel: the task has closed what was not its own
        if tag < 1 << KIND_BITS:
            value[0] = (0, RuntimeError(f"{value[0][1]!r}, which cannot travel: {failure}"))
        elif type(value[0]) is Raised:
            value[0] = _explained(value[0], failure)
        else:
            value[0] = Raised(failure)
            tag |= ERROR
    try:
        _send(channel, tag, value)
    except PeerClosedError:
        raise
    except BaseException as failure:  # noqa: BLE001 -- an exception raised by pickling that cannot be pickled itself
        _send(channel, tag, [_explained(value[0], failure)])


def _explained(value: Raised, failure: BaseException) -> Any:
    """Return an exception that can travel, for one that cannot."""
    original: BaseException = value.exc
    try:
        text = f"{type(original).__name__}: {original}"
    except BaseException:  # noqa: BLE001 -- any __str__ may raise anything
        text = type(original).__name__
    explained = Raised(
        NotSendableError(
            f"the task raised an exception that cannot travel ({failure}): {text}",
            type_name=f"{type(original).__module__}.{type(original).__qualname__}",
        )
    )
    explained.tb = value.tb
    return explained


def _send(channel: Channel, tag: int, value: list[Any]) -> None:
    """Encode and send the only item of ``value``; it is dropped once it has gone."""
    message = encode_result(value[0])
    if type(message) is bytes and channel._send_bare is not None:
        value.clear()
        parcel.send(channel, message + tag.to_bytes(8, "little"))
        return
    try:
        if isinstance(message, Outgoing):
            parcel.send_outgoing(channel, message, tag, channel)
            message.sent()
        else:
            parcel.send(channel, parcel.seal(message, tag))
    except BaseException:
        if isinstance(message, Outgoing):
            message.failed()
        raise
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the parent has its descriptors now
        value.clear()
        del message
