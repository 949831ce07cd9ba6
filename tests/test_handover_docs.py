"""The programs of docs/handover.md, run as they stand but for their path and port: each is replaced by itself."""

from __future__ import annotations

import inspect
import os
import re
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest
from handovers import SOON, reserved_port
from helpers import wait_until
from test_api import annotation_faults, docstring_faults, public_members

import fdshare.handover
from fdshare.integrations import asyncio_server, gunicorn, uvicorn

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "handover.md").read_text()


def program(first_line: str, path: Path, port: int) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(first_line)]
    text: str = (
        found.replace("www-data", "nobody")
        .replace("/run/user/1000/app.control", str(path))
        .replace("8000", str(port))
    )
    assert str(path) in text
    assert str(port) in text
    return text


def answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), SOON) as sock:
            sock.sendall(b"hello\n")
            return sock.makefile("rb").read() == b"HELLO\n"
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize("first_line", ["# A server.", "# An asyncio server."])
def test_a_server_is_replaced_by_itself(tmp_path: Path, first_line: str) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(reserved_port())
        code = program(first_line, tmp_path / "control", port)

        def start() -> subprocess.Popen[bytes]:
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT))
            stack.callback(process.kill)
            return process

        first = start()
        wait_until(lambda: answers(port))
        start()
        assert first.wait(SOON) == 0
        assert answers(port)


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed: run as root")
def test_a_server_that_drops_its_privileges_is_replaced_by_itself(tmp_path: Path) -> None:
    with ExitStack() as stack:
        port = stack.enter_context(reserved_port())
        code = program("# A server that drops", tmp_path / "control", port)
        generations = []
        for _ in range(3):
            process = stack.enter_context(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT))
            stack.callback(process.kill)
            generations.append(process)
            wait_until(lambda: answers(port))
            if len(generations) > 1:
                assert generations[-2].wait(SOON) == 0
        assert answers(port)


def test_the_page_shows_the_units_that_were_tried() -> None:
    for unit in ("service", "socket"):
        assert f"../examples/hot_restart.{unit}" in PAGE
        for line in (ROOT / "examples" / f"hot_restart.{unit}").read_text().splitlines():
            assert line.startswith(("[", "#")) or "=" in line or not line


@pytest.mark.parametrize("module", [fdshare.handover, asyncio_server, uvicorn, gunicorn])
def test_public_names_are_documented_and_typed(module: ModuleType) -> None:
    faults = []
    for name in module.__all__:
        thing = getattr(module, name)
        faults += docstring_faults(name, thing, thing.__doc__)
        if inspect.isroutine(thing):
            faults += annotation_faults(name, thing)
        elif not issubclass(thing, BaseException):
            for member, value in public_members(thing):
                function = value.fget if isinstance(value, property) else value
                faults += docstring_faults(f"{name}.{member}", value, value.__doc__)
                faults += annotation_faults(f"{name}.{member}", function)
    assert faults == []
