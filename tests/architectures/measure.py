"""What a capture and an optimizer do with an architecture, against plain autograd."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fisherlab as fl
from architectures.table import Problem
from fisherlab.extract.fisher import draw_labels

# Bias columns that a block may have.
MOST_BIASES = 3
# A place is the right one where the distance is less, relative to the block's length.
SURE = 1e-11


def examples(x: Any, k: slice) -> Any:
    """Some examples of a batch."""
    if isinstance(x, dict):
        return {name: examples(value, k) for name, value in x.items()}
    if isinstance(x, tuple):
        return tuple(examples(value, k) for value in x)
    return x[k] if isinstance(x, torch.Tensor) else x


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def output_gradients(problem: Problem) -> Tensor:
    """`dl_n / df` of the per-example losses, `M` times the gradient of a mean criterion."""
    with torch.no_grad():
        outputs = problem.outputs(problem.x)
    outputs.requires_grad_()
    (gradient,) = torch.autograd.grad(problem.criterion(outputs, problem.y), outputs)
    return gradient * (len(outputs) if problem.criterion.reduction == "mean" else 1)


def differentiable(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, and the weights that are computed from some of them.

    Inside `parametrize.cached()`, where such a weight is the same tensor at every access.
    """
    found: dict[str, Tensor] = dict(trainable(model))
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            found |= {f"{name}.{key}": getattr(module, key) for key in module.parametrizations}
    return found


def pulled_back(problem: Problem, x: Any, vectors: Iterable[Tensor]) -> dict[str, Tensor]:
    """`J^T v` `[v, *shape]` of everything differentiable, for some vectors at the outputs."""
    with parametrize.cached():
        outputs = problem.outputs(x)
        leaves = differentiable(problem.model)
        rows = [
            torch.autograd.grad(
                outputs, list(leaves.values()), v, retain_graph=True, allow_unused=True
            )
            for v in vectors
        ]
    found = {}
    for k, (name, leaf) in enumerate(leaves.items()):
        every = [torch.zeros_like(leaf) if row[k] is None else row[k] for row in rows]
        found[name] = torch.stack(every)
    return found


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def per_example(problem: Problem) -> dict[str, Tensor]:
    """`[n, *shape]` of everything differentiable: each example alone through the model."""
    ones = [slice(n, n + 1) for n in range(len(problem.y))]
    vectors = output_gradients(problem)
    return joined([pulled_back(problem, examples(problem.x, k), [vectors[k]]) for k in ones])


def jacobians(problem: Problem) -> tuple[dict[str, Tensor], Tensor]:
    """`J` `[n k, *shape]` of everything differentiable, row by row, and `H` `[n, k, k]`.

    `H` is the Hessian of an example's loss in its k outputs.
    """
    with torch.no_grad():
        whole = problem.outputs(problem.x)
    M, k = len(whole), whole[0].numel()
    scale = M if problem.criterion.reduction == "mean" else 1
    basis = torch.eye(k, dtype=whole.dtype).view(k, 1, *whole.shape[1:])
    rows, hessians = [], []
    for n in range(M):
        rows.append(pulled_back(problem, examples(problem.x, slice(n, n + 1)), basis))

        def loss(f: Tensor, n: int = n) -> Tensor:
            batch = torch.cat([whole[:n], f.view(1, *whole.shape[1:]), whole[n + 1 :]])
            return scale * problem.criterion(batch, problem.y)

        hessians.append(torch.autograd.functional.hessian(loss, whole[n].flatten()))
    return joined(rows), torch.stack(hessians)


@dataclass(frozen=True)
class Part:
    """Some rows of a parameter, and the columns of a captured block that they are.

    Args:
        parameter: its name.
        length: of a row of the parameter as a matrix: all axes but the first, the last one, or 1.
        rows: which rows of that matrix.
        flipped: whether the block holds their transpose.
        columns: which columns of the block.
    """

    parameter: str
    length: int
    rows: slice
    flipped: bool
    columns: slice

    def of(self, stacked: Tensor) -> Tensor:
        """`[n, o, i]` from one tensor `[n, *shape]` per example."""
        matrix = stacked.reshape(len(stacked), -1, self.length)[:, self.rows]
        return matrix.mT if self.flipped else matrix


