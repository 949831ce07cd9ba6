"""An HTTP server whose connections are answered by a process pool: the parent accepts, a worker answers.

    python examples/pool_http.py --requests 50 --workers 2

The accepted socket is an ordinary argument.  `move` closes the parent's copy, so the client sees the end of the
connection when the worker is done.  One request kills its worker: its client gets no answer, everybody else does, and
the worker is replaced.
"""

from __future__ import annotations

import argparse
import os
import socket
import threading
import urllib.error
import urllib.request

from fdshare import ProcessPoolExecutor, WorkerDiedError, move


def answer(connection: socket.socket) -> tuple[int, str]:
    """Run in a worker: read one request, answer it; return who did it and the path."""
    with connection, connection.makefile("rb") as request:
        path = request.readline().split()[1].decode()
        while request.readline() not in (b"\r\n", b""):
            pass
        if path == "/crash":
            os._exit(1)
        body = f"{path} answered by process {os.getpid()}\n".encode()
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body
        )
    return os.getpid(), path


def ask(port: int, number: int, answers: list[str]) -> None:
    """Be one client."""
    path = "crash" if number == 3 else f"page/{number}"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as response:
            answers.append(response.read().decode())
    except (urllib.error.URLError, ConnectionError) as error:
        answers.append(f"no answer: {error}")


def main() -> None:
    """Serve as many requests as asked for, then tell who answered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    answers: list[str] = []
    with ProcessPoolExecutor(options.workers) as pool, socket.create_server(("127.0.0.1", 0)) as server:
        pool.submit(os.getpid).result()  # the workers exist before the first connection does
        port = server.getsockname()[1]
        clients = [
            threading.Thread(target=ask, args=(port, number, answers)) for number in range(options.requests)
        ]
        for client in clients:
            client.start()
        futures = [pool.submit(answer, move(server.accept()[0])) for _ in clients]
        workers, died = set(), 0
        for future in futures:
            try:
                workers.add(future.result(30)[0])
            except WorkerDiedError:
                died += 1
        for client in clients:
            client.join()
    answered = sum("answered by process" in text for text in answers)
    print(
        f"{answered} of {options.requests} requests answered by {len(workers)} processes; {died} worker died"
    )
    raise SystemExit(0 if (answered, died) == (options.requests - 1, 1) else 1)


if __name__ == "__main__":
    main()
