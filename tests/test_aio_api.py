"""The public names of fdshare.aio and of the anyio integration: exported, documented, typed, and loaded only when used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import ModuleType

import pytest
from test_api import annotation_faults, docstring_faults, public_members, strays

import fdshare
from fdshare import aio
from fdshare.integrations import anyio as anyio_integration

PROMISED = ("AsyncChannel", "Listener", "Pipe", "connect", "serve")


def test_promised_names() -> None:
    assert set(PROMISED) <= set(aio.__all__)
    for method in ("send", "recv", "aclose", "__aiter__", "__anext__", "to_sync"):
        assert hasattr(aio.AsyncChannel, method)
    assert [*inspect.signature(aio.serve).parameters][:2] == ["handler", "address"]


def test_it_is_reached_from_fdshare_and_loaded_then() -> None:
    code = (
        "import sys, fdshare\n"
        "assert 'asyncio' not in sys.modules\n"
        "fdshare.aio.Pipe\n"
        "assert not {'anyio', 'trio', 'uvloop'} & set(sys.modules)\n"
        "import fdshare.integrations.anyio\n"
        "assert not {'anyio', 'trio', 'uvloop'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert fdshare.aio is aio


def test_nothing_else_shows() -> None:
    assert set(strays("fdshare.aio")) <= {"annotations"}


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in (aio, anyio_integration) for name in module.__all__],
    ids=lambda part: part if isinstance(part, str) else part.__name__,
)
def test_name_is_documented_and_typed(module: ModuleType, name: str) -> None:
    thing = getattr(module, name)
    faults = docstring_faults(name, thing, thing.__doc__)
    if inspect.isclass(thing):
        for member, value in public_members(thing):
            full = f"{name}.{member}"
            faults += docstring_faults(full, value, value.__doc__)
            faults += annotation_faults(full, value.fget if isinstance(value, property) else value)
    else:
        faults += annotation_faults(name, thing)
    assert faults == []