def weights(D: Tensor, name: str, parameter: Tensor) -> Iterator[Part]:
    """Every place that a parameter `[n, *shape]` or some rows of it may have in a block."""
    o, width = D.shape[1:]
    size = parameter[0].numel()
    for length in (
        {size // parameter.shape[1], parameter.shape[-1], 1} if size and parameter.ndim > 1 else ()
    ):
        rows = size // length
        if 0 <= width - length <= MOST_BIASES and rows % o == 0:
            for start in range(0, rows, o):
                yield Part(name, length, slice(start, start + o), False, slice(0, length))
        if length == o:
            for i in range(max(1, width - MOST_BIASES), width + 1):
                for start in range(0, rows, i) if rows % i == 0 else ():
                    yield Part(name, length, slice(start, start + i), True, slice(0, i))


def biases(D: Tensor, name: str, parameter: Tensor, column: int) -> Iterator[Part]:
    """Every place that a vector `[n, d]` may have in one column of a block."""
    o = D.shape[1]
    if parameter[0].numel() % o == 0:
        for start in range(0, parameter[0].numel(), o):
            yield Part(name, 1, slice(start, start + o), False, slice(column, column + 1))


def located(D: Tensor, truth: dict[str, Tensor], own: list[str]) -> list[Part]:
    """The parameters whose gradients a block `[n, o, w]` has, found by their numbers.

    The weight is one of `own`, the parameters of the module that the block is named after, or
    some rows of it, as it is stored or transposed. Trailing columns are biases, which may belong
    to another module with the same weight.

    Raises:
        AssertionError: no parameter of the module fits the block's shape.
    """

    sure = SURE * float(D.norm())

    def closest(parts: Iterable[Part]) -> Part | None:
        best, least = None, math.inf
        for part in sorted(parts, key=lambda part: part.columns.start - part.columns.stop):
            distance = float((D[:, :, part.columns] - part.of(truth[part.parameter])).norm())
            if distance < least:
                best, least = part, distance
            if distance <= sure:
                break
        return best

    # a bias is no weight where there is a matrix
    matrices = [name for name in own if truth[name].ndim > 2] or own
    weight = closest(part for name in matrices for part in weights(D, name, truth[name]))
    assert weight is not None, f"no parameter among {own} fits a block {tuple(D.shape)}"
    found = [weight]
    others = [name for name in truth if truth[name].ndim == 2 and name not in own]
    for column in range(weight.columns.stop, D.shape[2]):
        used = {part.parameter for part in found}
        names = [name for name in (*own, *others) if name not in used]
        bias = closest(part for name in names for part in biases(D, name, truth[name], column))
        assert bias is not None, f"no vector fits column {column} of a block {tuple(D.shape)}"
        found.append(bias)
    return found


def error(D: Tensor, truth: dict[str, Tensor], parts: list[Part]) -> float:
    """The largest distance of an example's gradient, relative to the largest gradient."""
    expected = torch.cat([part.of(truth[part.parameter]) for part in parts], 2)
    size = expected.flatten(1).norm(dim=1).max()
    distance = (D - expected).flatten(1).norm(dim=1).max()
    return float(distance / size) if size else float(distance)


@dataclass
class Measured:
    """A capture of an architecture, compared with autograd.

    Args:
        parameters: how many numbers are trainable.
        errors: the relative error of every block.
        parts: the parameters that every block holds.
        skipped: every reason, with the layers that were left out for it.
        reported: the share that the capture states.
        refusal: why the capture was refused; "" where it was made.
    """

    parameters: int
    reported: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    covered: int = 0
    skipped: dict[str, list[str]] = field(default_factory=dict)
    refusal: str = ""

    @property
    def share(self) -> float:
        """The share of the trainable parameters that have a block."""
        return self.covered / self.parameters


def own_parameters(model: nn.Module, block: str, names: Iterable[str]) -> list[str]:
    """The parameters that a block may be of: those of its module, or the one it is named after."""
    base = block if block in dict(model.named_modules()) else block.rsplit(":", 1)[0]
    own = [name for name in names if name == base or name.rpartition(".")[0] == base]
    if own:
        return own
    module = model.get_submodule(base)
    ids = {id(p): name for name, p in model.named_parameters()}
    return [ids[id(p)] for p in module.parameters() if id(p) in ids]


def measured(problem: Problem) -> Measured:
    """Captures a problem without any option but `forward`, and compares every block."""
    model = problem.model
    found = Measured(sum(p.numel() for p in trainable(model).values()))
    options = {} if problem.forward is None else {"forward": problem.forward}
    try:
        captures = fl.capture(
            model, problem.criterion, problem.x, problem.y, fisher_type="empirical", **options
        )
    except fl.CaptureError as refusal:
        found.refusal = str(refusal)
        return found
    found.reported = captures.report.share
    for layer, reason in captures.report.skipped.items():
        found.skipped.setdefault(reason, []).append(layer)
    truth = per_example(problem)
    covered = {name: torch.zeros_like(p[0], dtype=torch.bool) for name, p in truth.items()}
    for name, layer in captures.items():
        (D,) = layer.per_example_gradients()
        parts = located(D, truth, own_parameters(model, name, truth))
        found.parts[name] = parts
        found.errors[name] = error(D, truth, parts)
        for part in parts:
            covered[part.parameter].view(-1, part.length)[part.rows] = True
    # the block of a computed weight is none of the parameters that it is computed from
    found.covered = sum(int(covered[name].sum()) for name in trainable(model))
    return found


def exact_errors(problem: Problem, parts: dict[str, list[Part]]) -> dict[str, float]:
    """`|F v - (1/M) sum_n J_n^T H_n J_n v|` of every block, relative, on a random `v`."""
    options = {} if problem.forward is None else {"forward": problem.forward}
    captures = fl.capture(
        problem.model, problem.criterion, problem.x, problem.y, fisher_type="exact", **options
    )
    rows, hessians = jacobians(problem)
    M, k = hessians.shape[:2]
    found = {}
    for name, layer in captures.items():
        D = layer.per_example_gradients().flatten(0, 1)
        J = torch.cat([part.of(rows[part.parameter]) for part in parts[name]], 2)
        v = torch.randn(*D.shape[1:], dtype=D.dtype)
        product = torch.einsum("coi,c->oi", D, torch.einsum("coi,oi->c", D, v)) / M
        slopes = torch.einsum("coi,oi->c", J, v).view(M, k, 1)
        expected = torch.einsum("coi,c->oi", J, (hessians @ slopes).flatten()) / M
        size, distance = expected.norm(), (product - expected).norm()
        found[name] = float(distance / size) if size else float(distance)
    return found


def drawn_errors(problem: Problem, parts: dict[str, list[Part]]) -> dict[str, float]:
    """The error of every block for labels drawn from the model, `sqrt(M / Z)` on each term."""
    options = {} if problem.forward is None else {"forward": problem.forward}
    captures = fl.capture(
        problem.model, problem.criterion, problem.x, problem.y, fisher_type="mc", **options
    )
    with torch.no_grad():
        outputs = problem.outputs(problem.x)
    drawn = draw_labels(problem.criterion, outputs, torch.Generator().manual_seed(0))
    counted = problem.y != problem.criterion.ignore_index
    drawn = torch.where(counted, drawn, problem.y)
    scale = math.sqrt(float(counted.sum()) / len(counted))
    truth = per_example(dataclasses.replace(problem, y=drawn))
    scaled = {name: scale * gradients for name, gradients in truth.items()}
    return {
        name: error(layer.per_example_gradients()[0], scaled, parts[name])
        for name, layer in captures.items()
    }


@dataclass
class Trained:
    """Some steps of an optimizer.

    Args:
        covered: the parameters that it preconditions.
        cosines: of every step and the plain gradient step, on the covered parameters.
        warned: the warnings that it gave.
        refusal: why it was not made or took no step; "" where it did.
    """

    covered: list[str] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    warned: list[str] = field(default_factory=list)
    refusal: str = ""

    @property
    def silent_sgd(self) -> bool:
        """Whether the steps were plain gradient steps and nobody was told."""
        plain = not self.covered or max(self.cosines) >= 0.999
        return plain and not self.warned and not self.refusal


def trained(problem: Problem, optimizer: str, steps: int = 3) -> Trained:
    """Takes some steps in the ordinary loop, without momentum.

    The plain gradient is that of a twin without an optimizer, since `p.grad` may be another one.
    """
    model, twin, found = problem.model, copy.deepcopy(problem.model), Trained()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            opt = fl.optim.create(optimizer, model, criterion=problem.criterion, momentum=0.0)
            for _ in range(steps):
                twin.load_state_dict(model.state_dict())
                plain = plain_gradient(problem, twin)
                moved = step_of(problem, opt, twin)
                found.covered = [name for name in preconditioned(opt, model) if name in plain]
                if found.covered:
                    one = torch.cat([moved[name].flatten() for name in found.covered])
                    other = torch.cat([-plain[name].flatten() for name in found.covered])
                    found.cosines.append(float(torch.cosine_similarity(one, other, dim=0)))
        except (ValueError, RuntimeError) as refusal:
            found.refusal = f"{type(refusal).__name__}: {refusal}"
    found.warned = [str(w.message) for w in caught]
    return found


def step_of(problem: Problem, opt: torch.optim.Optimizer, twin: nn.Module) -> dict[str, Tensor]:
    """The change that one step makes to every parameter, which is what `twin` has at its start."""
    opt.zero_grad()
    problem.criterion(problem.outputs(problem.x), problem.y).backward()
    opt.step()
    before = trainable(twin)
    return {name: (p - before[name]).detach() for name, p in trainable(problem.model).items()}


def step_errors(problem: Problem, optimizer: str) -> dict[str, float]:
    """How far a first step is from `-lr c (F + lambda I)^{-1} g` of plain autograd, per block.

    "fngd" has `lambda = alpha ||U^T U||_F` and `c = lambda`; "exact" has a fixed lambda and c = 1.
    """
    model, twin = problem.model, copy.deepcopy(problem.model)
    truth = per_example(dataclasses.replace(problem, model=twin))
    alpha, fixed = 0.01, 0.1
    options: dict[str, Any] = {"criterion": problem.criterion, "lr": 1.0, "momentum": 0.0}
    if optimizer == "fngd":
        opt = fl.optim.FNGD(model, alpha=alpha, **options)
    else:
        opt = fl.optim.NaturalGradient(model, fl.Exact(), damping=fixed, **options)
    moved = step_of(problem, opt, twin)
    names = {p: name for name, p in trainable(model).items()}
    found = {}
    for key, weight in opt.weights.items():
        if key in opt.left_out:
            continue
        block = [names[p] for p in (weight.weight, weight.bias) if p is not None]
        for group in range(weight.groups):
            columns = joined_group(truth, block, group, weight.groups)
            step = joined_group({n: moved[n][None] for n in block}, block, group, weight.groups)
            K = columns @ columns.mT
            M = len(K)
            damping = float(alpha * K.norm()) if optimizer == "fngd" else fixed
            damped = M * damping * torch.eye(M, dtype=K.dtype) + K
            # a dead unit has no step, whatever its damping
            v = torch.linalg.solve(damped, K.new_ones(M)) if damping else K.new_zeros(M)
            expected = -(damping if optimizer == "fngd" else 1.0) * (v @ columns)
            size = float(expected.norm())
            distance = float((step[0] - expected).norm())
            found[f"{key}:{group}"] = distance / size if size else distance
    return found


def joined_group(stacked: dict[str, Tensor], names: list[str], group: int, groups: int) -> Tensor:
    """`[n, k]`: the rows of one group of some parameters, one below the other."""
    return torch.cat([stacked[name].chunk(groups, 1)[group].flatten(1) for name in names], 1)


def plain_gradient(problem: Problem, twin: nn.Module) -> dict[str, Tensor]:
    """The gradient of the loss by autograd, of the parameters that have one."""
    outputs = dataclasses.replace(problem, model=twin).outputs(problem.x)
    params = trainable(twin)
    loss = problem.criterion(outputs, problem.y)
    gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {n: g for n, g in zip(params, gradients, strict=True) if g is not None}


def preconditioned(opt: Any, model: nn.Module) -> list[str]:
    """The names of the parameters that have a block."""
    known = [w for name, w in opt.weights.items() if name not in opt.left_out]
    blocked = {p for w in known for p in (w.weight, w.bias) if p is not None}
    return [name for name, p in trainable(model).items() if p in blocked]
