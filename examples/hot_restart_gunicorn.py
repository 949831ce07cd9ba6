"""A WSGI application under gunicorn that is replaced by its next generation without losing a request.

Shows: ``fdshare.integrations.gunicorn.run``.  Start it; then start it again with the same ``--control``, or send the master
SIGUSR2: the new one takes the socket over once the application is imported, and the old one's workers finish what they have.

Run, in two terminals (after ``pip install gunicorn``)::

    python examples/hot_restart_gunicorn.py --port 8000
    wrk -d 30 http://127.0.0.1:8000/

and meanwhile, in a third one, a few times::

    python examples/hot_restart_gunicorn.py --port 8000 &

``--crash`` shows that an application that cannot be imported harms nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from fdshare.handover import HandoverError
from fdshare.integrations import gunicorn


class Application:
    """Tells who answers."""

    def __init__(self, greeting: str) -> None:
        self.greeting = greeting

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        body = f"{self.greeting} from {os.getpid()}\n".encode()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [body]


def main() -> int:
    parser = argparse.ArgumentParser(description="a WSGI server that restarts without losing a request")
    parser.add_argument("--port", type=int, default=0, help="0 (default): any free one")
    parser.add_argument("--uds", help="the path of a socket in place of a port")
    parser.add_argument(
        "--control",
        default=os.path.join(tempfile.gettempdir(), f"hot-restart-gunicorn-{os.getuid()}"),
        help="path of the socket by which generations find each other",
    )
    parser.add_argument("--greeting", default="hello")
    parser.add_argument("--worker-class", default="gthread", help="gunicorn's: gthread (default) or sync")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--crash", action="store_true", help="be an application that cannot be imported")
    options = parser.parse_args()
    try:
        gunicorn.run(
            "as_I_was_told:to_crash" if options.crash else Application(options.greeting),
            options.control,
            port=options.port,
            uds=options.uds,
            workers=options.workers,
            threads=4,
            worker_class=options.worker_class,
        )
    except (HandoverError, TimeoutError) as error:
        print(f"hot_restart_gunicorn: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
