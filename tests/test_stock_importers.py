"""``install()`` waits for its neighbours to be loaded, by whatever finder and loader a program has, which stay as they are."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

TIMEOUT = 60.0

START = """
import importlib, importlib.abc, importlib.machinery, importlib.util, io, sys, types
from fdshare.integrations.multiprocessing import install, installed, uninstall

def attended():
    import cloudpickle.cloudpickle as module
    function = module.CloudPickler._dispatch_table.get(io.TextIOWrapper)
    return function is not None and function.__module__.startswith("fdshare")

NAME = "cloudpickle.cloudpickle"

class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, loader):
        self.loader = loader
        self.asked = []
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in ("cloudpickle", "json"):
            return None
        self.asked.append(name)
        found = importlib.machinery.PathFinder.find_spec(name, path)
        places = found.submodule_search_locations
        spec = importlib.machinery.ModuleSpec(name, self.loader, loader_state=path, is_package=places is not None)
        if places is not None:
            spec.submodule_search_locations[:] = places
        return spec

def execute(module):
    found = importlib.machinery.PathFinder.find_spec(module.__name__, module.__spec__.loader_state)
    exec(found.loader.get_code(module.__name__), vars(module))

def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] in ("json", "cloudpickle")]:
        del sys.modules[name]
"""

CASES = {
    "shared": """
        class Shared(importlib.abc.Loader):
            def create_module(self, spec):
                assert spec.loader is self
            def exec_module(self, module):
                assert module.__spec__.loader is self and module.__loader__ is self
                execute(module)
        loader = Shared()
        sys.meta_path.insert(0, Finder(loader))
        install()
        import cloudpickle
        import json.tool
        assert vars(loader) == {} and sys.modules[NAME].__spec__.loader is loader
    """,
    "a_class": """
        class Static:
            @classmethod
            def create_module(cls, spec):
                assert spec.loader is cls
            @classmethod
            def exec_module(cls, module):
                assert module.__spec__.loader is cls and module.__loader__ is cls
                execute(module)
        before = dict(vars(Static))
        sys.meta_path.insert(0, Finder(Static))
        install()
        import cloudpickle
        import json.tool
        assert dict(vars(Static)) == before
    """,
    "slotted": """
        class Slotted:
            __slots__ = ("uses",)
            def __init__(self):
                self.uses = 0
            def create_module(self, spec):
                return None
            def exec_module(self, module):
                self.uses += 1
                execute(module)
        sys.meta_path.insert(0, Finder(Slotted()))
        install()
        import cloudpickle
        import json.tool
    """,
    "a_proxy": """
        class Real:
            def create_module(self, spec):
                return None
            def exec_module(self, module):
                execute(module)
        class Proxy:
            # As wrapt's: what is set, is set on the other; and it may be asked for its class.
            def __init__(self, other):
                object.__setattr__(self, "other", other)
            @property
            def __class__(self):
                return type(self.other)
            def __getattr__(self, name):
                return getattr(self.other, name)
            def __setattr__(self, name, value):
                setattr(self.other, name, value)
            def __eq__(self, other):
                raise AssertionError("compared")
            __hash__ = None
        real = Real()
        sys.meta_path.insert(0, Proxy(Finder(Proxy(real))))
        install()
        import cloudpickle
        import json.tool
        assert vars(real) == {}
    """,
    "ready_made_module": """
        class Maker:
            def create_module(self, spec):
                self.made = types.ModuleType(spec.name)
                return self.made
            def exec_module(self, module):
                assert module is self.made
                execute(module)
        sys.meta_path.insert(0, Finder(Maker()))
        install()
        import cloudpickle
    """,
    "cached_spec": """
        class Cached(Finder):
            specs = {}
            def find_spec(self, name, path, target=None):
                if name not in self.specs:
                    self.specs[name] = super().find_spec(name, path, target)
                return self.specs[name]
        class Plain(importlib.abc.Loader):
            def exec_module(self, module):
                assert module.__spec__.loader is self
                execute(module)
        loader = Plain()
        sys.meta_path.insert(0, Cached(loader))
        install()
        import cloudpickle
        importlib.util.find_spec("json")
        forget()
        import cloudpickle
        assert Cached.specs[NAME].loader is loader
    """,
    "who_asks_others": """
        class Asking(Finder):
            busy = False
            def find_spec(self, name, path, target=None):
                if self.busy or not name.startswith("cloudpickle"):
                    return None
                self.busy = True
                try:
                    spec = importlib.util.find_spec(name)
                finally:
                    self.busy = False
                self.inner, spec.loader = spec.loader, self
                return spec
            def create_module(self, spec):
                return self.inner.create_module(spec)
            def exec_module(self, module):
                module.__spec__.loader = module.__loader__ = self.inner
                self.inner.exec_module(module)
        sys.meta_path.insert(0, Asking(None))
        install()
        sys.meta_path.insert(0, Asking(None))
        import cloudpickle
    """,
    "without_find_spec": """
        class Odd:
            def find_module(self, name, path=None):
                return None
        sys.meta_path.insert(0, Odd())
        install()
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)
            import cloudpickle
            import json.tool
    """,
    "lazy": """
        class Lazy:
            def find_spec(self, name, path, target=None):
                if name != NAME:
                    return None
                spec = importlib.machinery.PathFinder.find_spec(name, path)
                spec.loader = importlib.util.LazyLoader(spec.loader)
                return spec
        import cloudpickle as package
        del sys.modules[NAME]
        sys.meta_path.insert(0, Lazy())
        if early:
            importlib.import_module(NAME)
        install()
        module = sys.modules[NAME] if early else importlib.import_module(NAME)  # which would use it
        assert type(module) is importlib.util._LazyModule  # nobody has used it yet
        assert callable(module.dumps)
    """,
    "reload": """
        install()
        import cloudpickle.cloudpickle as module
        importlib.reload(module)
        assert attended()
        importlib.reload(importlib.import_module("cloudpickle"))
    """,
    "only_looked_for": """
        install()
        spec = importlib.util.find_spec(NAME)
        assert spec.loader.get_source(NAME) and spec.loader.get_filename(NAME) == spec.origin
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert type(spec.loader).__name__ == "SourceFileLoader" and module.__loader__ is spec.loader
        import cloudpickle
    """,
    "namespace_package": """
        import tempfile, os
        with tempfile.TemporaryDirectory() as folder:
            os.makedirs(os.path.join(folder, "loky", "backend", "reduction"))
            for name in ("loky/__init__.py", "loky/backend/__init__.py"):
                open(os.path.join(folder, name), "w").close()
            sys.path.insert(0, folder)
            install()
            import loky.backend.reduction as reduction
            assert reduction.__spec__.loader is None or "Namespace" in type(reduction.__loader__).__name__
    """,
    "another_module_of_that_name": """
        import tempfile, os
        with tempfile.TemporaryDirectory() as folder:
            os.makedirs(os.path.join(folder, "distributed"))
            for name in ("__init__", "batched"):
                open(os.path.join(folder, "distributed", name + ".py"), "w").close()
            sys.path.insert(0, folder)
            install()
            import distributed.batched
            uninstall()
            install()
    """,
    "finders_replaced": """
        install()
        sys.meta_path = [finder for finder in sys.meta_path if "Watcher" not in type(finder).__name__]
        uninstall()
        install()
    """,
}


def run(code: str) -> None:
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_importer(name: str, early: bool) -> None:
    """Early: the finder is there before install(), which is what most programs have; some add theirs later."""
    code = textwrap.dedent(CASES[name])
    if not early:
        code = code.replace("sys.meta_path.insert(0, ", "sys.meta_path.insert(len(sys.meta_path) and 1, ", 1)
        code = "install()\n" + code.replace("\ninstall()\n", "\n", 1)
    run(
        f"{START}\nearly = {early}\n{code}\nassert installed() and attended()\nuninstall()\nassert not attended()"
    )


def test_loaders_that_only_load_modules() -> None:
    if sys.version_info >= (3, 15):
        return
    run(
        START
        + textwrap.dedent("""
        import warnings
        warnings.simplefilter("ignore")
        class Old:
            def load_module(self, name):
                module = sys.modules[name] = types.ModuleType(name)
                module.__path__ = [] if name == "cloudpickle" else None
                module.__file__ = importlib.machinery.PathFinder.find_spec("cloudpickle").origin
                found = importlib.machinery.PathFinder.find_spec(name, [module.__file__.rpartition("/")[0]])
                module.__package__ = "cloudpickle"
                exec(found.loader.get_code(name), vars(module))
                return module
        loader = Old()
        class OldFinder:
            def find_spec(self, name, path, target=None):
                if name == NAME:
                    return importlib.machinery.ModuleSpec(name, loader)
        sys.meta_path.insert(0, OldFinder())
        install()
        import cloudpickle
        assert attended()
        assert sys.modules[NAME].__loader__ is loader
        """)
    )
