"""Files, pipes, sockets and memory travel between processes inside structured messages."""

from __future__ import annotations

from fdshare.channel import Channel, ChannelSet, Pipe, wait
from fdshare.errors import (
    AccessDeniedError,
    ClosedError,
    DecodeError,
    DescriptorsLostError,
    FdLimitError,
    FdShareError,
    HandoffExpiredError,
    MessageTooLargeError,
    NoSpaceError,
    NotSendableError,
    PeerClosedError,
    ProtocolError,
    TaskTimeoutError,
)
from fdshare.handle import FdHandle, move
from fdshare.reducers import register
from fdshare.transport import PeerCredentials, recv_fds, send_fds

__version__ = "0.1.0"

__all__ = [
    "AccessDeniedError",
    "Channel",
    "ChannelSet",
    "ClosedError",
    "DecodeError",
    "DescriptorsLostError",
    "FdHandle",
    "FdLimitError",
    "FdShareError",
    "HandoffExpiredError",
    "MessageTooLargeError",
    "NoSpaceError",
    "NotSendableError",
    "PeerClosedError",
    "PeerCredentials",
    "Pipe",
    "ProtocolError",
    "TaskTimeoutError",
    "move",
    "recv_fds",
    "register",
    "send_fds",
    "wait",
]
