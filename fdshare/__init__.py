"""Files, pipes, sockets and memory travel between processes inside structured messages."""

from typing import TYPE_CHECKING, Any

from fdshare.channel import Channel, Pipe
from fdshare.credentials import PeerCredentials, any_user, groups, peer_pidfd, same_user, users
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
    QueueClosedError,
    QueueEmptyError,
    QueueFullError,
    SealError,
    TaskTimeoutError,
)
from fdshare.handle import FdHandle, Outside, move
from fdshare.reducers import register
from fdshare.rights import recv_fds, send_fds
from fdshare.waiting import ChannelSet, wait

if TYPE_CHECKING:
    from fdshare.addresses import listen_fds
    from fdshare.datagrams import ask_credentials, recv_signed, send_signed
    from fdshare.endpoint import Listener, connect
    from fdshare.plain import BytesCodec
    from fdshare.pool.errors import WorkerDiedError
    from fdshare.pool.executor import ProcessPoolExecutor
    from fdshare.processes import ProcessHandle
    from fdshare.queues import Queue
    from fdshare.shared.arrays import share, shared_array
    from fdshare.shared.memory import SharedMemory
    from fdshare.sync import Event, Lock, Semaphore
    from fdshare.typed.codec import TypedCodec
    from fdshare.typed.fields import Descriptor

__version__ = "0.1.0"

_LAZY = {
    "BytesCodec": "fdshare.plain",
    "Descriptor": "fdshare.typed.fields",
    "Event": "fdshare.sync",
    "Listener": "fdshare.endpoint",
    "Lock": "fdshare.sync",
    "ProcessHandle": "fdshare.processes",
    "ProcessPoolExecutor": "fdshare.pool.executor",
    "Queue": "fdshare.queues",
    "Semaphore": "fdshare.sync",
    "SharedMemory": "fdshare.shared.memory",
    "TypedCodec": "fdshare.typed.codec",
    "WorkerDiedError": "fdshare.pool.errors",
    "ask_credentials": "fdshare.datagrams",
    "connect": "fdshare.endpoint",
    "listen_fds": "fdshare.addresses",
    "recv_signed": "fdshare.datagrams",
    "send_signed": "fdshare.datagrams",
    "share": "fdshare.shared.arrays",
    "shared_array": "fdshare.shared.arrays",
}


def _reduce_outside(obj: object) -> tuple[Any, ...]:
    """Load the broker when the first handle or channel is pickled outside a channel."""
    from fdshare.handoff import reduce_outside

    return reduce_outside(obj)


Outside.reduce = staticmethod(_reduce_outside)


def __getattr__(name: str) -> Any:
    """Load what takes long to import when it is first used."""
    from importlib import import_module

    if name in ("aio", "handover", "integrations", "testing"):
        return import_module(f"fdshare.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'fdshare' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


__all__ = [
    "AccessDeniedError",
    "BytesCodec",
    "Channel",
    "ChannelSet",
    "ClosedError",
    "DecodeError",
    "Descriptor",
    "DescriptorsLostError",
    "Event",
    "FdHandle",
    "FdLimitError",
    "FdShareError",
    "HandoffExpiredError",
    "Listener",
    "Lock",
    "MessageTooLargeError",
    "NoSpaceError",
    "NotSendableError",
    "PeerClosedError",
    "PeerCredentials",
    "Pipe",
    "ProcessHandle",
    "ProcessPoolExecutor",
    "ProtocolError",
    "Queue",
    "QueueClosedError",
    "QueueEmptyError",
    "QueueFullError",
    "SealError",
    "Semaphore",
    "SharedMemory",
    "TaskTimeoutError",
    "TypedCodec",
    "WorkerDiedError",
    "any_user",
    "ask_credentials",
    "connect",
    "groups",
    "listen_fds",
    "move",
    "peer_pidfd",
    "recv_fds",
    "recv_signed",
    "register",
    "same_user",
    "send_fds",
    "send_signed",
    "share",
    "shared_array",
    "users",
    "wait",
]
