"""``Queue``: many producers, many consumers, any objects with their descriptors, on one pair of SEQPACKET sockets.

Every process that has the queue has both ends of the same pair.  A put is one packet into the one end, a get one packet
out of the other; the kernel keeps packets whole and gives each to one reader.  So no thread feeds it, no lock guards
it, an item is the kernel's as soon as ``put`` returns, and the death of anybody leaves nothing behind.

=============== ==============================================================================================
what            how
=============== ==============================================================================================
a small item    a bare pickle
any other       a header (see wire.py), no notice ahead of it, its pickle, and padding behind
full            the kernel's: the socket has as many unread bytes as its buffer takes
a large item    weighs in the socket what it weighs in memory, to scale: the padding sees to that, and so the
                bound on bytes holds for all producers together, with no accounts that could get out of step
closed          shutdown(2), which is the pair's and not a process's: every reader finds the end behind the last item,
                every writer fails, and whoever waits is woken
an interrupt    what a get had taken waits in ``_left`` for the next get of this process
=============== ==============================================================================================

Without SEQPACKET (elsewhere than on Linux) it is a pair of DGRAM sockets, which know no end: there an :class:`Event` says closed.
"""

from __future__ import annotations

import errno
import os
import pickle
import socket
import stat
import time
import weakref
from collections import deque
from collections.abc import Iterator
from itertools import starmap
from typing import TYPE_CHECKING, Any

from fdshare import native, packets, recycle, reducers, rights, wire
from fdshare.blocking import python_threads
from fdshare.codec import Outgoing, PickleCodec, decode_bare, raise_undecodable
from fdshare.ends import Inlet, Outlet, make_pair, time_limit
from fdshare.errors import ClosedError, PeerClosedError, QueueClosedError, QueueEmptyError, QueueFullError
from fdshare.handle import Outside, to_socket
from fdshare.handlers import is_from_handler
from fdshare.inflight import DEFAULT_MAX_INFLIGHT
from fdshare.rights import Arrived
from fdshare.sync import Event

if TYPE_CHECKING:
    from selectors import BaseSelector
    from types import TracebackType

__all__ = ["DEFAULT_MAXBYTES", "Queue"]

DEFAULT_MAXBYTES = DEFAULT_MAX_INFLIGHT
"""Bytes that a queue takes unless told otherwise: as much as a channel has in flight."""

_ONCE = ((),)
_PICKLE_MARK = wire.PICKLE_MARK
_CODEC = PickleCodec()
_encode = _CODEC.encode
_loads = pickle.loads
_SEND_NOW = rights.SEND_NOW
_kept = recycle.kept  # while there are some, a wait must not be endless; see recycle.idly


