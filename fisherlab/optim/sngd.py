"""SNGD's network: layers `x -> f(w' G^{-1/2} x)` with the local Fisher as a parametrization.

`W = w' G^{-1/2}` acts on the weight, not on the patches, so a convolution costs one small product
more. One gradient step on `w'` is one natural-gradient step on `W` for the fixed `G` (Prop. 1).
`fl.optim.create("sngd", model)` takes the same step from the optimizer's side, with the same `nu`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from fisherlab import doors
from fisherlab.blocks.contractions import second_moment
from fisherlab.blocks.reads import Together
from fisherlab.casting import uncasting
from fisherlab.distributed import parallel
from fisherlab.extract.geometry import CONVOLUTIONS, Geometry
from fisherlab.extract.isolation import is_isolated, is_traced
from fisherlab.extract.slopes import Slopes, slopes
from fisherlab.names import unknown
from fisherlab.optim.roots import Roots, by_eigh, denman_beavers, newton_schulz, nystroem
from fisherlab.telling import warn

Activation = Callable[[Tensor], Tensor] | None
VARIANTS = ("mean", "relative")
# Numbers in the matrices of a layer's units above which the relative metric is refused.
UNITS = 50_000_000


class LocalFisher(nn.Module):
    """`[W | b] = [w' | b'] G^{-1/2}`,  `G = nu A + eps I`,  as a parametrization of one layer.

    `A = E[a a^T]` (trailing 1 for the bias) and `nu = E f'(z)` are running means of the training
    passes (`decay`, from I), buffers outside the backward pass; `eps = eps_relative tr(nu A)`. A
    layer that feeds no element-wise function (`without_slope` says so) keeps `G = I`.

    With `units` every unit o has its own `G_o = E[f'(z_o) a a^T]`, and the buffers are
    `[units, i, i]`.
    """

    G: Tensor
    root: Tensor
    inverse: Tensor

    def __init__(
        self,
        module: nn.Module,
        method: str,
        decay: float,
        eps: float,
        rank: int,
        units: int = 0,
        plain: bool = False,
    ) -> None:
        super().__init__()
        # `nu` 1 for every unit: of the first layer in the authors' code
        self.units, self.plain = units, plain
        self.geometry = Geometry.of(module, module.bias is not None)
        self.method, self.decay = method, decay
        self.eps, self.rank = eps, rank
        self.without_slope = ""
        size = self.geometry.in_features + self.geometry.bias
        weight = cast(Tensor, module.weight)
        eye = torch.eye(size, dtype=weight.dtype, device=weight.device)
        eye = eye.expand(units, size, size) if units else eye
        for name in ("G", "root", "inverse"):
            self.register_buffer(name, eye.clone())
        self.handles: list[RemovableHandle] = []

    def observe(self, A: Tensor, nu: float) -> None:
        """Blend one batch's mean of `a a^T` and slope into the running `nu A`."""
        self.G.mul_(self.decay).add_(A, alpha=(1 - self.decay) * nu)

    def roots(self) -> tuple[Tensor, Tensor]:
        """`G^{1/2}` and `G^{-1/2}` of the damped running mean."""
        if not self.units:
            found = self._roots(self.G)
            return found.root, found.inverse
        every = [self._roots(G) for G in self.G]
        return torch.stack([r.root for r in every]), torch.stack([r.inverse for r in every])

    def _roots(self, G: Tensor) -> Roots:
        eps = self.eps * G.trace()
        damped = G + eps * torch.eye(len(G), dtype=G.dtype, device=G.device)
        if self.method == "nystroem":
            return nystroem(damped, self.rank, float(eps))
        methods = {"newton_schulz": newton_schulz, "denman_beavers": denman_beavers}
        return methods.get(self.method, by_eigh)(damped)


def _times(joint: Tensor, M: Tensor) -> Tensor:
    """`joint M`, row by row where every unit has a matrix of its own."""
    return joint @ M if M.ndim == 2 else torch.einsum("oi,oij->oj", joint, M)


