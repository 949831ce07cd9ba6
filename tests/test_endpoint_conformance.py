"""The conformance suite over the two ends of named connections, each of which starts with a hello that is still expected."""

from __future__ import annotations

import tempfile
from typing import ClassVar

import pytest

from fdshare import Channel, Listener, connect
from fdshare.testing import ChannelConformance


class NamedChannels(ChannelConformance):
    transport: ClassVar[str]
    client_first: ClassVar[bool] = True

    def make_pair(self) -> tuple[Channel, Channel]:
        with (
            tempfile.TemporaryDirectory(dir="/tmp") as directory,
            Listener(f"{directory}/sock", transport=self.transport) as listener,
        ):
            client = connect(listener.address, transport=self.transport)
            server = listener.accept()
        return (client, server) if self.client_first else (server, client)


@pytest.mark.soak
class TestSeqpacketClient(NamedChannels):
    transport = "seqpacket"


@pytest.mark.soak
class TestSeqpacketServer(NamedChannels):
    transport = "seqpacket"
    client_first = False


@pytest.mark.soak
class TestStreamClient(NamedChannels):
    transport = "stream"


@pytest.mark.soak
class TestStreamServer(NamedChannels):
    transport = "stream"
    client_first = False
