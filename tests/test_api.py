"""The public names: each is exported, documented, typed, and called as promised; and nothing else shows.

``PROMISED`` holds what users rely on, as stubs.  More parameters and methods than promised are fine where they have a
default; fewer, or others, are not.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import pickle
import queue
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fdshare

PROMISED = """
def Pipe(duplex=True, *, transport=None, codec=None): ...
def wait(objects, timeout=None): ...
def move(obj): ...
def register(type, *, reduce): ...
def send_fds(sock, buffers, fds): ...
def recv_fds(sock, bufsize, maxfds): ...
def connect(address, *, timeout=None, codec=None): ...
def same_user(peer): ...
def any_user(peer): ...

class Channel:
    def send(self, obj, *, timeout=None): ...
    def recv(self, *, timeout=None): ...
    def poll(self, timeout=0.0): ...
    def __iter__(self): ...
    def send_bytes(self, buf, offset=0, size=None): ...
    def recv_bytes(self, maxlength=None): ...
    def recv_bytes_into(self, buf, offset=0): ...
    def fileno(self): ...
    def close(self): ...
    def __enter__(self): ...
    def __exit__(self, exc_type, exc, tb): ...
    closed: bool
    readable: bool
    writable: bool
    peer: fdshare.PeerCredentials

class ChannelSet:
    def add(self, channel): ...
    def discard(self, channel): ...
    def select(self, timeout=None): ...

class FdHandle:
    def __init__(self, fd): ...
    def dup(file_or_fd): ...
    def fileno(self): ...
    def detach(self): ...
    def close(self): ...
    def to_file(self, mode="rb", **open_kwargs): ...
    def to_socket(self): ...
    def __enter__(self): ...
    def __exit__(self, exc_type, exc, tb): ...
    closed: bool
    kind: str

class TypedCodec: ...

def shared_array(shape, dtype="float64", order="C"): ...
def share(obj): ...

class SharedMemory:
    def __init__(self, size): ...
    def from_buffer(b): ...
    def seal(self): ...
    def fileno(self): ...
    def close(self): ...
    def __enter__(self): ...
    def __exit__(self, exc_type, exc, tb): ...
    buf: memoryview
    size: int
    sealed: bool
    closed: bool

class Listener:
    def __init__(self, address, *, backlog=128, codec=None, mode=0o600): ...
    def accept(self, timeout=None): ...
    def __iter__(self): ...
    def fileno(self): ...
    def close(self): ...
    def __enter__(self): ...
    def __exit__(self, exc_type, exc, tb): ...
    closed: bool
    address: str

class Queue:
    def __init__(self, maxbytes=None): ...
    def put(self, obj, block=True, timeout=None): ...
    def get(self, block=True, timeout=None): ...
    def put_nowait(self, obj): ...
    def get_nowait(self): ...
    def empty(self): ...
    def full(self): ...
    def qsize(self): ...
    def close(self): ...
    def join_thread(self): ...
    def cancel_join_thread(self): ...
    def fileno(self): ...

class Lock:
    def acquire(self, blocking=True, timeout=None, *, block=None): ...
    def release(self): ...
    def locked(self): ...
    def __enter__(self): ...
    def __exit__(self, exc_type, exc, tb): ...
    abandoned: bool

class Semaphore:
    def __init__(self, value=1): ...
    def acquire(self, blocking=True, timeout=None, *, block=None): ...
    def release(self, n=1): ...
    def locked(self): ...
    def get_value(self): ...
    def fileno(self): ...

class Event:
    def set(self): ...
    def clear(self): ...
    def is_set(self): ...
    def wait(self, timeout=None): ...
    def fileno(self): ...

class ProcessHandle:
    def __init__(self, pid): ...
    def wait(self, timeout=None): ...
    def send_signal(self, signum): ...
    def fileno(self): ...
    alive: bool
    exitcode: int | None

class PeerCredentials:
    def __init__(self, pid, uid, gid): ...
    pid: int
    uid: int
    gid: int
