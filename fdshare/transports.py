"""The two transports: SEQPACKET, where the kernel keeps packets apart, and STREAM, where frames do."""

from __future__ import annotations

import functools
import math
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import starmap
from typing import Any

from fdshare import rights, wire
from fdshare.blocking import TICK_MILLISECONDS, python_threads
from fdshare.codec import Outgoing
from fdshare.errors import DecodeError, PeerClosedError, ProtocolError
from fdshare.handle import NO_HANDLES, HandleList
from fdshare.handlers import is_from_handler
from fdshare.inflight import DEFAULT_MAX_INFLIGHT
from fdshare.noticed import BUNDLE, KINDS, Noticed, header_or_none, needed
from fdshare.rights import Arrived
from fdshare.transport import Packet, Transport

__all__ = ["SeqpacketTransport", "StreamTransport", "has_read_ahead"]

_PICKLE_MARK = bytes([wire.PICKLE_MARK])
_NOTICE_MARK = bytes([wire.NOTICE])
MAX_NOTICED = 256
"""Most notices that are read in one go: more than writers share an end."""

_UNTIL_NONCE = wire.HEADER_SIZE - 8

_NO_NONCE = bytes(8)

_CUT = rights.TRUNCATED | rights.CONTROL_TRUNCATED


@functools.lru_cache(maxsize=256)
def _few_header(descriptors: int, packet_size: int) -> bytes:
    """Return the header of a plain message, but for its nonce; the few that occur are remembered."""
    return wire.pack(wire.MESSAGE, 0, descriptors, 0, packet_size - wire.HEADER_SIZE)[:_UNTIL_NONCE]


class _Greeted(Transport):
    """What both need to know about a hello that is still expected."""

    def _has_hello(self) -> bool:
        """Whether it was taken, or taking it failed: a receive will tell."""
        try:
            return self.greeting is None or self.greeting.take(self)
        except OSError:
            if self.greeting is not None and self.greeting.failure is not None:
                try:  # what said so is off the socket, which is to be readable all the same
                    self.sock.shutdown(socket.SHUT_RD)
                except OSError:
                    pass  # it has ended
            return True

    def _has_more(self) -> bool:
        """Whether the socket has anything to read, or the end."""
        return self._peek_bytes(1) is not None or self._hides()

    def _peek_bytes(self, size: int) -> bytes | None:
        """Return the next bytes, none at the end or where a read will tell what is wrong; None where nothing has come."""
        try:
            return self.sock.recv(size, rights.NOW | rights.PEEK)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def _hides(self) -> bool:
        """Whether the socket has something to read that a peek does not show, and that would make us look for ever.

        Such are an urgent byte (MSG_OOB), which a read drops, and what lies before the offset that somebody who shares the
        socket has set (SO_PEEK_OFF).
        """
        poll = select.poll()
        poll.register(self.sock.fileno(), select.POLLIN)
        return bool(poll.poll(0)) and not self._peek_bytes(1)


