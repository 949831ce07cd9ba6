"""What is defined in the main module: of packages, directories, zipapps, scripts and stdin, in pools and over channels."""

from __future__ import annotations

import os
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest
from helpers import METHODS

ROOT = Path(__file__).parent.parent
TIMEOUT = 60.0

MAIN = """
import multiprocessing as mp, sys, threading
import fdshare
from {package}receiver import receive

lock = threading.Lock()  # cannot travel

def double(x):
    return 2 * helper(x)

def helper(x):
    return x

class Pair:
    def __init__(self, one, other):
        self.sum = one + other

class Sub(Pair):
    def __init__(self, one):
        super().__init__(one, one)

def make(one):
    return Sub(one)

def is_mine(obj):
    return type(obj) is Pair and isinstance(obj, Pair)

def guarded(x):
    with lock:
        return x

def in_pool(method):
    context = mp.get_context(method)
    with fdshare.ProcessPoolExecutor(1, context) as pool:
        assert pool.submit(double, 21).result(30) == 42
        assert pool.submit(double, 22).result(30) == 44
        assert list(pool.map(double, [1, 2], chunksize=2)) == [2, 4]
        assert pool.submit(lambda x: double(x), 3).result(30) == 6
        assert type(pool.submit(make, 21).result(30)) is Sub
        assert pool.submit(is_mine, Pair(1, 2)).result(30)
        if method == "fork":  # by name
            assert pool.submit(guarded, 21).result(30) == 21

def over_channel(method):
    here, there = fdshare.Pipe()
    process = mp.get_context(method).Process(target=receive, args=(there,))
    process.start()
    there.close()
    here.send((double, 21))
    assert here.recv(timeout=30) == 42
    here.send((is_mine, Pair(1, 2)))
    assert here.recv(timeout=30) is True
    here.send((make, 3))
    assert type(here.recv(timeout=30)) is Sub
    if method == "fork":
        here.send((guarded, 3))
        assert here.recv(timeout=30) == 3
    here.send(None)
    process.join(30)
    assert process.exitcode == 0
    here.close()

if __name__ == "__main__":
    in_pool(sys.argv[1])
    over_channel(sys.argv[1])
    print("done")
"""

RECEIVER = """
def receive(channel):
    with channel:
        while message := channel.recv(timeout=30):
            channel.send(message[0](message[1]))
"""


def run(*arguments: str, folder: Path, script: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        input=script,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["package", "directory", "zipapp", "module", "script"])
def test_functions_and_classes_of_the_main_module(kind: str, method: str, tmp_path: Path) -> None:
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "receiver.py").write_text(RECEIVER)
    package = "program." if kind in ("package", "module") else ""
    name = {"module": "tool.py", "script": "tool.py"}.get(kind, "__main__.py")
    (folder / name).write_text(MAIN.format(package=package))
    if package:
        (folder / "__init__.py").write_text("")
    if kind == "zipapp":
        zipapp.create_archive(folder, tmp_path / "program.pyz")
    arguments = {
        "package": ["-m", "program"],
        "directory": ["program"],
        "zipapp": ["program.pyz"],
        "module": ["-m", "program.tool"],
        "script": ["program/tool.py"],
    }[kind]
    done = run(*arguments, method, folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