"""

ERRORS: dict[str, tuple[type[BaseException], ...]] = {
    "FdShareError": (Exception,),
    "ClosedError": (OSError,),
    "PeerClosedError": (EOFError, BrokenPipeError),
    "NotSendableError": (TypeError, pickle.PicklingError),
    "DecodeError": (pickle.UnpicklingError,),
    "FdLimitError": (OSError,),
    "DescriptorsLostError": (OSError,),
    "ProtocolError": (OSError,),
    "QueueClosedError": (EOFError, BrokenPipeError, ValueError),
    "QueueEmptyError": (TimeoutError, queue.Empty),
    "QueueFullError": (TimeoutError, queue.Full),
    "MessageTooLargeError": (ValueError,),
    "NoSpaceError": (OSError,),
    "SealError": (OSError, BufferError),
    "AccessDeniedError": (PermissionError,),
    "HandoffExpiredError": (LookupError,),
    "WorkerDiedError": (BrokenProcessPool,),
    "TaskTimeoutError": (TimeoutError,),
}

STUBS = {
    node.name: node for node in ast.parse(PROMISED).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
}
# Positional parameters whose names say nothing a caller would write out: their names are free.
UNNAMED = {"channel", "exc_type", "exc", "tb"}

Parameter = inspect.Parameter


# --- the checks -------------------------------------------------------------------------------------------------------


def promised_parameters(stub: ast.FunctionDef) -> list[Parameter]:
    """Return a stub's parameters, without ``self``."""
    spec = stub.args
    defaults: list[Any] = [Parameter.empty] * (len(spec.args) - len(spec.defaults))
    defaults += [ast.literal_eval(node) for node in spec.defaults]
    found = [
        Parameter(a.arg, Parameter.POSITIONAL_OR_KEYWORD, default=d)
        for a, d in zip(spec.args, defaults, strict=True)
        if a.arg != "self"
    ]
    for arg, node in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        default = Parameter.empty if node is None else ast.literal_eval(node)
        found.append(Parameter(arg.arg, Parameter.KEYWORD_ONLY, default=default))
    if spec.kwarg:
        found.append(Parameter(spec.kwarg.arg, Parameter.VAR_KEYWORD))
    return found


