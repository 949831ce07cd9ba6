"""A pre-forked HTTP server: the master accepts connections and passes each one to a worker.

Shows: an accepted connection travels like any other object, so the master decides who serves it (here: each in turn; it could
be by load, by client, by path).  ``move`` closes the master's copy once the worker has it on the way: only the worker holds the
connection, and its close is the client's end of file.

Run::

    python examples/prefork_server.py --workers 3 --requests 12       # answers 12 requests of its own, and stops
    python examples/prefork_server.py --port 8000 --requests 0        # serves until interrupted

Exits with 1 where an answer is wrong or a worker served nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import signal
import socket
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from typing import Any

from fdshare import Channel, Pipe, move

PATIENCE = 10.0  # seconds that a client may be silent, so that it cannot hold its worker for ever


class Handler(BaseHTTPRequestHandler):
    timeout = PATIENCE

    def do_GET(self) -> None:
        body = f"{os.getpid()} {self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing for each request."""


def worker(channel: Channel) -> None:
    """A worker: serve each connection that arrives; at the end report how many."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the master says when it is over
    served = 0
    no_server: Any = None  # the handler asks nothing of it
    for message in channel:
        if message is None:
            break
        connection, address = message
        with connection, contextlib.suppress(OSError):  # a client that went away is no reason to end
            Handler(connection, address, no_server)
            served += 1
    channel.send(served)


def dispatch(listener: socket.socket, channels: list[Channel], requests: int) -> None:
    """The master: accept so many connections (0: for ever), and give each one away, to the workers in turn."""
    for turn in range(requests) if requests else itertools.count():
        connection, address = listener.accept()
        channels[turn % len(channels)].send(move((connection, address)))


def ask(url: str) -> str:
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return str(answer.read().decode())


def main() -> int:
    parser = argparse.ArgumentParser(description="an HTTP server whose master passes connections to workers")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free one")
    parser.add_argument(
        "--requests", type=int, default=12, help="make so many, then stop; 0: serve until interrupted"
    )
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    channels, processes = [], []
    for _ in range(options.workers):
        ours, theirs = Pipe()
        process = context.Process(target=worker, args=(theirs,))
        process.start()
        theirs.close()
        channels.append(ours)
        processes.append(process)

    answers: list[str] = []
    with socket.create_server(("127.0.0.1", options.port), backlog=128) as listener:
        url = "http://{}:{}".format(*listener.getsockname())
        print(f"master {os.getpid()} accepts on {url}", flush=True)
        if options.requests:
            with ThreadPoolExecutor(4) as clients:
                futures = [clients.submit(ask, f"{url}/{number}") for number in range(options.requests)]
                dispatch(listener, channels, options.requests)
                answers = [future.result() for future in futures]
        else:
            try:
                dispatch(listener, channels, 0)
            except KeyboardInterrupt:
                print()

    served = {}
    for channel, process in zip(channels, processes, strict=True):
        with channel:
            channel.send(None)
            served[process.pid] = channel.recv()
        process.join()
    for pid, count in served.items():
        print(f"worker {pid} served {count} requests")

    seen = Counter(int(answer.split()[0]) for answer in answers)
    right = [answer.split()[1] for answer in answers] == [f"/{number}" for number in range(options.requests)]
    if options.requests and (not right or seen != Counter(served) or 0 in served.values()):
        print(f"prefork_server: clients were answered by {dict(seen)}", file=sys.stderr)
        return 1
    return 1 if any(process.exitcode for process in processes) else 0


if __name__ == "__main__":
    sys.exit(main())