class SeqpacketTransport(_Greeted):
    """One packet a message; several processes may share one end.

    A packet with descriptors comes after a notice, which puts the reader on its guard: only then does it peek.
    """

    name = "seqpacket"

    def __init__(self, sock: socket.socket, max_inflight: int = DEFAULT_MAX_INFLIGHT) -> None:
        super().__init__(sock, max_inflight)
        self._noticed = Noticed()

    def send(self, header: bytes, payload: Sequence[Any], fds: Sequence[int], deadline: float | None) -> None:
        if self.takes is not None:
            self.takes.check(header, sum(map(len, payload)))
        if fds:
            notice = wire.notice_of(header)
            try:
                self.sock.send(notice, rights.SEND_NOW)
            except OSError as error:  # full, closed, gone
                if is_from_handler(error):
                    raise
                self._send_step([notice], (), deadline)
        self._send_step([header, *payload], fds, deadline)

    def send_few(self, out: Outgoing) -> bool:
        """Send a small message with some descriptors the short way; False where it takes the long one."""
        payload, fds, count = out.payload, out.fds, len(out.fds)
        if out.buffers or len(payload) != 1 or not 0 < count <= wire.MAX_FDS_PER_PACKET:
            return False
        size = len(payload[0])
        if size > wire.ALWAYS_INLINE or not (self.takes is None or self.takes.few(count, size)):
            return False
        untaken = self.untaken
        bounded = untaken.limit != math.inf
        if bounded and not untaken.fits(count):
            return False
        header = _few_header(count, wire.HEADER_SIZE + size) + wire.nonce().to_bytes(8, "little")
        try:
            self.sock.send(wire.notice_of(header), rights.SEND_NOW)
            out.announced = (
                True  # a second notice would stay with the receiver, which looks for room for each
            )
            self.sock.sendmsg((header, payload[0]), rights.rights(fds), rights.SEND_NOW)
            if bounded:
                untaken.note(count)
        except OSError as error:  # full, closed, a bad descriptor: the long way tells
            if is_from_handler(error):
                raise
            return False
        return True

    def send_framed(self, payload: bytes) -> bool:
        """Send a small message without descriptors, with its header, the short way; False where it takes the long one."""
        size = len(payload)
        if size > wire.ALWAYS_INLINE or not (self.takes is None or self.takes.few(0, size)):
            return False
        try:
            self.sock.send(_few_header(0, wire.HEADER_SIZE + size) + _NO_NONCE + payload, rights.SEND_NOW)
        except OSError as error:  # full, closed, gone: the long way tells
            if is_from_handler(error):
                raise
            return False
        return True

    def receive_framed(self) -> tuple[memoryview, HandleList] | None:
        """Receive a small message with its header the short way, blocking; None where it takes the long one.

        Only where limits are set, which are checked here too.
        """
        limits = self.limits
        if limits is None or self.greeting is not None or self._noticed or self.arrived is not None:
            return None
        if python_threads():
            return None
        try:
            self.looks -= 1
            if self.looks >= 0 and not self.input.poll(TICK_MILLISECONDS):
                return None
            for self.arrived in self.arrivals_now:  # noqa: B020 -- see transport.py
                break
        except (OSError, RuntimeError) as error:
            if is_from_handler(error):
                raise
            self.found_nothing()
            return None
        arrived: Any = self.arrived
        data, ancillary, flags, _ = arrived
        if ancillary or flags & _CUT:
            return None
        if data[:1] == _NOTICE_MARK:
            return self.receive_few() if self._passes(wire.unpack_notice(data)) else None
        size = len(data) - wire.HEADER_SIZE
        if not 0 <= size <= limits.max_bytes or data[:_UNTIL_NONCE] != _few_header(0, len(data)):
            return None
        self.arrived = None
        return memoryview(data)[wire.HEADER_SIZE :], NO_HANDLES

    def receive_few(self) -> tuple[memoryview, HandleList] | None:
        """Receive what the notice in ``arrived`` announces the short way; None where it takes the long one.

        Only while there is no other thread.  Whatever is unusual is left as it is, for ``receive``
        to go on from there.
        """
        try:
            notice = wire.unpack_notice(self.arrived[0])
        except ProtocolError:
            return None
        if notice.flags or self._noticed:
            return None
        count = notice.descriptors
        if not rights.is_top_free(count):
            return None
        self.plain = False
        self._noticed[KINDS[count]] = 1
        self.arrived = None
        try:
            for self.arrived in map(Arrived, self.arrivals_now):  # noqa: B020 -- see transport.py
                break
        except OSError as error:
            if is_from_handler(error):
                raise
            return None
        data, _, flags, _ = arrived = self.arrived
        if len(data) < wire.HEADER_SIZE:
            return None
        if data[:_UNTIL_NONCE] != _few_header(count, len(data)) or flags & _CUT:
            return None
        if self.limits is not None and len(data) - wire.HEADER_SIZE > self.limits.max_bytes:
            return None
        handles = arrived.adopt()
        if len(handles) != count:
            return None
        self.arrived = None
        self._noticed.clear()
        self.plain = self.bare
        return memoryview(data)[wire.HEADER_SIZE :], handles

    def _receive_now(self) -> Packet | None:
        if self.greeting is not None and not self.greeting.take(self):
            return None
        for _ in range(MAX_NOTICED):
            peeked = self._peek_if_cramped() if self._noticed and self.arrived is None else None
            arrived = self._fetch(wire.PACKET_SIZE)
            if arrived is None:
                return None
            data, ancillary, _, _ = arrived
            if not ancillary:
                mark = data[:1]
                if mark == _NOTICE_MARK:
                    self._take_notice(data)
                    continue
                if mark == _PICKLE_MARK and self.bare:
                    self.arrived = None
                    if peeked is not None:
                        peeked.close()
                    return Packet(None, data, NO_HANDLES)
            header = self._unpack(arrived)
            self.arrived = None
            if (
                peeked is not None and peeked[0] != data
            ):  # another reader took that one; the nonce tells twins apart
                peeked.close()
                peeked = None
            if self._noticed and header.carried:
                self._noticed.forget(header)
                self.plain = self.bare and not self._noticed
            if self.limits is not None:
                try:
                    self.limits.check(header)
                except (OSError, DecodeError):
                    arrived.close()
                    if peeked is not None:
                        peeked.close()
                    raise
            return Packet(
                header, memoryview(data)[wire.HEADER_SIZE :], self._complete(arrived, header, peeked)
            )
        return None

    def _take_notice(self, data: bytes) -> None:
        header = wire.unpack_notice(data)
        if header.carried and self._passes(header):  # for what will be refused there need be no room
            self.plain = False
            self._noticed.add(header)
        self.arrived = None

    def _peek_if_cramped(self) -> Arrived | None:
        """See to it that the descriptors of the next packet will fit; return it peeked where that was needed.

        Raises:
            FdLimitError: they do not.
        """
        noticed = self._noticed
        if noticed.to_map is not None:
            self._prepare(noticed.to_map)
            noticed.to_map = None
        if not python_threads() and BUNDLE not in noticed and rights.is_top_free(max(noticed)):
            return None
        peeked = self._peek(wire.PACKET_SIZE)
        if peeked is not None:
            header = header_or_none(peeked[0])
            if header is not None and header.type != wire.NOTICE and self._passes(header):
                self._check_room(peeked, header)
        return peeked

    def _unpack(self, arrived: Arrived) -> wire.Header:
        """Return the checked header of a packet."""
        data, _, flags, _ = arrived
        try:
            if not data:
                raise PeerClosedError("the other side of this channel was closed")
            header = wire.unpack(data)
            if flags & rights.TRUNCATED or len(data) != wire.HEADER_SIZE + header.inline_size:
                raise ProtocolError(
                    f"a packet of {len(data)} bytes says {wire.HEADER_SIZE + header.inline_size}"
                )
            if header.type == wire.NOTICE:
                raise ProtocolError("a notice with descriptors")
        except OSError:  # not an interrupt: after one the packet is looked at again
            arrived.close()
            raise
        return header

    def has_message(self) -> bool:
        with self._reading:
            self.check_open()
            if self.greeting is not None:
                if not self._has_hello():
                    return False
                if self.greeting is not None:  # a receive will tell why it is still there
                    return True
            for _ in range(MAX_NOTICED):
                if self.arrived is not None:
                    return True
                first = self._peek_bytes(wire.HEADER_SIZE + 1)
                if first is None:
                    if not self._hides():
                        return False
                elif not self._is_good_notice(first):  # what is wrong with one, a receive will tell
                    return True
                try:
                    arrived = self._fetch(wire.PACKET_SIZE)
                except OSError:
                    self.check_open()
                    return True
                if arrived is not None and first and arrived[0] == first and not arrived[1]:
                    self._take_notice(first)
            return self.arrived is not None

    def _is_good_notice(self, data: bytes) -> bool:
        if data[:1] != _NOTICE_MARK:
            return False
        try:
            self._passes(wire.unpack_notice(data))
        except ProtocolError:
            return False
        return True


