"""The form of a state: what it says of itself when it is saved, and is checked for when loaded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from torch import Tensor

from fisherlab.doors import is_strided


def form_of(value: object, *, dtypes: bool = False, exact: bool = False) -> str:
    """The form of a nest of dicts and lists in 16 digits: keys, types and shapes.

    Args:
        value: the nest, which may be moved to another device.
        dtypes: with the dtypes of its tensors.
        exact: with the numbers and words outside of tensors.
    """
    return hashlib.sha256(repr(_form(value, dtypes, exact)).encode()).hexdigest()[:16]


def _form(value: object, dtypes: bool, exact: bool) -> object:
    if isinstance(value, Mapping):
        return sorted((repr(key), _form(part, dtypes, exact)) for key, part in value.items())
    if isinstance(value, list | tuple):
        return [_form(part, dtypes, exact) for part in value]
    if isinstance(value, Tensor):
        kind = str(value.dtype) if dtypes else value.is_floating_point()
        return "tensor", tuple(value.shape), kind
    if exact:
        return repr(value)
    return "number" if isinstance(value, int | float) else type(value).__name__


def is_finite(value: object) -> bool:
    """Whether a nest of dicts and lists has no NaN, no inf and no tensor without numbers."""
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_finite, value))
    if isinstance(value, Tensor):
        if not is_strided(value) or (type(value) is Tensor and value.is_meta):
            return False
        return not value.is_floating_point() or bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)