class Queue:
    """Items from any number of producers to any number of consumers, in any threads of any processes that have the queue.

    It travels in messages, as an argument of ``multiprocessing.Process`` and in any pickle.  Items come out in the order in
    which they went in, each once.  An item is safe when ``put`` has returned, whatever becomes of the producer; it is gone
    with a consumer that dies after taking it.  Iterating yields items until the queue is closed.

    :meth:`close` ends the queue for everybody.  Dropping the object only lets go of this process's two descriptors, as
    :meth:`drop` does, and the others go on.  A ``with`` block does both at its end.

    Args:
        maxbytes: a put waits while so many bytes are queued; None is DEFAULT_MAXBYTES.  Items up to 64 KiB lie in the
            socket, which takes less: 208 KiB unless the system is told otherwise, and each item counts for its size and some
            700 bytes.  A queue with room takes an item of any size.

    Raises:
        ValueError: ``maxbytes`` is below 1.
        OSError: no descriptors left.
    """

    def __init__(self, maxbytes: int | None = None) -> None:
        maxbytes = DEFAULT_MAXBYTES if maxbytes is None else maxbytes
        if maxbytes < 1:
            raise ValueError(f"maxbytes is {maxbytes}: one at least")
        self._adopt(*make_pair(maxbytes), maxbytes)

    def _adopt(self, outlet: socket.socket, inlet: socket.socket, over: Event | None, maxbytes: int) -> None:
        self._left: deque[Any] = deque()  # results of recvmsg that interrupts have left
        self._over = over
        self._selector: BaseSelector | None = None  # where it takes two descriptors to wait
        self._closed = False  # for putting
        self._ended = False  # for getting: nothing is left
        self._lent = False  # whether a selector may know the descriptor, which is to tell it of the end
        self._inside: list[None] = []  # one for each thread in a get that others might close it under
        self._maxbytes = maxbytes
        self._outlet = Outlet(outlet)
        self._inlet = Inlet(inlet, maxbytes, over)
        # The fast paths; where the end is told by an event, each call looks at that first.
        self._send = inlet.send if over is None else None
        self._arrivals = self._outlet.arrivals if over is None and not native.is_patched() else None
        _queues.add(self)

    # --- putting --------------------------------------------------------------------------------------------------------

    def put(self, obj: Any, block: bool | float | None = True, timeout: float | None = None) -> None:
        """Put one object in, with every descriptor in it; it is the kernel's when this returns.

        Descriptors are duplicated to whoever gets it; inside ``fdshare.move`` they are given away.

        Args:
            obj: what a channel sends.
            block: False does not wait.  A number that stands alone in this place is the timeout.
            timeout: seconds to wait for room; None waits for ever, 0 not at all.

        Raises:
            QueueClosedError: somebody closed the queue, perhaps while this waited.
            NotSendableError: something in it cannot travel.
            QueueFullError: the queue stayed full; nothing was put.  A TimeoutError and a ``queue.Full``.
            FdLimitError, NoSpaceError, MessageTooLargeError, AccessDeniedError: nothing was put.
        """
        message = _encode(obj)
        if type(message) is bytes and self._send is not None:
            try:
                self._send(message, _SEND_NOW)
                return
            except OSError as error:
                if is_from_handler(error):  # the item may be in
                    raise
                # full, or closed: the slow path tells
        self._put_slowly(message, time_limit(block, timeout))

    def put_nowait(self, obj: Any) -> None:
        """Do ``put(obj, False)``; raises as that."""
        self.put(obj, False)

    def _put_slowly(self, message: bytes | Outgoing, timeout: float | None) -> None:
        out = message if isinstance(message, Outgoing) else Outgoing([message])
        try:
            if self._closed or (self._over is not None and self._over.is_set()):
                raise QueueClosedError
            deadline = None if timeout is None else time.monotonic() + timeout
            try:
                self._put_outgoing(out, deadline, wire.ALWAYS_INLINE)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
                self._put_outgoing(out, deadline, 0)  # a small send buffer: all of it into a segment
        except QueueClosedError:
            out.failed()
            raise
        except (PeerClosedError, ClosedError) as error:
            out.failed()
            self._end_putting()
            raise QueueClosedError from error
        except TimeoutError as error:
            out.failed()
            if is_from_handler(error):
                raise
            raise QueueFullError(*error.args) from error
        except BaseException:
            out.failed()
            raise
        out.sent()

    def _put_outgoing(self, out: Outgoing, deadline: float | None, inline: int) -> None:
        inlet = self._inlet
        header, payload, parts = plan = packets.plan(out, wire.MESSAGE, inline, 0)
        if parts is not None:
            inlet.wait_for_room(deadline)
            header, segment = plan.write_segment(None)
            with segment:
                fds = [*out.fds, segment.fileno()]
                self._put_packet(header, [*payload, inlet.padding(header)], fds, deadline)
        elif out.fds:
            self._put_packet(header, payload, out.fds, deadline)
        else:
            inlet.put_packet(payload, (), deadline)

    def _put_packet(
        self, header: wire.Header, payload: list[Any], fds: list[int], deadline: float | None
    ) -> None:
        if len(fds) <= wire.MAX_FDS_PER_PACKET:
            self._inlet.put_packet([wire.pack(*header), *payload], fds, deadline)
            return
        header = header._replace(flags=header.flags | wire.BUNDLE)
        with self._inlet.bundle(fds, deadline) as bundle:
            self._inlet.put_packet([wire.pack(*header), *payload], [bundle.fileno()], deadline)

    # --- getting ----------------------------------------------------------------------------------------------------------

    def get(self, block: bool | float | None = True, timeout: float | None = None) -> Any:
        """Take the next object.

        Args:
            block: False does not wait.  A number that stands alone in this place is the timeout.
            timeout: seconds to wait for one; None waits for ever, 0 not at all.

        Raises:
            QueueClosedError: somebody closed the queue, and everything in it was taken.
            QueueEmptyError: none came.  A TimeoutError and a ``queue.Empty``.
            DecodeError: the item cannot be rebuilt; its descriptors are closed, and the next one can be taken.
            DescriptorsLostError: there was no room for the item's descriptors here; it is gone, and the queue goes on.
            ProtocolError: somebody who is not a queue wrote into the socket; that packet is gone.
        """
        if (
            block is True
            and timeout is None
            and self._arrivals is not None
            and not self._left
            and not (python_threads() or _kept)
        ):
            data = None
            try:
                for data, ancillary, flags, address in self._arrivals:  # noqa: B007
                    break
                if not ancillary and data and data[0] == _PICKLE_MARK:
                    return _loads(data)
                self._left += ((data, ancillary, flags, address),)
            except Exception as error:  # noqa: BLE001 -- raised again
                if data is not None or is_from_handler(error):
                    raise_undecodable(error)
                # the descriptor is closed: the slow path tells
            except BaseException:
                if data is not None:
                    self._left += ((data, ancillary, flags, address),)
                raise
        return self._get_slowly(time_limit(block, timeout))

    def get_nowait(self) -> Any:
        """Take the next object if there is one, as ``get(False)``; raises as :meth:`get`."""
        return self.get(False)

    def _get_slowly(self, timeout: float | None) -> Any:
        deadline = None if timeout is None else time.monotonic() + timeout
        arrived: Any = None
        inside = self._inside
        try:
            # Not before the try: CPython 3.11 looks for the handler of an interrupt that strikes on a loop's way back at the
            # instruction ahead of the loop.
            inside += (None,)
            while arrived is None:
                try:  # step by step, with no call between the taking and the storing
                    for arrived in starmap(self._left.popleft, _ONCE):  # noqa: B007
                        break
                    continue
                except IndexError:
                    pass
                if self._ended:
                    raise QueueClosedError
                over = self._over is not None and self._over.is_set()
                # In the read itself, as there the kernel wakes one for each item.
                blocks = deadline is None and self._over is None and not (_kept or native.is_patched())
                try:
                    for arrived in self._outlet.arrivals if blocks else self._outlet.arrivals_now:  # noqa: B007
                        break
                except BlockingIOError:
                    if over:
                        self._note_end()
                        raise QueueClosedError from None
                    self._wait(deadline)
                except OSError as error:
                    # BSD drops descriptors that do not fit, and keeps the item, which will tell.
                    if error.errno != errno.EMSGSIZE:
                        raise
            data, ancillary, _, _ = arrived
            if not ancillary:
                if not data:
                    self._note_end()
                    raise QueueClosedError
                if data[0] == _PICKLE_MARK:
                    return decode_bare(data)
            if type(arrived) is tuple:
                for arrived in map(Arrived, (arrived,)):  # noqa: B007, B020
                    break
            return _CODEC.decode(self._outlet.open_item(arrived))
        except Exception:
            raise
        except BaseException:
            if type(arrived) in (tuple, Arrived):  # still whole, and nobody's
                self._left.appendleft(arrived)
            raise
        finally:
            del inside[-1:]  # not by a call, after which an interrupt could lose what is being returned
            if self._ended and not inside:
                self._outlet.close()

    def _wait(self, deadline: float | None) -> None:
        """Wait for an item or the end.

        Raises:
            QueueEmptyError
        """
        poll = native.make_poll()
        poll.register(self._outlet.sock.fileno(), native.IN)
        if self._over is not None:
            poll.register(self._over.fileno(), native.IN)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not recycle.poll_idly(poll, left) and left is not None:
            raise QueueEmptyError("the time is up, and the queue is empty")

    def __iter__(self) -> Iterator[Any]:
        """Yield items until the queue is closed and empty; raises as :meth:`get` does for an item that is lost."""
        while True:
            try:
                item = self.get()
            except QueueClosedError:
                return
            yield item

    def empty(self) -> bool:
        """Whether there is nothing to get at this moment; the next one may be different, raises nothing."""
        return not self._left and self._outlet.is_empty()

    def full(self) -> bool:
        """Whether a put would wait at this moment; the next one may not, raises nothing."""
        try:
            return not self._closed and self._inlet.is_full()
        except ClosedError:
            return False

    def qsize(self) -> int:
        """Return how many items are in the queue at this moment: each is looked at, and others put and take meanwhile.

        Raises:
            NotImplementedError: the system does not tell (elsewhere than on Linux).
        """
        return len(self._left) + self._outlet.count()

    # --- the end -----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the queue for everybody: what is in it can still be taken, nothing more be put.  Twice is harmless.

        Whoever waits in ``get`` or ``put``, in any process, is woken: the getters take what is left and then get
        QueueClosedError, the putters get it at once.

        Raises:
            OSError: as close(2).
        """
        if self._ended:
            return
        if self._over is not None:
            self._over.set()
        else:
            try:  # both directions, as only then a writer is woken who waits for room
                self._outlet.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # somebody else did
        if self.empty():
            self._note_end()
        else:
            self._end_putting()

    def join_thread(self) -> None:
        """Do nothing, as there is no thread: an item is the kernel's once ``put`` has returned; raises nothing."""

    cancel_join_thread = join_thread

    def drop(self) -> None:
        """Let go of this process's descriptors, where no thread may be in a call; the queue goes on for the others.

        Raises:
            OSError: as close(2).
        """
        self._end_getting()
        while self._left:
            _close_left(self._left.popleft())
        if self._selector is not None:
            self._selector.close()
        if self._over is not None:
            self._over.close()

    def _note_end(self) -> None:
        """Nothing is left and nothing will come: let go of it, unless a selector has it, of which it is yet to be taken out."""
        if self._lent:
            self._end_putting()
        else:
            self._end_getting()

    def _end_putting(self) -> None:
        self._closed, self._send = True, None
        self._inlet.close()

    def _end_getting(self) -> None:
        self._end_putting()
        self._ended, self._arrivals = True, None
        # Another thread may be about to read: its number must not come to mean another file.  The last one out closes it.
        if not self._inside:
            self._outlet.close()

    @property
    def closed(self) -> bool:
        """Whether this object knows that nothing can be put any more."""
        return self._closed

    @property
    def maxbytes(self) -> int:
        """The bound that the queue was made with."""
        return self._maxbytes

    def fileno(self) -> int:
        """Borrow the descriptor that is readable while there is an item or the end: for ``fdshare.wait``, selectors, event loops.

        Raises:
            ClosedError: this object has let go of it.
        """
        if self._ended:
            raise QueueClosedError
        self._lent = True
        if self._over is None:
            return self._outlet.sock.fileno()
        if self._selector is None:
            import selectors

            self._selector = selectors.DefaultSelector()
            self._selector.register(self._outlet.sock, selectors.EVENT_READ)
            self._selector.register(self._over, selectors.EVENT_READ)
        fd: int = self._selector.fileno()  # type: ignore[attr-defined]  # of an epoll or a kqueue, themselves readable
        return fd

    def __enter__(self) -> Queue:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()
        self.drop()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"fd={self._outlet.sock.fileno()}"
        return f"<Queue {state} maxbytes={self._maxbytes}>"

    def __del__(self) -> None:
        if hasattr(self, "_inlet"):  # unset where __init__ raised
            self.drop()

    def __reduce__(self) -> tuple[Any, ...]:
        """How any pickler but a channel's takes it: inherited while multiprocessing starts a process, else by the broker."""
        return Outside.reduce(self)


def _close_left(arrived: Any) -> None:
    (arrived if isinstance(arrived, Arrived) else Arrived(arrived)).close()


_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


def _after_fork() -> None:
    for queue in list(_queues):  # what the parent had taken is the parent's, and its threads are not here
        queue._inside.clear()
        while queue._left:
            _close_left(queue._left.popleft())


os.register_at_fork(after_in_child=_after_fork)


def reduce_queue(queue: Queue, context: reducers.Context) -> reducers.Reduced:
    if queue._closed:
        raise reducers.Refused(queue, "it is closed")
    if context.moving:
        context.consume(queue.drop)
    places = [context.lend(end.sock.fileno(), queue) for end in (queue._outlet, queue._inlet)]
    return rebuild_queue, (*places, queue._maxbytes, queue._over)


def rebuild_queue(outlet: int, inlet: int, maxbytes: int, over: Event | None) -> Queue:
    reader, writer = (
        reducers.built(to_socket(reducers.take(index, stat.S_IFSOCK))) for index in (outlet, inlet)
    )
    queue = Queue.__new__(Queue)
    queue._adopt(reader, writer, over, maxbytes)
    return queue


reducers.known[Queue] = reduce_queue
