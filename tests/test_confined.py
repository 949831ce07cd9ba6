"""Processes that cannot open a file any more: nothing is imported late that is needed to send, receive, wait, raise or close."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CONFINE = """
import os, sys, tempfile, traceback
import fdshare

class Late:
    def find_spec(self, name, path=None, target=None):
        if FORBIDS == "ends":
            os.write(2, f"imported late: {name}\\n".encode())
            traceback.print_stack()
            os._exit(3)
        raise (PermissionError if FORBIDS == "no_open" else ModuleNotFoundError)(f"no {name} any more")

def confine():
    if os.geteuid() == 0:
        os.chroot(os.environ["EMPTY"])
        os.chdir("/")
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
    sys.meta_path.insert(0, Late())

def raises(kind, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        str(error), repr(error)
        return error
    raise AssertionError(f"no {kind}")

class NoPickle:
    def __reduce__(self):
        raise TypeError("not this one")

class Bad:
    def __reduce__(self):
        return (int, ("no number",))
"""

CHANNEL = """
pairs = [fdshare.Pipe(transport=kind) for kind in ("seqpacket", "stream")]
quiet = fdshare.ChannelSet([pairs[0][1]])
file = open(os.devnull, "rb")
text = open(os.devnull, encoding="latin-1")
confine()
for ours, theirs in pairs:
    for message in ("small", b"x" * 100_000, bytes(200_000), bytearray(3 << 20), [1, {"two": (3.0, None)}]):
        ours.send(message)
        assert fdshare.wait([theirs], 10) == [theirs]
        assert theirs.recv(timeout=10) == message
    ours.send({"file": file, "text": text, "handle": fdshare.FdHandle.dup(file)})
    for thing in theirs.recv(timeout=10).values():
        thing.close()
    ours.send(fdshare.Pipe())
    for end in theirs.recv():
        end.close()
    ours.send([fdshare.FdHandle.dup(file) for _ in range(300)])
    assert len(theirs.recv(timeout=10)) == 300
    ours.send(Bad())
    raises(fdshare.DecodeError, theirs.recv, timeout=10)
    assert "message['a'][1]" in str(raises(fdshare.NotSendableError, ours.send, {"a": [0, NoPickle()]}))
    raises(fdshare.NotSendableError, ours.send, __import__("threading").Lock())
    raises(TimeoutError, theirs.recv, timeout=0.01)
    assert not theirs.poll(0.01)
    ours.send_bytes(b"too much")
    error = raises(Exception, theirs.recv_bytes_into, bytearray(2))
    assert type(error).__name__ == "BufferTooShort", error
    ours.send(lambda: 7)
    assert theirs.recv(timeout=10)() == 7
    reader, writer = os.pipe()
    ours.send(fdshare.move(fdshare.FdHandle(reader)))
    theirs.recv(timeout=10).close()
    os.close(writer)
assert quiet.select(0.01) == []
for ours, theirs in pairs:
    theirs.close()
    raises(fdshare.PeerClosedError, ours.send, 1)
    raises(fdshare.PeerClosedError, ours.recv)
    ours.close()
    raises(fdshare.ClosedError, ours.recv)
"""

TYPED = """
import attrs
from typing import Annotated, BinaryIO
from fdshare import TypedCodec, FdHandle, Descriptor

@attrs.frozen
class Message:
    text: str
    blob: bytes = b""
    file: BinaryIO | None = None
    numbers: dict[int, str] = attrs.field(factory=dict)

codec = TypedCodec(Message)
pairs = [fdshare.Pipe(transport=kind, codec=codec) for kind in ("seqpacket", "stream")]
file = open("/etc/passwd", "rb")
confine()
for ours, theirs in pairs:
    for message in (Message("small"), Message("large", bytes(3 << 20)), Message("some", numbers={1: "a"})):
        ours.send(message)
        assert theirs.recv(timeout=10) == message
    ours.send(Message("file", file=file))
    theirs.recv(timeout=10).file.close()
    raises(fdshare.NotSendableError, ours.send, Message(1))
    raises(fdshare.NotSendableError, ours.send, NoPickle())
    raises(TimeoutError, theirs.recv, timeout=0.01)
    ours._transport.sock.send(b"garbage and more of it, so that it is a whole header, too, and then some more")
    raises(fdshare.FdShareError, theirs.recv, timeout=10)
    ours.close(), theirs.close()
"""

QUEUE = """
queue, lock, event, semaphore = fdshare.Queue(), fdshare.Lock(), fdshare.Event(), fdshare.Semaphore(1)
here, there = fdshare.Pipe()
file = open(os.devnull, "rb")
confine()
for item in ("small", bytes(200_000), bytearray(3 << 20)):
    queue.put(item)
    assert queue.get(timeout=10) == item
queue.put(file)
queue.get(timeout=10).close()
raises(fdshare.NotSendableError, queue.put, NoPickle())
queue.put(Bad())
raises(fdshare.DecodeError, queue.get, timeout=10)
raises(fdshare.QueueEmptyError, queue.get, timeout=0.01)
here.send([queue, lock, event, semaphore])
queue_2, lock_2, event_2, semaphore_2 = there.recv(timeout=10)
queue.put(1)
assert fdshare.wait([queue_2], 10) and queue_2.get(timeout=10) == 1
with lock_2:
    assert not lock.acquire(timeout=0.01)
event_2.set()
assert event.wait(10)
with semaphore_2:
    assert not semaphore.acquire(timeout=0.01)
queue.close()
raises(fdshare.QueueClosedError, queue.get)
for one in (queue_2, lock, lock_2, event, event_2, semaphore, semaphore_2, here, there):
    one.close()
queue.drop(), queue_2.drop()
"""

NAMED = """
path = os.path.join(os.environ["EMPTY"], "socket")
refused = []
def policy(peer):
    if refused:
        raise ValueError("not you")
    return True
listener = fdshare.Listener(path, allow=policy)
others = fdshare.Listener(path + "-2", allow=fdshare.groups(12345))
clients = [fdshare.connect(one, allow=fdshare.any_user) for one in (path, path, path + "-2")]
confine()
with listener.accept(10) as channel:
    for message in ("small", bytes(3 << 20)):
        clients[0].send(message)
        assert channel.recv(timeout=10) == message
    raises(TimeoutError, channel.recv, timeout=0.01)
refused.append(1)
raises(TimeoutError, listener.accept, 0.05)
raises(fdshare.AccessDeniedError, clients[1].recv, timeout=10)
raises(TimeoutError, others.accept, 0.05)
raises(fdshare.AccessDeniedError, clients[2].recv, timeout=10)
raises(OSError, fdshare.connect, "/nobody", timeout=0.1)
for one in (listener, others, *clients):
    one.close()
"""

ASYNCIO = """
import asyncio
from fdshare import aio
path = os.path.join(os.environ["EMPTY"], "socket")

async def main():
    pairs = [aio.Pipe(transport=kind) for kind in ("seqpacket", "stream")]
    listener = aio.Listener(path, allow=fdshare.any_user)
    client = await aio.connect(path, allow=fdshare.any_user)
    file = open(os.devnull, "rb")
    confine()
    channel = await listener.accept()
    for ours, theirs in [*pairs, (client, channel)]:
        for message in ("small", bytes(200_000), bytearray(9 << 20)):  # the last by a thread
            receiving = asyncio.create_task(theirs.recv())
            await ours.send(message)
            assert await receiving == message
        await ours.send(file)
        (await theirs.recv()).close()
        await failing(fdshare.NotSendableError, ours.send(NoPickle()))
        await ours.send(Bad())
        await failing(fdshare.DecodeError, theirs.recv())
        await failing(TimeoutError, asyncio.wait_for(theirs.recv(), 0.01))
        ours.close()
        await failing(fdshare.PeerClosedError, theirs.recv())
        theirs.close()
    await failing(TimeoutError, asyncio.wait_for(listener.accept(), 0.01))
    listener.close()

async def failing(kind, call):
    try:
        await call
    except kind as error:
        return str(error)
    raise AssertionError(kind)

asyncio.run(main())
"""

POOL = """
import multiprocessing

def failing():
    raise LookupError("of a task")

def serve(method):
    with fdshare.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method), initializer=confine) as pool:
        for size in (10, 200_000, 3 << 20):
            assert pool.submit(bytes, size).result(20) == bytes(size)
        with open(os.devnull, "rb") as file:
            pool.submit(lambda x: x, file).result(20).close()
        assert pool.submit(lambda: lambda: 7).result(20)() == 7
        raises(LookupError, pool.submit(failing).result, 20)
        raises(fdshare.NotSendableError, pool.submit(lambda: NoPickle()).result, 20)
        raises(fdshare.FdShareError, pool.submit(len, Bad()).result, 20)
        assert list(pool.map(abs, range(-3, 0), chunksize=2)) == [3, 2, 1]
        assert pool.submit(os.getuid).result(20) == (65534 if os.geteuid() == 0 else os.geteuid())

