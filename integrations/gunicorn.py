"""gunicorn, restarted without losing a request: ``run("app:app", control, host=..., port=...)``, or ``uds=...`` for a path.

A second process with the same ``control`` takes the socket over once it has imported the application, and the first one's
workers finish what they have.  gunicorn's own way, USR2, starts the new master as a child of the old one and leaves it to the
operator to end one of the two; here USR2 starts the successor, and the old master ends when that one serves.

Two things follow from gunicorn's design.  A worker cannot be stopped for a moment, so for some milliseconds both generations
accept, and the application must bear it.  And what becomes of kept connections is the worker's affair: sync keeps none; gthread
(as of gunicorn 27) answers what still comes on them with ``Connection: close``; a class that just closes them loses requests.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import threading
from typing import Any

from fdshare import FdHandle
from fdshare.handover import Handover, HandoverSocket

__all__ = ["run"]

logger = logging.getLogger("fdshare.handover")


def run(
    app: Any,
    control: str | os.PathLike[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    uds: str | None = None,
    name: str = "http",
    **settings: Any,
) -> None:
    """Serve a WSGI application until a successor does, or a signal comes; the successor is this program, started again.

    SIGUSR2 starts it with the command of this process.

    Args:
        app: the application, or where it is: ``"module:name"``.
        control: the path by which generations find each other.
        host, port: where to listen.
        uds: the path of an AF_UNIX socket in their place; its file stays the same over restarts, and has mode 0666 but for
            gunicorn's ``umask``.
        name: of the listener, as systemd's unit may call it.
        settings: gunicorn's, but for ``bind``; ``preload_app`` is always on, since an application that cannot be imported must
            not succeed one that can.

    Raises:
        ValueError: ``reuse_port`` among the settings, or ``bind``, unless it is ``unix:PATH``, which is ``uds``.
        HandoverError, TimeoutError, OSError: as Handover.
        SystemExit: at the end, as gunicorn does.
    """
    bind = settings.get("bind")
    if uds is None and isinstance(bind, str) and bind.startswith(_UNIX):  # as gunicorn's own users say it
        uds = settings.pop("bind").removeprefix(_UNIX)
    for refused in ("bind", "reuse_port"):
        if refused in settings:
            raise ValueError(f"{refused} is the handover's affair: say host and port, or uds")
    with Handover(control) as handover:
        if uds is None:
            sock = handover.listen(name, host, port)
        else:
            sock = handover.listen_unix(name, uds, mode=0o666 & ~_umask(settings))
        _application_class()(app, handover, sock, settings).run()


_UNIX = "unix:"


def _umask(settings: dict[str, Any]) -> int:
    """Return gunicorn's setting, which may be text, as its own parser reads it."""
    umask = settings.get("umask", 0)
    return int(umask, 0) if isinstance(umask, str) else int(umask)


@functools.cache
def _application_class() -> Any:
    from gunicorn.app.base import BaseApplication
    from gunicorn.arbiter import Arbiter
    from gunicorn.sock import UnixSocket
    from gunicorn.util import import_app

    class HandoverArbiter(Arbiter):  # type: ignore[misc]
        def start(self) -> None:
            if self.app.sock.family == socket.AF_UNIX:
                # gunicorn would ask the kernel for the path, which remembers where the socket was made.
                path, (number,) = self.app.sock.getsockname(), self.cfg.address
                self.LISTENERS = [UnixSocket(path, self.cfg, self.log, fd=number)]
            super().start()
            self.systemd = True  # the file of a socket is not gunicorn's to remove
            handover: Handover = self.app.handover
            handover.ready()
            os.register_at_fork(after_in_child=self.app.sock.close)  # a worker has gunicorn's own
            thread = threading.Thread(target=_end_when_retired, args=(handover, self.app.sock), daemon=True)
            thread.start()

        def reexec(self) -> None:
            try:
                pid = self.app.handover.start_successor()
            except OSError as error:
                self.log.error("cannot start a successor: %s", error)
            else:
                self.log.info("Started a successor (pid: %s)", pid)

    class HandoverApplication(BaseApplication):  # type: ignore[misc]
        def __init__(
            self, app: Any, handover: Handover, sock: HandoverSocket, settings: dict[str, Any]
        ) -> None:
            self.given = app
            self.handover = handover
            self.sock = sock
            self.settings = settings
            super().__init__()

        def load_config(self) -> None:
            for name, value in self.settings.items():
                self.cfg.set(name, value)
            # gunicorn closes the number it is given.
            self.cfg.set("bind", f"fd://{FdHandle.dup(self.sock).detach()}")
            self.cfg.set("preload_app", True)

        def load(self) -> Any:
            return import_app(self.given) if isinstance(self.given, str) else self.given

        def run(self) -> None:
            HandoverArbiter(self).run()

    return HandoverApplication


def _end_when_retired(handover: Handover, sock: HandoverSocket) -> None:
    if handover.retired.wait():
        sock.retire()
        os.kill(os.getpid(), signal.SIGTERM)
