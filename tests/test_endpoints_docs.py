"""The programs of docs/endpoints.md, run as they stand but for their paths."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import fdshare

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "endpoints.md").read_text()


def program(first_line: str, path: Path) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(first_line)]
    text: str = found.replace("/run/user/1000/thumbnails.sock", str(path))
    assert str(path) in text
    return text


def test_server_and_client(tmp_path: Path) -> None:
    path = tmp_path / "sock"
    (tmp_path / "cat.jpg").write_bytes(bytes(1234))
    with subprocess.Popen([sys.executable, "-c", program("# The server", path)]) as server:
        try:
            deadline = time.monotonic() + 20
            while not path.exists():  # it appears listening
                assert time.monotonic() < deadline
                time.sleep(0.005)
            for _ in range(2):
                client = [sys.executable, "-c", program("# The client", path)]
                done = subprocess.run(
                    client, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=True
                )
                assert done.stdout == "{'size': 1234}\n"
        finally:
            server.kill()


def test_every_name_on_the_page_is_public() -> None:
    names = re.findall(r"\bfdshare\.([a-zA-Z_]+)\b(?!\.)", PAGE)
    assert {"Listener", "connect", "listen_fds", "peer_pidfd", "recv_signed"} <= set(names)
    assert [name for name in names if name not in {*fdshare.__all__, "aio", "handover"}] == []
