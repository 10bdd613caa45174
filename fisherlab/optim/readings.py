"""The preconditioner of a running optimizer, read off its state as blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab.blocks import Block, ColumnSum, Diagonal, Eigen, Kronecker
from fisherlab.blocks.basis import matrix_of
from fisherlab.blocks.numerics import svd, symmetrise
from fisherlab.optim.base import CurvatureOptimizer
from fisherlab.optim.coverage import Coverage
from fisherlab.optim.muon import Muon
from fisherlab.optim.preconditioner import Preconditioner
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.soap import SOAP, bases
from fisherlab.optim.soap import matrix as soap_matrix
from fisherlab.optim.weight import Weight

Group = dict[str, Any]
State = dict[str, Any]


@dataclass(frozen=True)
class Divisor:
    """`step = -lr P m` of one parameter: `P^{-1}` and what `P^{-2}` estimates, in their own form.

    `root` and `square` are `[...]` of the parameter's shape where they are diagonal, else blocks of
    the parameter as a matrix.
    """

    root: Tensor | Block
    square: Tensor | Block


@dataclass(frozen=True)
class Reading:
    """The blocks of a running optimizer.

    Args:
        blocks: by the name of the reading, the block of each layer.
        formulas: by the same name, the equation, and the scale against `F`.
        missing: layers without a reading, each with its reason.
    """

    blocks: dict[str, dict[str, Block]]
    formulas: dict[str, str]
    missing: dict[str, str]


def _identity(p: Tensor, state: State, group: Group) -> Divisor:
    return Divisor(torch.ones_like(p), torch.ones_like(p))


def _adam(p: Tensor, state: State, group: Group) -> Divisor:
    square = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    square = square / (1 - float(group["betas"][1]) ** float(state["step"]))
    return Divisor(square.sqrt() + group["eps"], square)


def _rmsprop(p: Tensor, state: State, group: Group) -> Divisor:
    square = state["square_avg"].clone()  # a step changes it in place
    if group["centered"]:
        square = square - state["grad_avg"].square()
    return Divisor(square.sqrt() + group["eps"], square)


def _adagrad(p: Tensor, state: State, group: Group) -> Divisor:
    return Divisor(state["sum"].sqrt() + group["eps"], state["sum"].clone())


def _muon(p: Tensor, state: State, group: Group) -> Divisor:
    B = state["momentum_buffer"]
    o, i = B.shape
    # the smaller side, as the Newton-Schulz iteration does;
    # B itself and no square of it, whose root has half of the digits
    U, s, Vh = svd(B, "momentum of Muon")
    Q = U if o <= i else Vh.mT
    root, square = (symmetrise((Q * values) @ Q.mT) for values in (s, s.square()))

    def product(S: Tensor) -> Block:
        ones = B.new_ones(i if o <= i else o)
        return Kronecker(S, ones) if o <= i else Kronecker(ones, S)

    return Divisor(product(root), product(square))


def _rule(p: Tensor, state: State, group: Group) -> Divisor:
    return (_muon if group["rule"] == "muon" else _adam)(p, state, group)


def _soap(p: Tensor, state: State, group: Group) -> Divisor:
    V = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
    if p.ndim < 2:
        V = V.view(p.shape)
        return Divisor(V.sqrt() + group["eps"], V)
    Q_L, Q_R = (matrix_of(Q) for Q in bases(state, soap_matrix(state["exp_avg"])))
    return Divisor(Eigen(Q_L, Q_R, V.sqrt() + group["eps"]), Eigen(Q_L, Q_R, V))


@dataclass(frozen=True)
class Reader:
    """How an optimizer's state is read: of a parameter with a state, and in which words."""

    divisor: Callable[[Tensor, State, Group], Divisor]
    root: str
    square: str


_ADAM = Reader(
    _adam,
    "diag(sqrt(v_hat) + eps), which a step divides by",
    "diag(v_hat): an average of g^2 of the batches' mean gradients, about diag F / batch size of "
    "the empirical Fisher matrix",
)
_IDENTITY = "I: a step is the gradient's, or its average's"
READERS: dict[type[torch.optim.Optimizer], Reader] = {
    torch.optim.SGD: Reader(_identity, _IDENTITY, _IDENTITY),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: _ADAM,
    torch.optim.RMSprop: Reader(
        _rmsprop,
        "diag(sqrt(v) + eps), which a step divides by",
        "diag(v): an average of g^2 of the batches' mean gradients (minus their mean, squared, if "
        "centered), about diag F / batch size of the empirical Fisher matrix",
    ),
    torch.optim.Adagrad: Reader(
        _adagrad,
        "diag(sqrt(s) + eps), which a step divides by",
        "diag(s): the sum of g^2 over all steps, which grows with their number",
    ),
    SOAP: Reader(
        _soap,
        "Q (sqrt(V) + eps) Q^T in the eigenbasis Q of Shampoo's factors; of a bias "
        "diag(sqrt(v_hat) + eps)",
        "Q V Q^T: an average of (Q_L^T G Q_R)^2 of the batches' mean gradients, about "
        "F / batch size of the empirical Fisher matrix",
    ),
    Muon: Reader(
        _rule,
        "(B B^T)^{1/2} (x) I, or I (x) (B^T B)^{1/2} where o > i, of the momentum B; elsewhere "
        "AdamW's diag(sqrt(v_hat) + eps)",
        "B B^T (x) I, or I (x) B^T B, of the momentum B; elsewhere AdamW's diag(v_hat). Parts of "
        "a layer that Muon and AdamW share differ in scale",
    ),
}
READERS[torch.optim.Muon] = Reader(_muon, READERS[Muon].root, READERS[Muon].square)


