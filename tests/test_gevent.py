"""gevent in place of what blocks, before or after fdshare is imported: waits leave the other greenlets free."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("gevent")

PROGRAM = """
import sys
if sys.argv[1] == "after":
    import fdshare
from gevent import monkey
monkey.patch_all(thread=sys.argv[2] == "green")
import gevent, os
import fdshare

def waits(function, *args):
    greenlet = gevent.spawn(function, *args)
    gevent.sleep(0.05)
    assert not greenlet.ready()
    return greenlet

for transport in ("seqpacket", "stream"):
    here, there = fdshare.Pipe(transport=transport)
    for receive in (there.recv, lambda: there.recv(timeout=20)):
        waiting = waits(receive)
        here.send(bytes(3_000_000))
        assert len(waiting.get(timeout=20)) == 3_000_000
    for look in (lambda: fdshare.wait([there]), lambda: there.poll(None), fdshare.ChannelSet([there]).select):
        waiting = waits(look)
        here.send([os.pipe()[0]])
        assert waiting.get(timeout=20)
        there.recv()
    def recv_closed():
        try:
            there.recv()
        except fdshare.ClosedError:
            return "closed"
    waiting = waits(recv_closed)
    there.close()
    assert waiting.get(timeout=20) == "closed"
    here.close()
name = f"\\0fdshare-{os.getpid()}"
with fdshare.Listener(name) as listener:
    waiting = waits(listener.accept)
    with fdshare.connect(name) as client:
        client.send("hello")
        with waiting.get(timeout=20) as server:
            assert server.recv() == "hello"
queue, event, lock, units = fdshare.Queue(), fdshare.Event(), fdshare.Lock(), fdshare.Semaphore(0)
waiting = waits(queue.get)
queue.put("item")
assert waiting.get(timeout=20) == "item"
waiting = waits(event.wait)
event.set()
assert waiting.get(timeout=20)
waiting = waits(units.acquire)
units.release()
assert waiting.get(timeout=20)
if sys.argv[2] == "green":  # else greenlets are no threads, and the lock is one thread's
    with lock:
        waiting = waits(lock.acquire)
    assert waiting.get(timeout=20)
with fdshare.ProcessPoolExecutor(1) as pool:
    assert pool.submit(abs, -3).result(30) == 3
    assert isinstance(pool.submit(os._exit, 3).exception(30), fdshare.WorkerDiedError)
    assert pool.submit(abs, -3).result(30) == 3
print("done")
"""


@pytest.mark.parametrize("threads", ["green", "real"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_waits_are_cooperative_whichever_comes_first(order: str, threads: str) -> None:
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM, order, threads]
    run = subprocess.run(program, capture_output=True, text=True, timeout=50, check=False)
    assert (run.stdout, run.stderr) == ("done\n", "")
