"""An HTTP server of ``asyncio.start_server`` that is replaced by its next generation without losing a request.

Shows: ``Handover`` and ``Service``.  Start it; then start it again, as often as you like, with the same ``--control``, or send it
SIGHUP: each new process takes the sockets over, and the one before answers what it has accepted and ends.

Run, in two terminals::

    python examples/hot_restart_asyncio.py --port 8000
    wrk -d 30 http://127.0.0.1:8000/            # or: while curl -s http://127.0.0.1:8000/; do :; done

and meanwhile, in a third one, a few times::

    python examples/hot_restart_asyncio.py --port 8000 &

``--crash`` shows that a generation that dies while it starts harms nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile

from fdshare.handover import Handover, HandoverError
from fdshare.integrations.asyncio_server import Service, linger


class Pages:
    """The application: tells who answers, and how many requests all generations have answered."""

    def __init__(self, service: Service, greeting: str) -> None:
        self.service = service
        self.greeting = greeting
        self.answered = 0

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while True:
                # While nothing comes, a service that retires gives the connection to its successor.
                read = reader.readuntil(b"\r\n\r\n")
                head = await self.service.read_or_move(read, reader, writer, "http")
                if head is None:
                    return
                lines = head.decode("latin-1").lower().split("\r\n")
                # The last answer of a generation says so, and the client connects anew.
                last = self.service.retiring or "connection: close" in lines or lines[0].endswith("http/1.0")
                self.answered += 1
                body = f"{self.greeting} from {os.getpid()}\n".encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s"
                    % (len(body), b"close" if last else b"keep-alive", body)
                )
                await writer.drain()
                if last:
                    break
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            pass  # the client has gone, or sends what is no request
        await linger(reader, writer)


async def serve(options: argparse.Namespace) -> None:
    """Be one generation."""
    with Handover(options.control, adopt=True) as handover:
        service = Service(handover)
        pages = Pages(service, options.greeting)
        sock = await service.start_server(pages.handle, "http", "127.0.0.1", options.port)
        handover.offer("answered", lambda: pages.answered)
        if options.crash:
            sys.exit("crashing, as I was told")

        def take_over(states: dict[str, int]) -> None:
            pages.answered = states.get("answered", 0)
            host, port = sock.getsockname()
            print(
                f"generation {handover.generation}: process {os.getpid()} serves http://{host}:{port}/",
                flush=True,
            )

        succeeded = await service.serve(final=["answered"], on_ready=take_over)
    how = "a successor serves" if succeeded else "it was told to end"
    print(f"process {os.getpid()} ends: {how}; it answered until request {pages.answered}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="an HTTP server that restarts without losing a request")
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free one")
    parser.add_argument(
        "--control",
        default=os.path.join(tempfile.gettempdir(), f"hot-restart-asyncio-{os.getuid()}"),
        help="path of the socket by which generations find each other",
    )
    parser.add_argument("--greeting", default="hello")
    parser.add_argument("--crash", action="store_true", help="end before being ready")
    options = parser.parse_args()
    try:
        asyncio.run(serve(options))
    except (HandoverError, TimeoutError) as error:
        print(f"hot_restart_asyncio: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
