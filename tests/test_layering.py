"""The house's order, held by reading the code: who may import whom, who may call what, and how light the import is.

The rows are read from the table in docs/design.md.  Each check is a function over plain sources, so that the tests below
can show for each that it is able to fail.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fdshare"

# Where the façade stands: it gathers what lies above it, and only what is made for users (testing, the command) imports it.
FACADE_ROW = 13.5
INTEGRATIONS_ROW = 99.0

MAX_LINES = 500

NO_IO = ("codec", "wire")
IO_MODULES = {"socket", "_socket", "threading", "_thread", "asyncio", "select", "selectors"}

SOCKET_CALLS = {"sendmsg", "sendmsg_afalg", "recvmsg", "recvmsg_into"}
SOCKET_CALLERS = ("rights", "datagrams", "vouched", "transport", "transports")

LOCK_MAKERS = ("fdshare.locks", "fdshare.testing")

HEAVY = ("asyncio", "numpy", "multiprocessing", "argparse", "concurrent.futures")

Rank = tuple[float, int]  # row, and the place inside the row: a module may import from those named before it


# --- the checks -------------------------------------------------------------------------------------------------------


def read_rows(text: str) -> dict[str, Rank]:
    """Return the rank of each module that the table of a design page names; a package is named with a slash."""
    ranks: dict[str, Rank] = {}
    for row, cell in re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE):
        for place, name in enumerate(re.findall(r"`(\w+)(?:\.py|/)`", cell)):
            assert name not in ranks, f"{name} has two rows"
            ranks[name] = (float(row), place)
    return ranks


def read_package() -> dict[str, str]:
    """Return the source of each module of fdshare by its dotted name; a package's goes by ``name.__init__``."""
    sources = {}
    for folder in (PACKAGE, *(init.parent for init in PACKAGE.glob("*/__init__.py"))):
        for path in sorted(folder.glob("*.py")):
            sources[".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)] = path.read_text()
    return sources


def imports_of(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each import, wherever it stands: late and type-only ones bind modules too."""
    package = module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0]
            if called in ("import_module", "__import__") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def order_violations(sources: Mapping[str, str], ranks: Mapping[str, Rank]) -> list[str]:
    """Return a line for each import that runs downward, and for each module without a row."""

    def rank(module: str) -> Rank | None:
        parts = module.split(".")[1:]
        if not parts or parts == ["__init__"]:
            return (FACADE_ROW, 0)
        if parts[0] == "integrations":
            return (INTEGRATIONS_ROW, 0)
        return ranks.get(parts[0])

    def module_meant(name: str) -> str:
        """Cut ``fdshare.channel.Channel`` to its module; a name of the façade stands for the façade."""
        parts = name.split(".")
        known = len(parts) > 1 and (
            parts[1] == "integrations" or any(s.split(".")[1] == parts[1] for s in sources)
        )
        return f"fdshare.{parts[1]}" if known else "fdshare"

    lines = []
    for module, source in sources.items():
        own = rank(module)
        if own is None:
            lines.append(f"{module} has no row in docs/design.md")
            continue
        subpackage = module.split(".")[1] if module.count(".") > 1 else None
        for line, name in imports_of(ast.parse(source), module):
            if name.split(".")[0] != "fdshare":
                continue
            meant = module_meant(name)
            other = rank(meant)
            inside = subpackage is not None and meant == f"fdshare.{subpackage}"
            if not inside and (other is None or other >= own):
                lines.append(f"{module}:{line} imports {name}, which is not above it")
    return lines


def io_violations(sources: Mapping[str, str]) -> list[str]:
    """Return a line for each import by which a module of ``NO_IO`` reaches sockets, threads or an event loop."""
    return [
        f"{module}:{line} imports {name}"
        for module, source in sources.items()
        if module.removeprefix("fdshare.") in NO_IO
        for line, name in imports_of(ast.parse(source), module)
        if name.split(".")[0] in IO_MODULES
    ]


def socket_call_violations(sources: Mapping[str, str]) -> list[str]:
    """Return a line for each mention, outside the transport's modules, of the calls that move descriptors."""
    lines = []
    for module, source in sources.items():
        if module in {f"fdshare.{name}" for name in SOCKET_CALLERS}:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute):
                name, owner = node.attr, getattr(node.value, "id", None)
            elif isinstance(node, ast.Constant):  # getattr(sock, "sendmsg")
                name, owner = node.value if isinstance(node.value, str) else "", None
            else:
                continue
            if name in SOCKET_CALLS or (owner == "socket" and name in ("send_fds", "recv_fds")):
                lines.append(f"{module}:{node.lineno} uses {name}")
    return lines


def lock_violations(sources: Mapping[str, str]) -> list[str]:
    """Return a line for each lock that is made past ``locks.py``, and so cannot be relied on in CPython 3.14."""
    return [
        f"{module}:{node.lineno} makes a lock of threading: use fdshare.locks"
        for module, source in sources.items()
        if module not in LOCK_MAKERS and not module.startswith("fdshare.integrations.")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("threading.Lock", "threading.RLock")
    ]


def long_files(sources: Mapping[str, str]) -> list[str]:
    """Return a line for each file that is too long to have one job."""
    lengths = {module: source.count("\n") for module, source in sources.items()}
    return [f"{module} has {length} lines" for module, length in lengths.items() if length >= MAX_LINES]


def integration_violations(sources: Mapping[str, str]) -> list[str]:
    """Return a line for each third-party import an integration makes when loaded, and each private name it takes."""
    lines = []
    for module, source in sources.items():
        if not module.startswith("fdshare.integrations."):
            continue
        for line, name in imports_of(ast.parse(source), module):
            if name.split(".")[0] == "fdshare" and any(part.startswith("_") for part in name.split(".")):
                lines.append(f"{module}:{line} takes {name}, which is private")
        for line, name in imports_of(_WithoutLateParts().visit(ast.parse(source)), module):
            if name.split(".")[0] not in {"fdshare", *sys.stdlib_module_names}:
                lines.append(f"{module}:{line} imports {name} when it is loaded")
    return lines


class _WithoutLateParts(ast.NodeTransformer):
    """Take out what does not run when a module is loaded."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        return None

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)


def heavy_modules_loaded(name: str, path: Path) -> list[str]:
    """Return which of ``HEAVY`` a fresh interpreter has loaded after importing ``name``, with ``path`` searched first."""
    code = (
        f"import sys; sys.path.insert(0, {str(path)!r}); before = set(sys.modules); import {name}; "
        f"print(*[m for m in {HEAVY!r} if m in sys.modules and m not in before])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30, cwd=path
    )
    return run.stdout.split()


# --- fdshare ----------------------------------------------------------------------------------------------------------


def test_imports_run_upward_only() -> None:
    ranks = read_rows((ROOT / "docs" / "design.md").read_text())
    assert order_violations(read_package(), ranks) == []


def test_table_names_only_modules_that_exist() -> None:
    ranks = read_rows((ROOT / "docs" / "design.md").read_text())
    there = {module.split(".")[1] for module in read_package()}
    assert sorted(set(ranks) - there) == []


def test_codec_and_wire_do_no_io() -> None:
    sources = read_package()
    assert {f"fdshare.{name}" for name in NO_IO} <= set(sources)
    assert io_violations(sources) == []


def test_only_transport_moves_descriptors() -> None:
    sources = read_package()
    assert {f"fdshare.{name}" for name in SOCKET_CALLERS} <= set(sources)
    assert socket_call_violations(sources) == []


def test_locks_are_made_in_one_place() -> None:
    assert lock_violations(read_package()) == []


def test_files_stay_short() -> None:
    assert long_files(read_package()) == []


def test_integrations_are_lazy_and_use_public_names() -> None:
    assert integration_violations(read_package()) == []


def test_import_is_light() -> None:
    assert heavy_modules_loaded("fdshare", ROOT) == []


def test_integrations_are_reached_through_the_link() -> None:
    link = PACKAGE / "integrations"
    assert link.is_symlink()
    assert link.readlink() == Path("../integrations")


# --- the checks are able to fail --------------------------------------------------------------------------------------

RANKS = read_rows(
    "| 0 | `errors.py` | x |\n| 1 | `handle.py`, `kinds.py` | x |\n| 2 | `pool/` | x |\n| 15 | `cli.py` | x |\n"
)
EMPTY = {
    "fdshare.errors": "",
    "fdshare.handle": "",
    "fdshare.kinds": "",
    "fdshare.pool.__init__": "",
    "fdshare.cli": "",
}


def test_rows_are_read_in_order() -> None:
    assert RANKS == {"errors": (0, 0), "handle": (1, 0), "kinds": (1, 1), "pool": (2, 0), "cli": (15, 0)}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fdshare.errors", "import fdshare.handle"),
        ("fdshare.errors", "from fdshare import handle"),
        ("fdshare.errors", "from .handle import FdHandle"),
        ("fdshare.errors", "from . import handle"),
        ("fdshare.errors", "from fdshare import FdHandle"),
        ("fdshare.errors", "import fdshare"),
        ("fdshare.errors", "def late():\n    from fdshare.handle import FdHandle"),
        ("fdshare.errors", "if TYPE_CHECKING:\n    from fdshare.handle import FdHandle"),
        ("fdshare.errors", "import importlib; importlib.import_module('fdshare.handle')"),
        ("fdshare.errors", "from fdshare.integrations import joblib"),
        ("fdshare.handle", "from fdshare.kinds import kind_of"),
        ("fdshare.handle", "from fdshare.pool.worker import main"),
        ("fdshare.pool.worker", "from ..cli import main"),
        ("fdshare.pool.worker", "from fdshare import Pipe"),
        ("fdshare.__init__", "from fdshare.cli import main"),
        ("fdshare.stray", ""),
    ],
)
def test_downward_import_is_found(module: str, source: str) -> None:
    assert len(order_violations(EMPTY | {module: source}, RANKS)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fdshare.handle", "from fdshare.errors import ClosedError"),
        ("fdshare.handle", "from .errors import ClosedError"),
        ("fdshare.kinds", "from fdshare.handle import FdHandle"),
        ("fdshare.pool.worker", "from .tasks import Task\nfrom ..handle import FdHandle"),
        ("fdshare.__init__", "from fdshare.handle import FdHandle"),
        ("fdshare.cli", "import fdshare\nfrom fdshare import Pipe"),
        ("fdshare.integrations.joblib", "from fdshare import Pipe"),
        ("fdshare.errors", "import errno, pickle"),
    ],
)
def test_upward_import_passes(module: str, source: str) -> None:
    assert order_violations(EMPTY | {module: source}, RANKS) == []


@pytest.mark.parametrize(
    "source", ["import socket", "from threading import Lock", "def f():\n    import asyncio.events"]
)
def test_io_in_the_codec_is_found(source: str) -> None:
    assert len(io_violations({"fdshare.codec": source})) == 1
    assert io_violations({"fdshare.channel": source}) == []


@pytest.mark.parametrize(
    "source",
    [
        "s.sendmsg([b''])",
        "f = self.sock.recvmsg",
        "getattr(s, 'recvmsg_into')",
        "socket.send_fds(s, [b''], [1])",
    ],
)
def test_descriptor_call_outside_transport_is_found(source: str) -> None:
    assert len(socket_call_violations({"fdshare.channel": source})) == 1
    assert socket_call_violations({"fdshare.transport": source}) == []


@pytest.mark.parametrize(
    "source", ["lock = threading.Lock()", "def f(self):\n    self.lock = threading.RLock()"]
)
def test_bare_lock_is_found(source: str) -> None:
    assert len(lock_violations({"fdshare.channel": source})) == 1
    assert lock_violations({"fdshare.locks": source}) == []


def test_long_file_is_found() -> None:
    assert long_files({"fdshare.channel": "x\n" * MAX_LINES}) == [f"fdshare.channel has {MAX_LINES} lines"]
    assert long_files({"fdshare.channel": "x\n" * (MAX_LINES - 1)}) == []


@pytest.mark.parametrize(
    "source",
    [
        "import joblib",
        "from fdshare.channel import _wait",
        "if True:\n    import dask",
        "try:\n    import torch\nfinally: ...",
    ],
)
def test_unclean_integration_is_found(source: str) -> None:
    assert len(integration_violations({"fdshare.integrations.x": source})) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import joblib",
        "if TYPE_CHECKING:\n    import joblib",
        "import socket\nfrom fdshare import Pipe",
    ],
)
def test_clean_integration_passes(source: str) -> None:
    assert integration_violations({"fdshare.integrations.x": source}) == []


@pytest.mark.parametrize("heavy", ["asyncio", "multiprocessing", "concurrent.futures", "argparse", "numpy"])
def test_heavy_import_is_found(heavy: str, tmp_path: Path) -> None:
    (tmp_path / "overweight").mkdir()
    (tmp_path / "overweight" / "__init__.py").write_text(f"import {heavy}\n")
    assert heavy in heavy_modules_loaded("overweight", tmp_path)