def read(optimizer: torch.optim.Optimizer | Preconditioner, model: nn.Module) -> Reading:
    """The blocks of a running optimizer, by name of the layer.

    FisherLab's own optimizers give `opt.blocks()`; a step takes their damped inverse, or its root.
    Any other has two readings: "root" is `P^{-1}` of its step `-lr P m`, "square" what `P^{-2}`
    estimates, the second moment that a Fisher block is.

    Raises:
        OptimizerError: the optimizer has no reading, or has taken no step.
    """
    if isinstance(optimizer, Preconditioner | CurvatureOptimizer) and hasattr(optimizer, "blocks"):
        return _own(optimizer)
    reader = next((READERS[kind] for kind in type(optimizer).__mro__ if kind in READERS), None)
    name = type(optimizer).__name__
    if reader is None:
        known = ", ".join(dict.fromkeys(kind.__name__ for kind in READERS))
        raise OptimizerError(
            f"the state of {name} has no reading as blocks; known are {known}, and FisherLab's own "
            "optimizers with blocks(). Enter one in fisherlab.optim.readings.READERS"
        )
    found: dict[str, dict[str, Block]] = {"root": {}, "square": {}}
    missing: dict[str, str] = {}
    coverage = Coverage(model, optimizer.param_groups)
    where = coverage.where()
    for layer, owner in coverage.owners.items():
        if owner.tensor.ndim > 1 and layer not in coverage.weights:
            missing[layer] = (
                "no module of torch's own multiplies it"
                if owner.tensor in where
                else "the optimizer does not have it"
            )
    for layer, weight in coverage.weights.items():
        try:
            parts = _parts(weight, reader, optimizer)
        except LookupError as error:
            missing[layer] = str(error.args[0])
            continue
        for key in found:
            found[key][layer] = _joined(weight, [getattr(part, key) for part in parts])
    if not found["root"]:
        reasons = "; ".join(f"{k}: {v}" for k, v in missing.items())
        raise OptimizerError(
            f"{name} has no state of a matrix yet; take a step first ({reasons or 'no layer'})"
        )
    if reader.root == reader.square:
        return Reading({name: found["root"]}, {name: reader.root}, missing)
    return Reading(
        {f"{name} {key}": blocks for key, blocks in found.items()},
        {f"{name} {key}": getattr(reader, key) for key in found},
        missing,
    )


def _own(optimizer: Any) -> Reading:
    blocks = optimizer.blocks()
    if not blocks:
        raise OptimizerError(f"{type(optimizer).__name__} has no block yet; take a step first")
    approximation = getattr(optimizer, "approximation", None)
    power = getattr(approximation, "exponent", -1.0)
    method = optimizer.method if approximation is not None else type(optimizer).__name__
    formula = f"F~ of opt.blocks(), of whose damped form a step takes the power {power:g}"
    missing = {
        name: "it has no block yet" for name in optimizer.weights if name not in blocks
    } | optimizer.left_out
    return Reading({method: blocks}, {method: formula}, missing)


def _parts(weight: Weight, reader: Reader, optimizer: torch.optim.Optimizer) -> list[Divisor]:
    """The divisors of a weight and of its bias.

    Raises:
        LookupError: one has no state; the message says which.
    """
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    found = []
    for p in (weight.weight, weight.bias):
        if p is None:
            continue
        state = optimizer.state.get(p, {})
        if not state and reader.divisor is not _identity:
            raise LookupError("a parameter has no state: it has taken no step")
        found.append(reader.divisor(p.detach(), state, groups[p]))
    return found


def _joined(weight: Weight, parts: list[Tensor | Block]) -> Block:
    """The block of `[weight | bias]`."""
    if all(isinstance(part, Tensor) for part in parts):
        leaves = (weight.weight, weight.bias)
        ours = [p for p in leaves if p is not None]
        tensors = {p: x for p, x in zip(ours, parts, strict=True) if isinstance(x, Tensor)}
        return Diagonal(weight.joined(tensors))
    if weight.geometry.flipped:
        raise OptimizerError(
            f"layer {weight.name!r} keeps its weight transposed, [i, o], and the state is a matrix "
            "of that; FisherLab reads it for weights [o, i] only: leave it out with skip="
        )
    first, *rest = parts
    block = Diagonal(weight.matrix(first)) if isinstance(first, Tensor) else first
    columns = [Diagonal(x[:, None]) for x in rest if isinstance(x, Tensor)]
    return ColumnSum([block, *columns]) if columns else block
