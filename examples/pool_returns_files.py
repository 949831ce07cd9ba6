"""A pool whose tasks return open files and sockets: the result is the thing itself, not its name.

    python examples/pool_returns_files.py

A worker writes a report into a file that has no name anywhere, and the parent reads it.  Another listens on a free
port, and the parent accepts the connection there.
"""

from __future__ import annotations

import socket
import tempfile
from typing import Any

from fdshare import ProcessPoolExecutor, move


def report(number: int) -> Any:
    """Run in a worker: return an open, unlinked file, ready to be read."""
    file = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- the parent closes it
    file.write(f"report {number}\n" * 1000)
    file.seek(0)
    return move(file)


def listen() -> Any:
    """Run in a worker: return a socket that listens."""
    return move(socket.create_server(("127.0.0.1", 0)))


def main() -> None:
    """Read what the tasks return."""
    with ProcessPoolExecutor(2) as pool:
        lines = 0
        for number, file in enumerate(pool.map(report, range(20))):
            with file:
                texts = file.readlines()
            assert set(texts) == {f"report {number}\n"}
            lines += len(texts)
        print(f"read {lines} lines from 20 files that never had a name here")
        with pool.submit(listen).result() as server, socket.create_connection(server.getsockname()) as client:
            connection, _ = server.accept()
            with connection:
                client.sendall(b"hello")
                print(f"accepted a connection on a worker's port and read {connection.recv(5)!r}")


if __name__ == "__main__":
    main()
