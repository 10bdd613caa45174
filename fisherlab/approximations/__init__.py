"""Approximations of a layer's Fisher block: one paper, one file; a class registers itself."""

import importlib
import pkgutil

from fisherlab.approximations import damping
from fisherlab.approximations.base import Approximation, get, names, of_one_batch
from fisherlab.approximations.means import Means
from fisherlab.approximations.memo import Memo
from fisherlab.approximations.running import Running

# Every sibling module is imported, so that a new file is all a new approximation needs.
for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["Approximation", "Means", "Memo", "Running", "damping", "get", "names", "of_one_batch"]
