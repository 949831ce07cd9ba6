"""The examples on pools, as real processes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from tests.test_examples import run


def test_pool_http() -> None:
    output, errors = run("pool_http.py", "--requests", 20)
    assert "19 of 20 requests answered by" in output
    assert "1 worker died" in output
    assert errors == ""


def test_pool_hash_sandboxed(tmp_path: Path) -> None:
    for number in range(150):
        (tmp_path / f"{number:03}").write_bytes(b"%d" % number)
    (tmp_path / "000").chmod(0o600)
    output, errors = run("pool_hash_sandboxed.py", tmp_path)
    lines = output.splitlines()
    expected = [
        f"{hashlib.sha256(b'%d' % number).hexdigest()}  {tmp_path / f'{number:03}'}" for number in range(150)
    ]
    assert lines[:150] == expected
    assert errors == ""
    if os.geteuid() == 0:
        assert lines[150:] == [f"{tmp_path / '000'}: the worker itself could not open it"]


def test_pool_returns_files() -> None:
    output, errors = run("pool_returns_files.py")
    assert output.splitlines() == [
        "read 20000 lines from 20 files that never had a name here",
        "accepted a connection on a worker's port and read b'hello'",
    ]
    assert errors == ""
