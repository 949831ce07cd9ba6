"""What is defined in the main module: of packages, directories, zipapps, scripts and stdin, in pools and over channels."""

from __future__ import annotations

import os
import subprocess
import sys
import zipapp
from pathlib import Path

import attr
import cloudpickle
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

def prepare(pair):
    double.prepared = pair.sum

def prepared():
    return getattr(double, "prepared", None)

def in_pool(method):
    context = mp.get_context(method)
    with fdshare.ProcessPoolExecutor(1, context, initializer=prepare, initargs=(Pair(1, 1),)) as pool:
        assert pool.submit(double, 21).result(30) == 42
        assert pool.submit(double, 22).result(30) == 44
        assert list(pool.map(double, [1, 2], chunksize=2)) == [2, 4]
        assert pool.submit(lambda x: double(x), 3).result(30) == 6
        assert type(pool.submit(make, 21).result(30)) is Sub
        assert pool.submit(is_mine, Pair(1, 2)).result(30)
        if method == "fork":  # by name
            assert pool.submit(guarded, 21).result(30) == 21
            assert pool.submit(prepared).result(30) == 2

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


FROM_STDIN = """
import multiprocessing as mp
import fdshare

def double(x):
    return 2 * x

class Thing:
    pass

def prepare(thing):
    assert type(thing).__name__ == "Thing"

for method in ("spawn", "forkserver", "fork"):
    context = mp.get_context(method)
    with fdshare.ProcessPoolExecutor(1, context, initializer=prepare, initargs=(Thing(),)) as pool:
        print(pool.submit(double, 21).result(30), type(pool.submit(Thing).result(30)) is Thing)
"""


@pytest.mark.parametrize("way", ["stdin", "-c"])
def test_script_without_a_file(way: str, tmp_path: Path) -> None:
    arguments, script = ([], FROM_STDIN) if way == "stdin" else (["-c", FROM_STDIN], None)
    done = run(*arguments, folder=tmp_path, script=script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "42 True\n" * 3, "")


UNGUARDED = {
    "plain": "pool = fdshare.ProcessPoolExecutor(1, context)\nprint(pool.submit(double, 21).result(30))",
    "block": "with fdshare.ProcessPoolExecutor(3, context) as pool:\n    print(list(pool.map(double, range(9))))",
    "exits": """
def main():
    try:
        fdshare.ProcessPoolExecutor(1, context).submit(double, 21).result(30)
    except RuntimeError as error:
        if type(error) is not RuntimeError:
            raise
    return 0
sys.exit(main())
""",
    "standard": "fdshare.ProcessPoolExecutor(1, context, restart_workers=False).submit(double, 21).result(30)",
    "start_method": "mp.set_start_method(sys.argv[1])\nfdshare.ProcessPoolExecutor(1).submit(double, 21).result(30)",
}


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
@pytest.mark.parametrize("kind", UNGUARDED)
def test_missing_guard_is_one_error_that_names_it(kind: str, method: str, tmp_path: Path) -> None:
    start = f"import multiprocessing as mp, sys, fdshare\ncontext = mp.get_context({method!r})\n"
    (tmp_path / "tool.py").write_text(start + "def double(x):\n    return 2 * x\n" + UNGUARDED[kind])
    done = run("tool.py", method, folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert 'if __name__ == "__main__":' in done.stderr.splitlines()[-1]


def test_main_module_that_fails_elsewhere_says_so_once(tmp_path: Path) -> None:
    (tmp_path / "tool.py").write_text(
        "import multiprocessing as mp, fdshare\n"
        "if __name__ != '__main__':\n    raise ValueError('not here')\n"
        "fdshare.ProcessPoolExecutor(1, mp.get_context('spawn')).submit(print).result(30)\n"
    )
    done = run("tool.py", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("ValueError: not here") == 1
    assert "its traceback is above" in done.stderr.splitlines()[-1]


BY_SYS_PATH = """
import sys
sys.path[:0] = {path!r}
import multiprocessing, operator
import fdshare
if __name__ == "__main__":
    with fdshare.ProcessPoolExecutor(1, multiprocessing.get_context({method!r})) as pool:
        print(pool.submit(operator.neg, 1).result(30))
"""


@pytest.mark.parametrize("method", METHODS)
def test_script_that_finds_the_library_by_its_own_sys_path(method: str, tmp_path: Path) -> None:
    path = [str(ROOT), *{str(Path(module.__file__).parent.parent) for module in (attr, cloudpickle)}]
    (tmp_path / "script.py").write_text(BY_SYS_PATH.format(path=path, method=method))
    result = subprocess.run(
        [sys.executable, "-S", "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "-1\n", "")