def signature_faults(stub: ast.FunctionDef, function: Callable[..., Any]) -> list[str]:
    """Return a line for each parameter that is not as promised, and for each additional one that callers must pass."""
    actual = list(inspect.signature(function).parameters.values())
    if actual and actual[0].name == "self":
        del actual[0]
    promised = promised_parameters(stub)
    positional = [p for p in actual if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    lines, matched = [], set()
    for place, want in enumerate(promised):
        if want.kind is Parameter.POSITIONAL_OR_KEYWORD:
            have = positional[place] if place < len(positional) else None
        else:
            have = next((p for p in actual if p.name == want.name), None)
        if have is None:
            lines.append(f"{stub.name} lacks {want}")
            continue
        matched.add(have.name)
        as_named = have.name == want.name and have.kind is want.kind
        if not (as_named or (want.name in UNNAMED and have in positional)) or have.default != want.default:
            lines.append(f"{stub.name} has {have}, promised is {want}")
    lines += [
        f"{stub.name} demands {p}"
        for p in actual
        if p.name not in matched
        and p.default is Parameter.empty
        and p.kind not in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    ]
    return lines


def annotation_faults(name: str, function: Callable[..., Any]) -> list[str]:
    """Return a line for each parameter without a type, and for a missing return type."""
    signature = inspect.signature(function)
    lines = [
        f"{name}: {p.name} has no type"
        for p in signature.parameters.values()
        if p.annotation is Parameter.empty and p.name not in ("self", "cls")
    ]
    if signature.return_annotation is inspect.Signature.empty:
        lines.append(f"{name} has no return type")
    return lines


def docstring_faults(name: str, thing: Any, own: str | None) -> list[str]:
    """Return what is amiss in a docstring: there must be one of its own, and a function's says what is raised."""
    text = own or ""
    if len(text.split()) < 4:
        return [f"{name} has no docstring worth the name: {text!r}"]
    if inspect.isroutine(thing) and not re.search(r"\brais(e|es|ed|ing)\b", text, re.IGNORECASE):
        return [f"{name} does not say what it raises"]
    return []


def public_members(cls: type) -> Iterator[tuple[str, Any]]:
    """Yield a class's own public methods, as functions, and properties, inherited ones of fdshare's bases included."""
    seen = set()
    for base in cls.__mro__:
        if not base.__module__.startswith("fdshare"):
            continue
        for name, value in vars(base).items():
            if name.startswith("_") or name in seen:
                continue
            seen.add(name)
            if isinstance(value, classmethod | staticmethod):
                value = value.__func__
            if inspect.isroutine(value) or isinstance(value, property):
                yield name, value


def strays(module: str) -> list[str]:
    """Return the names a fresh ``import module`` shows that are neither exported nor a submodule."""
    code = (
        f"import {module} as m, types\n"
        "for name in dir(m):\n"
        "    value = getattr(m, name)\n"
        f"    own = isinstance(value, types.ModuleType) and value.__name__ == '{module}.' + name\n"
        "    if not (name in m.__all__ or own or (name.startswith('__') and name.endswith('__'))):\n"
        "        print(name)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=30)
    return run.stdout.split()


# --- fdshare ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*STUBS, *ERRORS])
def test_name_is_exported(name: str) -> None:
    assert name in fdshare.__all__
    assert name in dir(fdshare)
    assert getattr(fdshare, name).__name__ == name


def test_every_exported_name_is_there_once() -> None:
    assert len(set(fdshare.__all__)) == len(fdshare.__all__)
    assert [name for name in fdshare.__all__ if not hasattr(fdshare, name)] == []
    assert [name for name in fdshare.__all__ if isinstance(getattr(fdshare, name), ModuleType)] == []


def test_nothing_else_shows() -> None:
    assert strays("fdshare") == []


def test_a_typo_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"fdshare.*Chanel"):
        fdshare.Chanel  # type: ignore[attr-defined]  # noqa: B018 -- the access is the test


@pytest.mark.parametrize("name", ["aio", "handover", "testing", "integrations.multiprocessing"])
def test_a_package_needs_no_import_of_its_own(name: str) -> None:
    code = f"import fdshare, sys; assert 'fdshare.{name}' not in sys.modules; fdshare.{name}.__all__"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_version_and_marker_are_there() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+)?", fdshare.__version__)
    assert (Path(fdshare.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", [name for name, stub in STUBS.items() if isinstance(stub, ast.FunctionDef)])
def test_function_is_called_as_promised(name: str) -> None:
    stub = STUBS[name]
    assert isinstance(stub, ast.FunctionDef)
    assert signature_faults(stub, getattr(fdshare, name)) == []


@pytest.mark.parametrize("name", [name for name, stub in STUBS.items() if isinstance(stub, ast.ClassDef)])
def test_class_has_what_was_promised(name: str) -> None:
    stub, cls = STUBS[name], getattr(fdshare, name)
    assert isinstance(stub, ast.ClassDef)
    faults = []
    for member in stub.body:
        if isinstance(member, ast.FunctionDef):
            found = cls if member.name == "__init__" else getattr(cls, member.name, None)
            faults += signature_faults(member, found) if found else [f"{name} lacks {member.name}"]
        elif isinstance(member, ast.AnnAssign) and not hasattr(cls, ast.unparse(member.target)):
            faults.append(f"{name} lacks {ast.unparse(member.target)}")
    assert faults == []


@pytest.mark.parametrize("name", sorted(fdshare.__all__))
def test_name_is_documented_and_typed(name: str) -> None:
    thing = getattr(fdshare, name)
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return  # a constant: its module documents it
    faults = docstring_faults(name, thing, vars(thing).get("__doc__") or getattr(thing, "__doc__", None))
    if inspect.isroutine(thing):
        faults += annotation_faults(name, thing)
    elif not issubclass(thing, BaseException):
        for member, value in public_members(thing):
            full = f"{name}.{member}"
            faults += docstring_faults(full, value, value.__doc__)
            faults += annotation_faults(full, value.fget if isinstance(value, property) else value)
    assert faults == []


@pytest.mark.parametrize("name", list(ERRORS))
def test_error_is_also_the_builtin(name: str) -> None:
    error = getattr(fdshare, name)
    for base in (Exception, *ERRORS[name]):
        assert issubclass(error, base)
    assert issubclass(error, fdshare.FdShareError)
    assert docstring_faults(name, error, error.__doc__) == []


@pytest.mark.parametrize("name", list(ERRORS))
def test_error_survives_pickle_and_copy(name: str) -> None:
    error = getattr(fdshare, name)("what happened")
    error.detail = {"any": "attribute"}
    for copied in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(copied) is type(error)
        assert str(copied) == str(error)
        assert "what happened" in str(copied)
        assert vars(copied) == vars(error)


def test_every_error_is_exported() -> None:
    def family(cls: type) -> Iterator[type]:
        yield cls
        for child in cls.__subclasses__():
            yield from family(child)

    public = {
        cls.__name__
        for cls in family(fdshare.FdShareError)
        if cls.__module__ == "fdshare.errors" and not cls.__name__.startswith("_")
    }
    assert sorted(public - set(fdshare.__all__)) == []
    assert sorted(public - set(ERRORS)) == []


def test_no_exported_name_hides_a_builtin() -> None:
    assert [name for name in fdshare.__all__ if hasattr(builtins, name)] == []


# --- the checks are able to fail --------------------------------------------------------------------------------------


def stub(text: str) -> ast.FunctionDef:
    node = ast.parse(text).body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


@pytest.mark.parametrize(
    "function",
    [
        lambda a, c, *, timeout=None: None,
        lambda a, *, timeout=None: None,
        lambda a, b=2, *, timeout=None: None,
        lambda a, b=1, *, timeout=0: None,
        lambda a, b=1, timeout=None: None,
        lambda a, b=1, *, timeout=None, more: None,
        lambda a, b=1, more=None: None,
        lambda a, b=1, **kwargs: None,
    ],
)
def test_other_signature_is_found(function: Callable[..., Any]) -> None:
    assert signature_faults(stub("def f(a, b=1, *, timeout=None): ..."), function)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b=1, *, timeout=None: None,
        lambda a, b=1, *, timeout=None, more=0: None,
        lambda a, b=1, more=0, *, timeout=None: None,
        lambda self, a, b=1, *, timeout=None: None,
    ],
)
def test_promised_signature_passes(function: Callable[..., Any]) -> None:
    assert signature_faults(stub("def f(a, b=1, *, timeout=None): ..."), function) == []


def test_missing_type_is_found() -> None:
    def typed(a: int) -> None: ...
    def half_typed(a: int, b) -> None: ...  # type: ignore[no-untyped-def]  # the point
    def endless(a: int): ...  # type: ignore[no-untyped-def]  # the point

    assert annotation_faults("f", typed) == []
    assert annotation_faults("f", half_typed) == ["f: b has no type"]
    assert annotation_faults("f", endless) == ["f has no return type"]


def test_poor_docstring_is_found() -> None:
    assert docstring_faults("f", len, None)
    assert docstring_faults("f", len, "Does it.")
    assert docstring_faults("f", len, "Return the length of a thing in items.") == [
        "f does not say what it raises"
    ]
    assert (
        docstring_faults("f", len, "Return the length of a thing.\n\nRaises:\n    TypeError: it has none.")
        == []
    )
    assert docstring_faults("C", int, "A number of any size.") == []


def test_stray_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "untidy.py").write_text("import os\n__all__ = ['f']\ndef f(): ...\nleft_over = 1\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert strays("untidy") == ["left_over", "os"]
