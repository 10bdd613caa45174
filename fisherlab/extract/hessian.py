"""The Hessian's diagonal block of a layer, by products through the graph of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherlab.blocks import Block, Dense
from fisherlab.blocks.numerics import check_dense, symmetrise
from fisherlab.distributed import unwrapped
from fisherlab.extract import criteria
from fisherlab.extract.api import Forward, _check_outputs, _forward, split_batch
from fisherlab.extract.fisher import as_module, divisor
from fisherlab.extract.geometry import CONVOLUTIONS, CaptureError
from fisherlab.extract.isolation import is_half, isolated
from fisherlab.extract.no_gradient import no_gradient_named
from fisherlab.extract.select import Names, check_batch, check_model, chosen, weights_of


class HessianBlock(Block):
    """`H vec(V)`, `H = d^2 L / d vec [W b]^2` of the mean per-example loss `L`; never formed.

    It is symmetric and need not be positive semi-definite. A product costs a backward pass through
    the graph of the gradient, which the block keeps: the weights must stay as they were.

    Args:
        gradients: gradients of `L` for the weight and the bias, with a graph.
        leaves: the weight and, if it has one, the bias.
        scale: `L` over the loss of which the gradients are.
        count: what the mean divides by: examples, or loss terms and their weights.
    """

    def __init__(
        self,
        gradients: tuple[Tensor, ...],
        leaves: tuple[Tensor, ...],
        scale: float = 1.0,
        count: float = 1.0,
    ) -> None:
        self._gradients, self._leaves, self._scale = gradients, leaves, scale
        self.count = count

    @property
    def shape(self) -> tuple[int, int]:
        weight, *bias = self._leaves
        return len(weight), weight[0].numel() + len(bias)

    @property
    def dtype(self) -> torch.dtype:
        return self._leaves[0].dtype

    @property
    def device(self) -> torch.device:
        return self._leaves[0].device

    def __matmul__(self, V: Tensor) -> Tensor:
        flat = V.reshape(-1, *self.shape)
        products = [self._product(v) for v in flat]
        return torch.stack(products).view(V.shape) if products else torch.zeros_like(V)

    def _product(self, v: Tensor) -> Tensor:
        bias = self._leaves[1:]
        parts = [v[:, :-1] if bias else v, *([v[:, -1]] if bias else [])]
        given = [part.reshape(leaf.shape) for part, leaf in zip(parts, self._leaves, strict=True)]
        found = hessian_product(self._gradients, self._leaves, given)
        rows = [found[0].flatten(1), *(b[:, None] for b in found[1:])]
        return self._scale * torch.cat(rows, 1)

    def formed(self) -> Dense:
        """The matrix, by `o i` products.

        Raises:
            BlockTooLarge: it is past the memory budget.
        """
        check_dense(self.size, self.dtype, self.device, type(self).__name__)
        rows = torch.cat([part for _, part in self.rows()])
        return Dense(symmetrise(rows), self.shape)


def hessian_product(
    gradients: Sequence[Tensor], leaves: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`sum_k (d g_k / d leaf) v_k` for each leaf, by one backward pass through the graph of `g`.

    Args:
        gradients: `g`, one per leaf, with their graph, which is kept.
        leaves: the parameters.
        directions: `v`, in the shapes of the leaves.

    Returns:
        One tensor per leaf; zeros where no gradient depends on it.
    """
    pairs = [(g, v) for g, v in zip(gradients, directions, strict=True) if g.requires_grad]
    if not pairs:  # the gradient does not depend on any parameter
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    # checkpointing runs a part of the model once more
    with torch.inference_mode(False), no_gradient_named(CaptureError):
        return torch.autograd.grad(
            [g for g, _ in pairs],
            leaves,
            [v.to(g) for g, v in pairs],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )


