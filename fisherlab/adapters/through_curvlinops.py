"""curvlinops: its KFAC and EKFAC as blocks of ours.

For a mean-reduced loss `B = (1/N) sum_{m,n,s} g g^T` and `A = (1/(N S)) sum a a^T` (expand), or of
means and sums over positions (reduce): the scale of ours. For a sum-reduced loss `B` is `N` times
as large. Weight and bias are apart unless `separate_weight_and_bias=False`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.adapters.library import AdapterError, check_method, library
from fisherlab.adapters.replay import drawn_nothing
from fisherlab.blocks import Block, ColumnSum, Eigen, Kronecker
from fisherlab.extract import LayerCapture

METHODS = ("kfac", "kfac_reduce", "ekfac")


def curvlinops(method: str) -> Callable[[LayerCapture], Block]:
    """A function of a capture whose block curvlinops computes, from the capture's `a` and `g`.

    Its `KFACLinearOperator` or `EKFACLinearOperator` runs on a linear layer that has the inputs and
    output gradients of the capture (`Replay`). Its `B` is then `2/C` times ours, which is undone.

    Args:
        method: "kfac" (expand), "kfac_reduce" or "ekfac".

    Returns:
        A function for `fl.compare(..., approximations={"curvlinops KFAC": ...})`.

    Raises:
        AdapterError: curvlinops is not installed.
        ValueError: the method is unknown.
    """
    check_method(method, METHODS, "curvlinops")
    library("curvlinops")

    def block(layer: LayerCapture) -> Block:
        replay = drawn_nothing(layer)
        operator = _operator(method, replay, [replay.linear.weight], [replay.batch], len(replay.a))
        return _scaled(from_curvlinops(operator)["linear"], replay.columns / 2)

    block.__name__ = f"curvlinops_{method}"
    return block


def _operator(
    method: str, model: nn.Module, params: list[Tensor], data: list[Any], examples: int
) -> Any:
    theirs = library("curvlinops")
    kind = theirs.EKFACLinearOperator if method == "ekfac" else theirs.KFACLinearOperator
    setting = theirs.KFACType.REDUCE if method == "kfac_reduce" else theirs.KFACType.EXPAND
    with _quiet():
        return kind(
            model, nn.MSELoss(), params, data,
            fisher_type=theirs.FisherType.TYPE2, kfac_approx=setting, check_deterministic=False,
            separate_weight_and_bias=False, num_data=examples, num_per_example_loss_terms=1,
            batch_size_fn=lambda batch: len(batch["a"]),
        )  # fmt: skip


def from_curvlinops(operator: Any) -> dict[str, Block]:
    """The blocks of a `KFACLinearOperator` or `EKFACLinearOperator`, by name of the layer.

    `B (x) A` on `[W | b]`, in the scale of ours: per example, whatever the loss's reduction. With
    `separate_weight_and_bias=True` weight and bias are independent parts, `B (x) A` and `B`.

    Args:
        operator: the operator; its factors are computed if they are not yet.

    Returns:
        Blocks by layer, as `fl.compare(approximations={"name": blocks})` takes them.

    Raises:
        AdapterError: curvlinops is not installed, or the operator is another of its operators.
    """
    theirs = library("curvlinops")
    if not isinstance(operator, theirs.KFACLinearOperator):
        raise AdapterError(
            f"from_curvlinops takes a KFACLinearOperator or an EKFACLinearOperator, got a "
            f"{type(operator).__name__}"
        )
    corrected = isinstance(operator, theirs.EKFACLinearOperator)
    state = operator.state_dict()
    key = "corrected_eigenvalues" if corrected else "gradient_covariances"
    if not state[key]:
        with _quiet():
            if corrected:
                operator.compute_eigenvalue_correction()
            else:
                operator.compute_kronecker_factors()
        state = operator.state_dict()
    scale = 1 / state["num_data"] if state["loss_reduction"] == "sum" else 1.0
    make = _eigen if corrected else _kronecker
    found = {name: make(state, name, operator._mapping[name]) for name in state[key]}
    return {name: _scaled(block, scale) for name, block in found.items()}


def _kronecker(state: Mapping[str, Any], name: str, params: Mapping[str, int]) -> Block:
    B, A = state["gradient_covariances"][name], state["input_covariances"].get(name)
    alone = Kronecker(B, B.new_ones(1, 1))
    if A is None:
        return alone
    weight = Kronecker(B, A)
    apart = state["separate_weight_and_bias"] and "bias" in params
    return ColumnSum([weight, alone]) if apart else weight


def _eigen(state: Mapping[str, Any], name: str, params: Mapping[str, int]) -> Block:
    Q_B = state["gradient_covariances_eigenvectors"][name]
    Q_A = state["input_covariances_eigenvectors"].get(name)
    values = state["corrected_eigenvalues"][name]
    if isinstance(values, Tensor):
        return Eigen(Q_B, Q_A, values)
    one = Q_B.new_ones(1, 1)
    parts = {
        leaf: Eigen(Q_B, Q_A, values[at])
        if leaf == "weight"
        else Eigen(Q_B, one, values[at][:, None])
        for leaf, at in params.items()
    }
    ordered = [parts[leaf] for leaf in ("weight", "bias") if leaf in parts]
    return ordered[0] if len(ordered) == 1 else ColumnSum(ordered)


def _scaled(block: Block, scale: float) -> Block:
    if scale == 1:
        return block
    if isinstance(block, ColumnSum):
        return ColumnSum([_scaled(part, scale) for part in block.parts])
    if isinstance(block, Eigen):
        return Eigen(block.Q_G, block.Q_A, scale * block.spectrum)
    assert isinstance(block, Kronecker)
    return Kronecker(scale * block.G, block.A)


def to_curvlinops(blocks: Mapping[str, Kronecker], operator: Any) -> None:
    """Put Kronecker products of ours in place of the factors of a `KFACLinearOperator`.

    `B` becomes ours, times `N` for a sum-reduced loss. The operator treats weight and bias jointly,
    as ours do.

    Args:
        blocks: a product for every layer of the operator, such as `{name: fl.KFAC()(layer)}`.
        operator: the operator, made with `separate_weight_and_bias=False`; it is changed.

    Raises:
        AdapterError: curvlinops is not installed, the operator treats weight and bias apart, or a
            layer or shape differs; the operator is as it was.
    """
    if not isinstance(blocks, Mapping):
        raise AdapterError(f"blocks must be a dict of layer -> block, got {doors.said(blocks)}")
    theirs = library("curvlinops")
    if type(operator) is not theirs.KFACLinearOperator:
        raise AdapterError(f"to_curvlinops takes a KFACLinearOperator, got {type(operator)}")
    state = operator.state_dict()
    if state["separate_weight_and_bias"]:
        raise AdapterError(
            "this operator treats weight and bias apart, and our blocks are of both: make it with "
            "separate_weight_and_bias=False"
        )
    if set(blocks) != set(operator._mapping):
        raise AdapterError(
            f"the blocks are of layers {sorted(blocks)}, the operator is of "
            f"{sorted(operator._mapping)}"
        )
    for name, block in blocks.items():
        if not isinstance(block, Kronecker):
            raise AdapterError(f"the block of layer {name!r} is no Kronecker product: {block!r}")
    scale = state["num_data"] if state["loss_reduction"] == "sum" else 1.0
    new = {
        "input_covariances": {n: block.A.clone() for n, block in blocks.items()},
        "gradient_covariances": {n: scale * block.G for n, block in blocks.items()},
    }
    with warnings.catch_warnings():
        # parameters of the model, which gets them back as they are
        warnings.simplefilter("ignore", UserWarning)
        operator.load_state_dict({**state, **new, **dict.fromkeys(PROPERTIES)})


# numbers that an operator remembers of its factors
PROPERTIES = ("trace", "det", "logdet", "frobenius_norm")


@contextmanager
def _quiet() -> Any:
    """Without the warnings of the library about torch; its draws leave torch's stream alone."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
