"""SNGD's network: layers `x -> f(w' G^{-1/2} x)` with the local Fisher as a parametrization.

`W = w' G^{-1/2}` acts on the weight, not on the patches, so a convolution costs one small product
more. One gradient step on `w'` is one natural-gradient step on `W` for the fixed `G` (Prop. 1).
`fl.optim.create("sngd", model)` takes the same step from the optimizer's side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from fisherlab.blocks.contractions import second_moment
from fisherlab.extract.layer import Geometry
from fisherlab.optim.passes import blocked_layers
from fisherlab.optim.roots import Roots, by_eigh, denman_beavers, newton_schulz, nystroem

ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Softplus)
_LOOKED_THROUGH = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Flatten)


class LocalFisher(nn.Module):
    """`[W | b] = [w' | b'] G^{-1/2}`,  `G = nu A + eps I`,  as a parametrization of one layer.

    `A = E[a a^T]` (trailing 1 for the bias) and `nu = E f'(s)` are running means of the training
    passes (`decay`, from I), buffers outside the backward pass; `eps = eps_relative tr(nu A)`.
    """

    G: Tensor
    root: Tensor
    inverse: Tensor

    def __init__(
        self,
        module: nn.Module,
        activation: Callable[[Tensor], Tensor] | None,
        method: str,
        decay: float,
        eps: float,
        rank: int,
    ) -> None:
        super().__init__()
        self.geometry = Geometry.of(module, module.bias is not None)
        self.activation, self.method, self.decay = activation, method, decay
        self.eps, self.rank = eps, rank
        size = self.geometry.in_features + self.geometry.bias
        weight = cast(Tensor, module.weight)
        eye = torch.eye(size, dtype=weight.dtype, device=weight.device)
        for name in ("G", "root", "inverse"):
            self.register_buffer(name, eye.clone())
        self.handles: list[RemovableHandle] = []

    def observe(self, x: Tensor, s: Tensor) -> None:
        """Blend one batch of inputs and pre-activations into the running `nu A`."""
        a = self.geometry.inputs(x)
        A = second_moment(a) / (a.shape[0] * a.shape[1])
        self.G.mul_(self.decay).add_((1 - self.decay) * self.slope(s) * A)

    def slope(self, s: Tensor) -> Tensor:
        """`nu`, the mean derivative of the activation; 1 for none."""
        if self.activation is None:
            return torch.ones((), dtype=s.dtype, device=s.device)
        free = s.detach().requires_grad_()
        with torch.enable_grad():
            (derivative,) = torch.autograd.grad(self.activation(free).sum(), free)
        return derivative.mean()

    def roots(self) -> Roots:
        """`G^{1/2}` and `G^{-1/2}` of the damped running mean."""
        eps = self.eps * self.G.trace()
        damped = self.G + eps * torch.eye(len(self.G), dtype=self.G.dtype, device=self.G.device)
        if self.method == "nystroem":
            return nystroem(damped, self.rank, float(eps))
        methods = {"newton_schulz": newton_schulz, "denman_beavers": denman_beavers}
        return methods.get(self.method, by_eigh)(damped)


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
            return (flat @ inverse).view_as(weight)
        joint = torch.cat([flat, bias[:, None]], 1)
        return (joint @ inverse[:, :-1]).view_as(weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class _BiasOf(nn.Module):
    """The bias of a reconstructed layer, from both originals."""

    def __init__(self, fisher: LocalFisher, weight: nn.Parameter) -> None:
        super().__init__()
        self._fisher, self._weight = [fisher], [weight]

    def forward(self, bias: Tensor) -> Tensor:
        joint = torch.cat([self._weight[0].flatten(1), bias[:, None]], 1)
        return joint @ self._fisher[0].inverse[:, -1]

    def right_inverse(self, bias: Tensor) -> Tensor:
        return bias


def reconstruct(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    method: str = "newton_schulz",
    every: int = 100,
    decay: float = 0.995,
    eps: float = 1e-4,
    rank: int = 128,
    activations: Mapping[str, Callable[[Tensor], Tensor] | None] | None = None,
) -> nn.Module:
    """Turn every Linear and Conv of `model` into a local Fisher layer, in place.      SNGD III.

    Outputs are unchanged, and parameters keep their identity, so an optimizer made before stays
    valid. With `optimizer` given, `G` is refreshed after every `every` of its steps (else call
    `refresh`). `method`: "newton_schulz", "denman_beavers", "eigh" or "nystroem" (of `rank`).
    `activations` overrides, by layer name, the activation found by module order. Grouped
    convolutions stay as they are.
    """
    if method not in ("newton_schulz", "denman_beavers", "eigh", "nystroem"):
        raise ValueError(f"unknown method {method!r}")
    found = activations_by_order(model) | dict(activations or {})
    for name, module in blocked_layers(model).items():
        if parametrize.is_parametrized(module) or getattr(module, "groups", 1) > 1:
            continue
        fisher = LocalFisher(module, found.get(name), method, decay, eps, rank)
        weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
        parametrize.register_parametrization(module, "weight", _WeightOf(fisher, bias))
        if bias is not None:
            parametrize.register_parametrization(module, "bias", _BiasOf(fisher, weight))
        fisher.handles.append(module.register_forward_hook(_observer(fisher)))
    if optimizer is not None:
        count = [0]

        def after_step(opt: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            count[0] += 1
            if count[0] % every == 0:
                refresh(model, opt)

        optimizer.register_step_post_hook(after_step)
    return model


def _observer(fisher: LocalFisher) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            with torch.no_grad():
                fisher.observe(args[0].detach(), output.detach())

    return hook


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
    """
    for module, fisher in local_fishers(model).values():
        roots = fisher.roots()
        change = fisher.inverse @ roots.root
        weight, bias = _originals(module)
        _transform(weight, bias, change)
        if optimizer is not None:
            buffers = [
                None if p is None else optimizer.state.get(p, {}).get("momentum_buffer")
                for p in (weight, bias)
            ]
            if buffers[0] is not None:
                _transform(buffers[0], buffers[1], change)
        fisher.root.copy_(roots.root)
        fisher.inverse.copy_(roots.inverse)


def _originals(module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None]:
    """`w'` and `b'` of a reconstructed layer."""
    lists: Any = module.parametrizations
    has_bias = parametrize.is_parametrized(module, "bias")
    return lists.weight.original, lists.bias.original if has_bias else None


def _transform(weight: Tensor, bias: Tensor | None, change: Tensor) -> None:
    joint = weight.flatten(1)
    if bias is not None:
        joint = torch.cat([joint, bias[:, None]], 1)
    joint = joint @ change
    if bias is not None:
        bias.copy_(joint[:, -1])
        joint = joint[:, :-1]
    weight.copy_(joint.view_as(weight))


def restore(model: nn.Module) -> nn.Module:
    """The plain network again, with the same outputs and the same parameter objects."""
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


def activations_by_order(model: nn.Module) -> dict[str, Callable[[Tensor], Tensor] | None]:
    """The element-wise activation that follows each layer in order of registration, or None.

    Normalisation layers in between are looked through; any other module ends the search.
    """
    modules = [(n, m) for n, m in model.named_modules() if not list(m.children())]
    found: dict[str, Callable[[Tensor], Tensor] | None] = {}
    for k, (name, module) in enumerate(modules):
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        following = (m for _, m in modules[k + 1 :] if not isinstance(m, _LOOKED_THROUGH))
        after = next(following, None)
        found[name] = after if isinstance(after, ACTIVATIONS) else None
    return found
