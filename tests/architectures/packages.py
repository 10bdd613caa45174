"""transformers, timm, peft and lightning, imported without torchvision.

None of the models here needs torchvision, whose wheel fails to load beside some builds of torch.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Folders that hold the packages of the extra `hub`, where the environment has none.
sys.path += [path for path in os.environ.get("FISHERLAB_HUB", "").split(os.pathsep) if path]


class _StubFinder:
    """Imports `torchvision` and its submodules as modules whose attributes are empty classes."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = _empty_class
        return module

    def exec_module(self, module):
        pass


class _Empty(type):
    """The type of a class whose attributes are empty classes."""

    def __getattr__(cls, name):
        return _empty_class(name)


def _empty_class(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Empty(name, (), {})


@contextmanager
def _torchvision(stub: bool) -> Iterator[None]:
    """Inside, torchvision is a stub, or cannot be found."""
    ours = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "torchvision"}
    for name in ours:
        del sys.modules[name]
    finder = _StubFinder()
    if stub:
        sys.meta_path.insert(0, finder)
    else:
        sys.modules["torchvision"] = None  # "cannot be found", to every way of asking
    try:
        yield
    finally:
        if stub:
            sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules.update(ours)


def package(name: str) -> types.ModuleType:
    """The package, or a skipped test where it is absent."""
    if name in sys.modules:
        return sys.modules[name]
    if name == "lightning" and importlib.util.find_spec("transformers"):
        package("transformers")  # which Lightning's metrics import: without the stub
    with _torchvision(stub=name in ("timm", "lightning")):
        found = pytest.importorskip(name, reason=f"{name} is not installed")
        if name == "transformers":
            # remembers the answer, for the parts of itself that it imports on demand
            assert not found.utils.is_torchvision_available()
    return found
