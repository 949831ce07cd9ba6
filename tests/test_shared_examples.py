"""The examples on shared memory, as real processes."""

from __future__ import annotations

import re

import pytest

from tests.test_examples import run

pytest.importorskip("numpy")


def test_camera() -> None:
    output, errors = run("camera.py", "--frames", 60)
    accounts = re.findall(r"(\w+) saw (\d+) pictures and missed (\d+), 0 torn", output)
    assert [name for name, _, _ in accounts] == ["brightness", "motion", "recorder"]
    assert all(int(seen) + int(missed) == 60 for _, seen, missed in accounts)
    assert "each consumer was sent 1 descriptor" in output
    assert errors == ""


def test_parameter_server() -> None:
    output, errors = run("parameter_server.py", "--workers", 3, "--steps", 100)
    assert "250 steps by 3 workers, 1 killed inside the lock, 1 repair" in output
    assert "the model is [2.0, -3.0, 0.5, 1.0]" in output
    assert errors == ""