if __name__ == "__main__":
    serve(METHOD)
"""

LATE = """
confine()
ours, theirs = fdshare.Pipe()
for message in ("small", bytes(200_000), bytearray(3 << 20)):
    ours.send(message)
    assert theirs.recv(timeout=10) == message
assert "message[1]" in str(raises(fdshare.NotSendableError, ours.send, [0, NoPickle()]))
raises(fdshare.NotSendableError, ours.send, lambda: 7)
ours.send(Bad())
raises(fdshare.DecodeError, theirs.recv, timeout=10)
ours.send_bytes(b"too much")
raises(fdshare.MessageTooLargeError, theirs.recv_bytes_into, bytearray(2))

from fdshare import preload
preload.warn("a warning with %d", 7)
ours.close(), theirs.close()
"""


def run_confined(code: str, tmp_path: Path, forbids: str) -> subprocess.CompletedProcess[str]:
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(0o777)
    return subprocess.run(
        [sys.executable, "-c", f"FORBIDS = {forbids!r}\n{CONFINE}{code}"],
        env={"EMPTY": str(empty), "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    "code",
    [CHANNEL, TYPED, QUEUE, NAMED, ASYNCIO],
    ids=["channel", "typed", "queue", "named", "asyncio"],
)
def test_nothing_is_imported_late(code: str, tmp_path: Path) -> None:
    """After a chroot and a change of user, where this runs as root; anywhere, an import ends the process."""
    result = run_confined(code, tmp_path, "ends")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_whose_initializer_confines_it(method: str, tmp_path: Path) -> None:
    result = run_confined(POOL.replace("METHOD", repr(method)), tmp_path, "ends")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("forbids", ["not_found", "no_open"])
def test_first_channel_after_the_confinement(forbids: str, tmp_path: Path) -> None:
    """What was not loaded in time is done without, or is an error of ours: also where open(2) is refused."""
    result = run_confined(LATE, tmp_path, forbids)
    assert (result.returncode, result.stderr) == (0, "fdshare: a warning with 7\n")
