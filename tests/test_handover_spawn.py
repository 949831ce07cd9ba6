"""What a successor runs that is started by its predecessor: what a new start would run, also of another release."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import attrs
import cloudpickle
import pytest
from handovers import SOON
from helpers import wait_until

from fdshare.handover import spawn

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = sorted(
    {str(ROOT), *(str(Path(module.__file__).parent.parent) for module in (attrs, cloudpickle))}
)
"""Where everything is that a release's own interpreter, which is in no environment, has to import."""

PROGRAM = """
import os, sys
_, control, log, when, *rest = sys.argv
if when == "early":
    os.chdir("/")
from fdshare.handover import Handover
if when == "late":
    os.chdir("/")
with Handover(control) as handover:
    with open(log, "a") as file:
        print("RELEASE", *rest, file=file)
    handover.ready()
    if handover.generation == 0:
        sys.stdin.read()
        handover.start_successor(COMMAND)
        assert handover.retired.wait(20)
"""


def write_release(path: Path, command: str = "None") -> None:
    """Make a release in which every form of start says which one it is."""
    code = PROGRAM.replace("RELEASE", path.name).replace("COMMAND", command)
    for place in (
        "app.py",
        "module.py",
        "package/__main__.py",
        "package/deep/__main__.py",
        "folder/__main__.py",
    ):
        file = path / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(code)
    for place in ("package", "package/deep"):
        (path / place / "__init__.py").touch()
    with zipfile.ZipFile(path / "app.pyz", "w") as archive:
        archive.writestr("__main__.py", code)
    script = path / "bin" / "app"
    script.parent.mkdir()
    script.write_text(f"#!{sys.executable}\n{code}")
    script.chmod(0o755)
    (path / "bin" / "python").symlink_to(sys.executable)


FORMS = {
    "script": [sys.executable, "app.py"],
    "dotted": [sys.executable, "-X", "utf8", "-Wignore", "./folder/../app.py"],
    "module": [sys.executable, "-m", "module"],
    "package": [sys.executable, "-m", "package"],
    "subpackage": [sys.executable, "-Bm", "package.deep"],
    "directory": [sys.executable, "folder"],
    "zipapp": [sys.executable, "app.pyz"],
    "console-script": ["bin/app"],
    "interpreter": ["bin/python", "app.py"],
}


def run(path: Path, words: list[str], when: str = "never", command: str = "None", named: bool = True) -> str:
    """Start release 1 by a link, let the link be release 2, let a successor start, and return what has run."""
    for name in ("v1", "v2"):
        write_release(path / name, command)
    link, log = path / "current", path / "log"
    link.symlink_to("v1")
    arguments = [*words, os.fspath(path / "control"), os.fspath(log), when, "a b"]
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PWD"},
        **({"PWD": os.fspath(link)} if named else {}),
        "PYTHONPATH": os.pathsep.join(LIBRARIES),
    }
    with subprocess.Popen(arguments, cwd=link, env=environment, stdin=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        wait_until(lambda: log.exists() or process.poll() is not None)
        (path / "next").symlink_to("v2")
        (path / "next").rename(link)
        process.communicate(timeout=SOON)
        assert process.returncode == 0
    return log.read_text()


@pytest.mark.parametrize(
    ("form", "when"),
    [
        *((form, "late") for form in FORMS),
        *((form, "early") for form in ("script", "module", "zipapp", "interpreter")),
        ("dotted", "never"),
    ],
)
def test_another_release_behind_the_same_link(tmp_path: Path, form: str, when: str) -> None:
    """Wherever the program has gone meanwhile."""
    assert run(tmp_path, FORMS[form], when) == "v1 a b\nv2 a b\n"


def test_another_command_begins_where_this_process_did(tmp_path: Path) -> None:
    command = '[sys.executable, "app.py", *sys.argv[1:]]'
    assert run(tmp_path, [sys.executable, "-m", "module"], command=command) == "v1 a b\nv2 a b\n"


@pytest.mark.parametrize("when", ["never", "late", "early"])
def test_without_a_name_the_directory_is_what_it_was(tmp_path: Path, when: str) -> None:
    assert run(tmp_path, [sys.executable, "app.py"], when, named=False) == "v1 a b\nv1 a b\n"


@pytest.mark.parametrize(
    ("words", "program"),
    [
        ([], ("", "-")),
        (["-"], ("", "-")),
        (["-i", "-"], ("", "-")),
        (["app.py", "-c"], ("", "app.py")),
        (["-W", "error", "-Xdev", "-X", "utf8", "app.py"], ("", "app.py")),
        (["--check-hash-based-pycs", "never", "-uB", "app"], ("", "app")),
        (["-IWerror", "app"], ("", "app")),
        (["--", "app"], ("", "app")),
        (["-c", "pass", "x"], ("c", "pass")),
        (["-Ic", "pass"], ("c", "pass")),
        (["-mpackage", "x"], ("m", "package")),
        (["-um", "package"], ("m", "package")),
    ],
)
def test_what_a_command_runs(words: list[str], program: tuple[str, str]) -> None:
    assert spawn._program(["python", *words]) == program


def test_a_program_from_standard_input_cannot_be_started_again(tmp_path: Path) -> None:
    code = (
        "from fdshare.handover import Handover\n"
        f"with Handover({os.fspath(tmp_path / 'control')!r}) as handover:\n"
        "    try:\n        handover.start_successor()\n"
        "    except OSError as error:\n        print(error)\n"
    )
    told = subprocess.run(
        [sys.executable, "-"], input=code, cwd=ROOT, capture_output=True, text=True, timeout=SOON, check=True
    )
    assert "standard input: say the command" in told.stdout
