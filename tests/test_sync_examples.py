"""The example of a queue, as a real process."""

from __future__ import annotations

from pathlib import Path

from helpers import requires_pidfd

from tests.test_examples import run


@requires_pidfd
def test_work_queue(tmp_path: Path) -> None:
    for number in range(40):
        path = tmp_path / str(number % 3) / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text("x" * number)
    output, errors = run("work_queue.py", "--workers", 3, tmp_path / "0", tmp_path / "1", tmp_path / "2")
    assert "a worker ended with -9 and had taken" in output
    assert "40 files by 3 workers, 1 killed, 0 wrong or missing" in output
    assert errors == ""
