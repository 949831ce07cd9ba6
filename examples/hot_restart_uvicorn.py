"""An ASGI application under uvicorn that is replaced by its next generation without losing a request.

Shows: ``fdshare.integrations.uvicorn.run`` in place of ``uvicorn.run``.  Start it; then start it again with the same
``--control``, or send it SIGHUP: the new process takes the socket over once its application has started up.

Run, in two terminals (after ``pip install uvicorn``)::

    python examples/hot_restart_uvicorn.py --port 8000
    wrk -d 30 http://127.0.0.1:8000/

and meanwhile, in a third one, a few times::

    python examples/hot_restart_uvicorn.py --port 8000 &

``--crash`` shows that an application that fails to start harms nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

from fdshare.handover import HandoverError
from fdshare.integrations import uvicorn


class Application:
    """Tells who answers."""

    def __init__(self, greeting: str, crash: bool) -> None:
        self.greeting = greeting
        self.crash = crash

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.live(receive, send)
        elif scope["type"] == "http":
            body = f"{self.greeting} from {os.getpid()}\n".encode()
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def live(self, receive: Any, send: Any) -> None:
        """Start up, which is the moment to fail; and shut down."""
        await receive()
        if self.crash:
            await send({"type": "lifespan.startup.failed", "message": "crashing, as I was told"})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


def main() -> int:
    parser = argparse.ArgumentParser(description="an ASGI server that restarts without losing a request")
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free one")
    parser.add_argument(
        "--control",
        default=os.path.join(tempfile.gettempdir(), f"hot-restart-uvicorn-{os.getuid()}"),
        help="path of the socket by which generations find each other",
    )
    parser.add_argument("--greeting", default="hello")
    parser.add_argument("--http", default="auto", help="uvicorn's parser: auto, h11 or httptools")
    parser.add_argument("--loop", default="auto", help="uvicorn's event loop: auto, asyncio or uvloop")
    parser.add_argument("--crash", action="store_true", help="fail to start up")
    options = parser.parse_args()
    try:
        uvicorn.run(
            Application(options.greeting, options.crash),
            options.control,
            port=options.port,
            http=options.http,
            loop=options.loop,
            access_log=False,
        )
    except (HandoverError, TimeoutError) as error:
        print(f"hot_restart_uvicorn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