class _WeightOf(nn.Module):
    """The weight of a reconstructed layer, from both originals."""

    def __init__(self, fisher: LocalFisher, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.fisher = fisher
        # in a list, so that the bias's original is not registered a second time
        self._bias = [bias]

    def forward(self, weight: Tensor) -> Tensor:
        inverse, bias = self.fisher.inverse, self._bias[0]
        flat = weight.flatten(1)
        if bias is None:
            return _times(flat, inverse).view_as(weight)
        joint = torch.cat([flat, bias[:, None]], 1)
        return _times(joint, inverse[..., :-1]).view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class _BiasOf(nn.Module):
    """The bias of a reconstructed layer, from both originals."""

    def __init__(self, fisher: LocalFisher, weight: nn.Parameter) -> None:
        super().__init__()
        self._fisher, self._weight = [fisher], [weight]

    def forward(self, bias: Tensor) -> Tensor:
        joint = torch.cat([self._weight[0].flatten(1), bias[:, None]], 1)
        return _times(joint, self._fisher[0].inverse[..., -1:])[:, 0]

    def right_inverse(self, bias: Tensor) -> Tensor:
        return bias


def _weight_or(module: nn.Module) -> object:
    weight = module._parameters.get("weight")
    return module if weight is None else weight


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Trainable linear maps and convolutions that are called themselves, by name.

    One weight may serve several linear maps, but not modules of two kinds.
    """
    users: dict[object, list[nn.Module]] = {}
    fused: set[nn.Module] = set()
    for module in model.modules():
        users.setdefault(_weight_or(module), []).append(module)
        if isinstance(module, nn.MultiheadAttention):
            fused.update(module.modules())
    found = {}
    for name, module in model.named_modules():
        kind = isinstance(module, (nn.Linear, *CONVOLUTIONS)) and module not in fused
        if not kind or not cast(nn.Parameter, module.weight).requires_grad:
            continue
        alike = users[_weight_or(module)]
        if len(alike) == 1 or all(isinstance(each, nn.Linear) for each in alike):
            found[name or type(model).__name__.lower()] = module
    return found


def reconstruct(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    method: str = "newton_schulz",
    every: int = 100,
    decay: float = 0.995,
    eps: float = 1e-4,
    rank: int = 128,
    variant: str = "mean",
    activations: Mapping[str, Activation] | None = None,
) -> nn.Module:
    """`w' = W G^{1/2}`: every Linear and Conv becomes a local Fisher layer, in place.     SNGD III.

    Outputs are unchanged, and parameters keep their identity, so an optimizer made before stays
    valid. Grouped convolutions stay as they are.

    `nu` is that of `LayerCapture.activation_slope`, read off each training pass of `model`, which
    is the whole network: its outputs are where `nu` is 1. A layer that feeds no element-wise
    function keeps `G = I`, with a warning.

    Args:
        model: the whole network; it is changed.
        optimizer: after every `every` of its steps `G` is refreshed; None: call `refresh`.
        method: makes the root: "newton_schulz", "denman_beavers", "eigh" or "nystroem".
        every: steps from one refresh to the next.
        decay: weight of the past in the running mean of `nu A`.
        eps: added to the diagonal of `G`, relative to `tr(nu A)`.
        rank: rank for "nystroem".
        variant: "mean" is (12). "relative" gives every unit its own `E[f'(z_o) a a^T]`, as the
            authors' code does: the relative Fisher metric, whose mean over units (12) factors. The
            first layer has `E[a a^T]` there.
        activations: the activation of a layer by its name, with its derivative at the layer's own
            output, in place of the measured `nu`; None stands for 1.

    Returns:
        `model`.

    Raises:
        ValueError: the method, the variant or a layer of `activations` is unknown, a number is out
            of range, the units' matrices of a layer are more than memory is for, or several ranks
            train the model.
    """
    doors.module(model)
    _check_single(model)
    _check_numbers(every, decay, eps, rank)
    doors.choice(method, "method", ("newton_schulz", "denman_beavers", "eigh", "nystroem"))
    doors.choice(variant, "variant", VARIANTS)
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch optimizer, got {doors.said(optimizer)}")
    layers = _layers(model)
    for name in activations or {}:
        if name not in layers:
            raise ValueError(unknown("layer", name, layers))
    units = _units(layers) if variant == "relative" else {}
    for k, (name, module) in enumerate(layers.items()):
        if parametrize.is_parametrized(module) or getattr(module, "groups", 1) > 1:
            continue
        own = units.get(name, 0)
        fisher = LocalFisher(module, method, decay, eps, rank, own, plain=bool(units) and k == 0)
        weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
        parametrize.register_parametrization(module, "weight", _WeightOf(fisher, bias))
        if bias is not None:
            parametrize.register_parametrization(module, "bias", _BiasOf(fisher, weight))
    _Observer(model, activations or {})
    if optimizer is not None:
        count = [0]

        def after_step(
            opt: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[Any, Any]
        ) -> None:
            count[0] += 1
            if count[0] % every == 0:
                refresh(model, opt)

        optimizer.register_step_post_hook(after_step)
    return model


def _check_single(model: nn.Module) -> None:
    if parallel(model):
        raise ValueError(
            "a reconstructed network is not data-parallel: each rank would have a metric of its "
            "own examples; train it in a single process, or take NaturalGradient(model, fl.SNGD())"
        )


def _units(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The units of each layer behind the first; 0 for the first, which has one matrix."""
    found = dict.fromkeys(layers, 0)
    for name, module in list(layers.items())[1:]:
        weight = cast(Tensor, module.weight)
        found[name] = len(weight)
        size = weight[0].numel() + (module.bias is not None)
        if (numbers := len(weight) * size**2) > UNITS:
            raise ValueError(
                f"variant 'relative' has a matrix per unit, {numbers:,} numbers for layer {name!r};"
                f" refused above {UNITS:,}. variant 'mean' has one matrix per layer"
            )
    return found


def _check_numbers(every: int, decay: float, eps: float, rank: int) -> None:
    doors.count(every, "every")
    doors.number(decay, "decay", least=0.0, below=1.0)
    doors.number(eps, "eps", above=0.0)
    doors.count(rank, "rank")


@dataclass
class _Call:
    """One call of a reconstructed layer in a forward pass of the model."""

    moment: Tensor
    rows: int
    edge: GradientEdge
    # the derivative of the activation that the user named, at every element; 1 of a plain layer
    slope: Tensor | None
    # inputs `[n, t, i]`, where every unit has a matrix of its own
    a: Tensor | None


class _Observer:
    """Hooks that blend each training pass of the model into its local Fishers, once per batch."""

    def __init__(self, model: nn.Module, activations: Mapping[str, Activation]) -> None:
        self.activations = dict(activations)
        fishers = local_fishers(model)
        self.layers = {module: (name, fisher) for name, (module, fisher) in fishers.items()}
        self.calls: dict[str, list[_Call]] | None = None
        handles = [
            model.register_forward_pre_hook(self.begin),
            *(m.register_forward_hook(self.remember, with_kwargs=True) for m in self.layers),
            model.register_forward_hook(self.end),
        ]
        for _, fisher in self.layers.values():
            fisher.handles = handles

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        recorded = torch.is_grad_enabled() and not is_isolated() and not is_traced()
        self.calls = {} if recorded else None
        if recorded:
            _check_single(model)

    def remember(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[Any, Any], output: Tensor
    ) -> Tensor | None:
        if self.calls is None or not module.training or not output.requires_grad:
            return None
        name, fisher = self.layers[module]
        with torch.no_grad():
            a = fisher.geometry.inputs((args[0] if args else kwargs["input"]).detach())
            moment, rows = second_moment(a), a.shape[0] * a.shape[1]
        slope = None
        if fisher.plain or name in self.activations:
            activation = None if fisher.plain else self.activations[name]
            slope = _derivative(activation, output.detach())
        call = _Call(moment, rows, get_gradient_edge(output), slope, a if fisher.units else None)
        self.calls.setdefault(name, []).append(call)
        # an in-place operation on a view replaces the view's history, where the slope is read off
        return output.clone() if output._is_view() else None

    @torch.no_grad()
    def end(self, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
        made, self.calls = self.calls or {}, None
        every = [call for calls in made.values() for call in calls if call.slope is None]
        fishers = dict(self.layers.values())
        fields = any(fisher.units for fisher in fishers.values())
        asked = [call.edge for call in every]
        found = slopes(_tensors(output), asked, fields=fields) if every else []
        read = {id(call): each for call, each in zip(every, found, strict=True)}
        left = []
        for name, calls in made.items():
            fisher = fishers[name]
            mine = [read[id(call)] for call in calls if id(call) in read]
            reason = next((each.reason for each in mine if each.reason), "")
            if reason:
                if not fisher.without_slope:
                    fisher.without_slope = f"layer {name!r} has no slope nu: {reason}"
                    left.append(fisher.without_slope)
            elif fisher.units:
                known = [read[id(c)].field if c.slope is None else c.slope for c in calls]
                moments = [
                    _of_units(fisher, cast(Tensor, call.a), cast(Tensor, field))
                    for call, field in zip(calls, known, strict=True)
                ]
                fisher.observe(torch.stack(moments).sum(0) / sum(call.rows for call in calls), 1.0)
            else:
                A = torch.stack([call.moment for call in calls]).sum(0)
                fisher.observe(A / sum(call.rows for call in calls), _nu(calls, mine))
        if left:
            warn(
                "these layers keep G = I, so they take their plain gradients; nu = 1 is "
                f"reconstruct(..., activations={{name: None}}): {'; '.join(left)}"
            )


def _nu(calls: list[_Call], read: list[Slopes]) -> float:
    """The mean slope over all calls, from what the user named or from what was read off."""
    if read:
        total, terms = torch.stack([each.sums.sum(0) for each in read]).sum(0).tolist()
        return total / terms
    nu = sum(call.rows * float(cast(Tensor, call.slope).double().mean()) for call in calls)
    return nu / sum(call.rows for call in calls)


def _of_units(fisher: LocalFisher, a: Tensor, field: Tensor) -> Tensor:
    """`sum f'(z_o) a a^T` over the rows of one call, `[units, i, i]`."""
    # a unit that feeds nothing has no gradient either
    f = fisher.geometry.outputs(field.nan_to_num(nan=1.0)).to(a.dtype)
    return torch.einsum("ro,ri,rj->oij", f.flatten(0, 1), a.flatten(0, 1), a.flatten(0, 1))


def _derivative(activation: Activation, s: Tensor) -> Tensor:
    """`f'(s)` of an activation that the user named, at every element; 1 for None."""
    if activation is None:
        return torch.ones_like(s)
    free = s.detach().clone().requires_grad_()
    with torch.enable_grad():
        # an in-place activation needs a tensor that is no leaf
        (derivative,) = torch.autograd.grad(activation(free.clone()).sum(), free)
    return derivative


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif hasattr(output, "logits"):
        yield from _tensors(output.logits)


def local_fishers(model: nn.Module) -> dict[str, tuple[nn.Module, LocalFisher]]:
    """Each reconstructed layer and its local Fisher, by name."""
    return {
        name: (module, module.parametrizations.weight[0].fisher)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
        and isinstance(module.parametrizations.weight[0], _WeightOf)
    }


@torch.no_grad()
def refresh(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """New `G^{1/2}`: `w' <- W G_new^{1/2}`, and velocities `m' <- m' G_old^{-1/2} G_new^{1/2}`.

    The network's function and the motion of `W` are unchanged. (Alg. 1's step 3 has
    `w' <- G^{-1/2} w`, which contradicts (11); (11) is followed.)

    Args:
        model: a network that `reconstruct` changed.
        optimizer: holds the velocities; None: there are none.
    """
    layers = [pair for pair in local_fishers(model).values() if not pair[1].without_slope]
    for (module, fisher), (root, inverse) in zip(layers, _roots_of(layers), strict=True):
        change = fisher.inverse @ root
        weight, bias = _originals(module)
        _transform(weight, bias, change)
        if optimizer is not None:
            buffers = [
                None if p is None else optimizer.state.get(p, {}).get("momentum_buffer")
                for p in (weight, bias)
            ]
            if buffers[0] is not None:
                _transform(buffers[0], buffers[1], change)
        fisher.root.copy_(root)
        fisher.inverse.copy_(inverse)


def _roots_of(layers: list[tuple[nn.Module, LocalFisher]]) -> list[tuple[Tensor, Tensor]]:
    """The roots of every layer, whose conditions are looked at together if they hold."""
    try:
        with Together():
            return [fisher.roots() for _, fisher in layers]
    except Exception:  # any kind may follow a condition that failed
        return [fisher.roots() for _, fisher in layers]


def _originals(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """`w'` and `b'` of a reconstructed layer."""
    lists: Any = module.parametrizations
    has_bias = parametrize.is_parametrized(module, "bias")
    return lists.weight.original, lists.bias.original if has_bias else None


def _transform(weight: Tensor, bias: Tensor | None, change: Tensor) -> None:
    joint = weight.flatten(1)
    if bias is not None:
        joint = torch.cat([joint, bias[:, None]], 1)
    joint = _times(joint, change)
    if bias is not None:
        bias.copy_(joint[:, -1])
        joint = joint[:, :-1]
    weight.copy_(joint.view_as(weight))


def restore(model: nn.Module) -> nn.Module:
    """`W = w' G^{-1/2}`: the plain network again, with the same outputs and parameter objects.

    Args:
        model: a network that `reconstruct` changed, in place.

    Returns:
        `model`.
    """
    for module, fisher in local_fishers(model).values():
        for handle in fisher.handles:
            handle.remove()
        # the bias first: each is made of both originals
        names = [n for n in ("bias", "weight") if parametrize.is_parametrized(module, n)]
        effective = {name: getattr(module, name).detach().clone() for name in names}
        for name in names:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        with torch.no_grad():
            for name, value in effective.items():
                getattr(module, name).copy_(value)
    return model


class ReconstructedSGD(torch.optim.SGD):
    """`w' <- w' - lr dw'` on the reconstructed network, `G^{1/2}` anew every `every` steps.

    SNGD Alg. 1 as its authors train: running means from the identity, `eps tr(nu A)` as damping,
    `weight_decay` on `w'`; `variant` as in `reconstruct`. It reconstructs the model it is given;
    `restore` makes that plain again.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        every: int = 100,
        decay: float = 0.995,
        eps: float = 1e-4,
        root: str = "eigh",
        rank: int = 128,
        variant: str = "mean",
        criterion: Callable[..., Any] | None = None,
    ) -> None:
        _check_numbers(every, decay, eps, rank)
        self.model = reconstruct(
            model, method=root, decay=decay, eps=eps, rank=rank, variant=variant
        )
        super().__init__(model.parameters(), lr, momentum, weight_decay=weight_decay)
        self.every, self.steps = every, 0

    @torch.no_grad()
    @uncasting
    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """One step on `w'`, then new roots where they are due."""
        loss = super().step(closure)
        self.steps += 1
        if self.steps % self.every == 0:
            refresh(self.model, self)
        return loss

    def due(self) -> tuple[str, ...]:
        """`roots` where the next step ends in new ones."""
        return ("roots",) if (self.steps + 1) % self.every == 0 else ()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.steps = state.pop("steps")
        super().load_state_dict(state)
