"""The conformance suite over asyncio and uvloop, on both transports.

What starts an interpreter for each test is for ``make soak``: that processes started afresh behave alike is shown by the suite on
plain channels, with the same code below it.
"""

from __future__ import annotations

import pytest
import uvloop
from helpers import requires_seqpacket

import fdshare
from fdshare import Channel
from fdshare.testing import AsyncEndpoint, ChannelConformance

uvloop.new_event_loop().close()  # libuv keeps a pipe as long as the process lives

CHEAP = ("same_process", "fork")
DEAR = ("forkserver", "spawn")


@requires_seqpacket
class TestAsyncioSeqpacket(ChannelConformance):
    """The suite over packets."""

    endpoint = AsyncEndpoint
    places = CHEAP

    def make_pair(self) -> tuple[Channel, Channel]:
        return fdshare.Pipe(transport="seqpacket")


class TestAsyncioStream(TestAsyncioSeqpacket):
    """The suite over frames."""

    def make_pair(self) -> tuple[Channel, Channel]:
        return fdshare.Pipe(transport="stream")


class UvloopEndpoint(AsyncEndpoint):
    """The adapter over uvloop."""

    @staticmethod
    def loop_factory() -> uvloop.Loop:
        return uvloop.new_event_loop()


@pytest.mark.soak
class TestUvloopSeqpacket(TestAsyncioSeqpacket):
    """The suite over packets, on uvloop, everywhere."""

    endpoint = UvloopEndpoint
    places = (*CHEAP, *DEAR)


@pytest.mark.soak
class TestAsyncioSeqpacketElsewhere(TestAsyncioSeqpacket):
    """The suite over packets, with processes that start afresh."""

    places = DEAR


@pytest.mark.soak
class TestAsyncioStreamElsewhere(TestAsyncioStream):
    """The suite over frames, with processes that start afresh."""

    places = DEAR


@pytest.mark.soak
class TestUvloopStream(TestAsyncioStream):
    """The suite over frames, on uvloop, everywhere."""

    endpoint = UvloopEndpoint
    places = (*CHEAP, *DEAR)