def checked(
    model: nn.Module, criterion: Callable[..., Any], x: object, y: Tensor | None
) -> tuple[nn.Module, Callable[..., Any], object, Tensor]:
    """The model without its wrappers, the criterion as a module, the batch and its labels.

    Raises:
        CaptureError: one of them is none.
    """
    criterion = as_module(criterion)
    criteria.reduction_of(criterion)
    model = unwrapped(model)
    batch, labels = split_batch(x, y)
    check_model(model)
    check_batch(batch, labels, model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_half(parameter):
            raise CaptureError(
                f"parameter {name!r} is {parameter.dtype}, in which second derivatives are lost to "
                "rounding; pass model.float()"
            )
    return model, criterion, batch, labels


def loss_gradients(
    model: nn.Module,
    batch: object,
    forward: Forward | None,
    criterion: Callable[..., Any],
    labels: Tensor,
    leaves: Sequence[Tensor],
) -> tuple[tuple[Tensor, ...], float, float]:
    """The gradients of the loss, with their graph.

    Returns:
        The gradients, the mean per-example loss over the loss, and what that mean divides by.
    """
    # the other kernels of torch's attention have no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        outputs = _forward(model, batch, forward)
    outputs = outputs.float() if is_half(outputs) else outputs
    outputs = criteria.arranged(criterion, outputs, labels)
    _check_outputs(outputs, criterion, labels, None)
    rules = criteria.rules_of(criterion) or criteria.Rules()
    loss = rules.call(criterion, outputs, labels)
    with no_gradient_named(CaptureError):
        found = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    if criteria.reduction_of(criterion) == "sum":
        return found, 1 / len(labels), len(labels)
    return found, 1.0, divisor(criterion, outputs, labels)


def check_unwritten(names: Sequence[str]) -> None:
    """Refuse a pass that writes into parameters: products through its graph come afterwards."""
    if names:
        raise CaptureError(
            f"the forward pass writes into the parameters {', '.join(names)}, which are put back "
            "before products through its graph are made; write elsewhere than in forward"
        )


def hessian_blocks(
    model: nn.Module,
    criterion: Callable[..., Any],
    x: object,
    y: Tensor | None = None,
    *,
    layers: Names = None,
    skip: Names = None,
    forward: Forward | None = None,
) -> dict[str, HessianBlock]:
    """`H = d^2 L / d vec [W b]^2` of every linear layer and convolution, `L` the mean of the `l_n`.

    The scale is that of `capture`: for a piecewise linear model without a nonlinear loss it is the
    block of `fisher_type="exact"`. The model comes back as `capture` leaves it.

    Args:
        model: the model, in the mode that `capture` takes.
        criterion: a loss with `reduction` "mean" or "sum".
        x: the batch, as in `capture`.
        y: its labels.
        layers: names or patterns; None: every `nn.Linear` and convolution.
        skip: names or patterns of those to leave out.
        forward: how the model is called, as in `capture`.

    Returns:
        Blocks by name of the layer, the bias as last column. A convolution with groups has one
        block for the whole weight, entries between groups included.

    Raises:
        CaptureError: a layer named in full is no such module, or the batch is none.
    """
    model, criterion, batch, labels = checked(model, criterion, x, y)
    # cached: the weight of a parametrized layer that the pass uses is the one asked for
    with isolated(model, batch, criterion) as isolation, nn.utils.parametrize.cached():
        weights = weights_of(model)
        names, named = chosen(weights, layers, skip)
        owners = {}
        for name in names:
            owner = weights[name]
            if owner.local == "weight" and isinstance(owner.module, (nn.Linear, *CONVOLUTIONS)):
                owners[name] = owner.module
            elif name in named:
                raise CaptureError(
                    f"{name!r} is no weight of a linear layer or a convolution, and the Hessian's "
                    "block is known of these"
                )
        leaves = {name: _leaves(module) for name, module in owners.items()}
        flat = [leaf for parts in leaves.values() for leaf in parts]
        if not flat:
            return {}
        found, *share = loss_gradients(model, batch, forward, criterion, labels, flat)
        check_unwritten(isolation.written())
        gradients = dict(zip(map(id, flat), found, strict=True))
    return {
        name: HessianBlock(tuple(gradients[id(leaf)] for leaf in parts), parts, *share)
        for name, parts in leaves.items()
    }


def _leaves(module: Any) -> tuple[Tensor, ...]:
    bias = module.bias
    return (module.weight,) if bias is None or not bias.requires_grad else (module.weight, bias)


def mean_hessians(
    model: nn.Module,
    criterion: Callable[..., Any],
    batches: Iterable[tuple[object, Tensor]],
    layers: Names,
    skip: Names,
    forward: Forward | None,
    wanted: Mapping[str, tuple[int, int]],
) -> dict[str, Dense]:
    """The formed blocks of the joint mean of several batches, of the layers wanted.

    Raises:
        CaptureError: a layer that is wanted has none.
        BlockTooLarge: one is past the memory budget.
    """
    total: dict[str, Tensor] = {}
    count = 0.0
    for x, y in batches:
        found = hessian_blocks(model, criterion, x, y, layers=layers, skip=skip, forward=forward)
        for name, shape in wanted.items():
            if name not in found or found[name].shape != shape:
                raise CaptureError(
                    f"the Hessian's block of layer {name!r} is not known: it is no linear layer or "
                    "convolution of torch's own; leave it out with skip="
                )
            block = found[name]
            part = block.count * block.formed().matrix
            total[name] = total[name] + part if name in total else part
        count += block.count
    return {name: Dense(matrix / count, wanted[name]) for name, matrix in total.items()}
