"""Refusals of SOAP and Muon, whose state is kept as torch keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.numerics import all_finite
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.state import check_params, is_finite


def check_gradients(method: str, params: Sequence[Tensor], state: Mapping[Any, Any]) -> None:
    """Refuse gradients with NaN or inf, sparse ones, and parameters that were changed since.

    Args:
        method: the name of the optimizer.
        params: those that have a gradient.
        state: what the optimizer keeps of each.

    Raises:
        OptimizerError: one of them; no parameter was changed.
    """
    gradients = [p.grad for p in params if p.grad is not None]
    for gradient in gradients:
        if gradient.is_sparse:
            raise OptimizerError(
                f"{method} takes dense gradients, and that of a parameter of shape "
                f"{tuple(gradient.shape)} is sparse: make the embedding with sparse=False"
            )
    for p in params:
        kept = state.get(p, {}).get("exp_avg", state.get(p, {}).get("momentum_buffer"))
        widened = torch.float32 if p.element_size() < 4 else p.dtype
        if kept is not None and (kept.numel() != p.numel() or kept.dtype not in (p.dtype, widened)):
            raise OptimizerError(
                f"the model was changed under the optimizer: {method} keeps {doors.said(kept)} of "
                f"a parameter that is {doors.said(p)}; make a new optimizer for the changed model"
            )
    # in one read: a norm is not finite where an entry is not, or where its square overflows
    norms = torch._foreach_norm(gradients) if gradients else ()
    if not norms or all_finite(torch.stack([n.to(norms[0].device).double() for n in norms])):
        return
    for gradient, norm in zip(gradients, norms, strict=True):
        if not bool(norm.isfinite()):
            finite = bool(gradient.isfinite().all())
            what = "entries so large that its norm overflows" if finite else "NaN or inf entries"
            raise OptimizerError(
                f"the gradient of a parameter of shape {tuple(gradient.shape)} has {what}; no "
                "parameter was changed. Lower the learning rate"
            )


def check_loaded(
    optimizer: torch.optim.Optimizer,
    state: Any,
    check_group: Callable[[Mapping[str, Any]], None],
    kept: Callable[[Mapping[str, Any], Tensor], Mapping[str, tuple[int, ...]]],
    sides: Callable[[Tensor], Mapping[str, tuple[int, ...]]] = lambda p: {},
) -> None:
    """Refuse a state that the optimizer cannot go on from, before anything of it is loaded.

    Args:
        optimizer: which would load it.
        state: what `state_dict` returned.
        check_group: refuses the options of a parameter group.
        kept: the shapes of what a parameter of a group keeps, by name.
        sides: those of what it may keep besides.

    Raises:
        ValueError: it is no state, or of another optimizer or model, or has NaN or inf.
    """
    name = type(optimizer).__name__
    if not isinstance(state, Mapping) or not {"state", "param_groups"} <= state.keys():
        raise ValueError(f"a state is the dict that state_dict() returned, got {doors.said(state)}")
    groups, found = state["param_groups"], state["state"]
    if not isinstance(found, Mapping) or not isinstance(groups, list):
        raise ValueError(f"this state of {name} is damaged; nothing was loaded")
    if not is_finite(found):
        raise ValueError(f"this state of {name} holds NaN or inf; nothing was loaded")
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            f"this state has {len(groups)} parameter groups, and this {name} "
            f"{len(optimizer.param_groups)}; nothing was loaded"
        )
    for ours, group in zip(optimizer.param_groups, groups, strict=True):
        if not isinstance(group, Mapping) or (missing := sorted(ours.keys() - group.keys())):
            lacks = ", ".join(missing) if isinstance(group, Mapping) else "its options"
            raise ValueError(f"a group of this state lacks {lacks}; nothing was loaded")
        check_group(group)
        check_params(group)
        if len(group["params"]) != len(ours["params"]):
            raise ValueError(f"this state is of another model than that of {name}")
        for p, index in zip(ours["params"], group["params"], strict=True):
            _check_parameter(name, p, found.get(index, {}), kept(ours, p), sides(p))


def _check_parameter(
    name: str,
    p: Tensor,
    state: Any,
    kept: Mapping[str, tuple[int, ...]],
    sides: Mapping[str, tuple[int, ...]],
) -> None:
    """Refuse what no parameter of this shape keeps; {} is that of one without a step."""
    if not isinstance(state, Mapping) or (state and not kept.keys() <= state.keys()):
        raise ValueError(f"this state is not of {name}, which keeps {', '.join(kept)}")
    least = min(4, p.element_size())
    for key, shape in {**kept, **sides}.items():
        value = state.get(key)
        if key not in state:
            continue
        fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
        if not fits or value.element_size() < least:
            raise ValueError(
                f"this state of {name} has {doors.said(value)} as {key} of a parameter of shape "
                f"{tuple(p.shape)}; nothing was loaded"
            )