class StreamTransport(_Greeted):
    """Length-prefixed frames; one process at a time reads, and one writes, each end.

    A read never goes past the present frame, so that selectors see what is left, and no surplus descriptors come.
    """

    name = "stream"

    def __init__(self, sock: socket.socket, max_inflight: int = DEFAULT_MAX_INFLIGHT) -> None:
        super().__init__(sock, max_inflight)
        self._parser = wire.StreamParser()
        self._brought: Arrived | None = None  # what came with the descriptors of the present frame
        self._frame = bytearray()  # the frame being sent, perhaps begun by an earlier call; see _sent

    def send(self, header: bytes, payload: Sequence[Any], fds: Sequence[int], deadline: float | None) -> None:
        if self.takes is not None:
            self.takes.check(header, sum(map(len, payload)))
        with self._turn_to_write(deadline):
            self._send_until(len(self._frame), (), deadline)
            frame = wire.frame(header, list(payload))
            self._frame, self._sent = frame, 0
            try:
                if fds:  # with the first byte behind the header, which tells of them
                    self._send_until(wire.HEADER_SIZE, (), deadline)
                    self._send_until(wire.HEADER_SIZE + 1, fds, deadline)
                self._send_until(len(frame), (), deadline)
            except BaseException:
                if self._sent == 0:
                    self._frame = bytearray()
                elif self._sent < len(frame):
                    frame[-1] = 0  # given up: the receiver drops it when the rest has come
                raise

    @contextmanager
    def _turn_to_write(self, deadline: float | None) -> Iterator[None]:
        """Wait for other threads' sends, no longer than the time is; then nobody writes in between.

        Raises:
            TimeoutError
        """
        most = -1.0 if deadline is None else min(max(0.0, deadline - time.monotonic()), threading.TIMEOUT_MAX)
        taken = False
        try:
            for taken in starmap(self._writing.acquire, ((True, most),)):  # noqa: B007 -- without a gap, see rights.py
                break
            if not taken:
                raise TimeoutError("the time is up, and another thread is sending; nothing was sent")
            yield
        finally:
            if taken:
                self._writing.release()

    def _send_until(self, end: int, fds: Sequence[int], deadline: float | None) -> None:
        while self._sent < end:
            self._send_step([bytes(self._frame[self._sent : end])], fds, deadline)

    def _receive_now(self) -> Packet | None:
        if self.greeting is not None and not self.greeting.take(self):
            return None
        while True:
            header, peeked = self._parser.header, None
            expected = header is not None and header.carried and self._brought is None
            if header is not None and expected and self.arrived is None and self._passes(header):
                self._prepare(header)
                if rights.PEEK_INSTALLS:
                    peeked = self._peek(1)
                    if peeked is not None:
                        self._check_room(peeked, header)
                    elif not self._hides():
                        return None
                if peeked is None and not rights.has_room_for(needed(header)):
                    raise rights.limit_error(header.total)
            arrived = self._fetch(self._parser.wanted)
            if arrived is None:
                return None
            brought = self._brought
            if not arrived[0]:
                self.arrived, self._brought = None, None
                for part in (arrived, brought):
                    if part is not None:
                        part.close()
                raise PeerClosedError("the other side of this channel was closed")
            if expected:
                brought = arrived
                if peeked is not None and len(arrived.adopt()) < len(peeked.adopt()):
                    brought = peeked
            elif arrived[1]:
                raise ProtocolError("descriptors where the frame has none")
            after, frame = self._parser.fed(arrived[0])
            keep = brought if frame is None else None
            self._parser, self._brought, self.arrived = after, keep, None
            for other in (arrived, peeked):
                if other is not None and other is not brought:
                    other.close()
            if frame is None:
                continue
            header, payload = frame
            if payload is not None and self._passes(header):
                return Packet(header, payload, self._complete(brought, header, None))
            if brought is not None:
                brought.close()
            if payload is not None and self.limits is not None:
                self.limits.check(header)  # says why
            return None  # given up; there may be no end of these

    def has_message(self) -> bool:
        if self.greeting is None:
            return True
        with self._reading:
            self.check_open()
            return self._has_hello() and (
                self.arrived is not None or self.greeting is not None or self._has_more()
            )

    def _after_fork(self) -> None:
        self._frame, self._sent = bytearray(), 0

    def _close(self) -> None:
        rest = bytes(self._frame[self._sent :])
        if rest:
            try:  # let the peer's parser reach the end of a frame that was given up
                self.sock.send(rest, rights.SEND_NOW)
            except OSError:
                pass
        super()._close()
        if self._brought is not None:
            self._brought.close()


def has_read_ahead(transport: Transport) -> bool:
    """Whether there is something to receive that does not make the socket readable, such as a hello that failed."""
    return transport.arrived is not None or (transport.greeting is not None and transport.has_message())
