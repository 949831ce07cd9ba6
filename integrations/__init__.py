"""One flat module for each neighbour of fdshare; imported as ``fdshare.integrations``, never as ``integrations``.

Each module imports its library only when it is used, and uses only fdshare's public names.
It is loaded when it is first named, so that ``import fdshare`` is enough for all of them.
"""

from typing import Any

_MODULES = ("anyio", "asyncio_server", "gunicorn", "multiprocessing", "torch", "uvicorn")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'fdshare.integrations' has no attribute {name!r}")
    from importlib import import_module

    return import_module(f"{__name__}.{name}")
