"""What every curvature optimizer shares: layers, groups, checks, the step after preconditioning."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor, nn
from torch.optim.sgd import sgd

from fisherlab.distributed import Ranks, unwrapped
from fisherlab.extract.geometry import Geometry
from fisherlab.extract.select import Names
from fisherlab.optim.coverage import Coverage
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.weight import Weight

DECAY_PLACEMENTS = ("after", "before", "loss")


class Removable(Protocol):
    """Hooks on a model."""

    def remove(self) -> None:
        """Take them off."""


def _remove_all(hooked: list[Removable]) -> None:
    for hooks in hooked:
        hooks.remove()


class CurvatureOptimizer(torch.optim.Optimizer, ABC):
    """Momentum, weight decay and learning rate per parameter group, after preconditioning.

    A subclass returns the directions of the layers that have a block; every other parameter takes
    its plain gradient. With the preconditioner `P` and `weight_decay` `w`, the direction is

        P g + w W      weight_decay_placement="after"
        P (g + w W)    "before", or "loss": an L2 term `w/2 |W|^2` of the loss has this gradient

    With `decoupled` the weights shrink by `1 - lr w` instead, as AdamW's do. "before" is the
    gradient wherever a gradient is meant: in Shampoo's statistics, ANG's blend and `kl_clip`.

    `nonfinite`: "raise" or "skip" a step whose gradient has NaN or inf. `max_norm` clips the norm
    of all directions together. `kl_clip` guards against the step that curvature of few batches
    misjudges: it multiplies the directions by

        min(1, sqrt(r kl_clip / q)),   q = sum lr^2 <direction, gradient>,
        r = min(1, (steps taken + 1) / warmup)

    Where that binds, the step is `sqrt(r kl_clip)` long in the metric of the blocks whatever `lr`
    is: a learning-rate schedule then has no effect. `clipped` counts such steps.

    A model wrapped in DistributedDataParallel takes the step of the joint batch on every rank, if
    the method is `data_parallel`: its statistics are summed or gathered over the ranks. Batches of
    different sizes are refused, since DDP averages ranks, not examples.
    """

    data_parallel: ClassVar[bool] = False

    # those that a method can take
    decay_placements: ClassVar[tuple[str, ...]] = DECAY_PLACEMENTS

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        *,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        weight_decay_placement: str = "after",
        decoupled: bool = False,
        max_norm: float | None = None,
        kl_clip: float | None = None,
        warmup: int = 0,
        nonfinite: str = "raise",
        layers: Names = None,
        skip: Names = None,
        groups: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"a curvature optimizer takes the model, got {type(model).__name__}; a subset of "
                "its parameters goes into params="
            )
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if not isinstance(value, Real | Tensor) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
        if not isinstance(momentum, Tensor) and momentum >= 1:
            raise ValueError(f"momentum must be below 1, where velocity dies out; got {momentum!r}")
        if nesterov and momentum == 0:
            raise ValueError("Nesterov momentum needs momentum > 0")
        if nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite is 'raise' or 'skip', got {nonfinite!r}")
        for name, bound in {"max_norm": max_norm, "kl_clip": kl_clip}.items():
            if bound is not None and not bound > 0:
                raise ValueError(f"{name} must be positive or None, got {bound!r}")
        if int(warmup) != warmup or warmup < 0:
            raise ValueError(f"warmup counts steps and is at least 0, got {warmup!r}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "weight_decay_placement": weight_decay_placement,
            "decoupled": decoupled,
            **(groups or {}),
        }
        self.ranks = Ranks.of(model)
        if self.ranks is not None and not self.data_parallel:
            raise ValueError(
                f"{type(self).__name__} is not data-parallel; take NaturalGradient, TENGraD, FNGD "
                "or NGD, or pass the model without DistributedDataParallel in a single process"
            )
        model = unwrapped(model)
        super().__init__(model.parameters() if params is None else params, defaults)
        self.max_norm, self.kl_clip, self.nonfinite = max_norm, kl_clip, nonfinite
        self.warmup = warmup
        self.steps = 0
        # steps that max_norm or kl_clip has shortened so far
        self.clipped = 0
        self.hooked: list[Removable] = []
        # the model may outlive its optimizer, and is then as it was
        weakref.finalize(self, _remove_all, self.hooked)
        self.model = model
        self.coverage = Coverage(model, self.param_groups, layers, skip, self.takes)

    @staticmethod
    def takes(geometry: Geometry) -> bool:
        """Whether the method has a block for a product of this geometry."""
        return True

    @property
    def weights(self) -> dict[str, Weight]:
        """The matrices that have a block, by name."""
        return self.coverage.weights

    @property
    def left_out(self) -> dict[str, str]:
        """`{name: reason}` of the weights that turned out to have no block."""
        return self.coverage.left_out

    @property
    def covered_share(self) -> float:
        """The share of the trainable parameters of its groups that have a block."""
        return self.coverage.share

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim` does; refuse a decay that cannot be placed."""
        options = {**self.defaults, **param_group}
        placement = options["weight_decay_placement"]
        if placement not in DECAY_PLACEMENTS:
            known = ", ".join(DECAY_PLACEMENTS)
            raise ValueError(f"weight_decay_placement is one of {known}; got {placement!r}")
        if placement not in self.decay_placements:
            raise ValueError(
                f"{type(self).__name__} weighs the gradients of a batch's examples, and a weight "
                f"decay is none of them, so weight_decay_placement={placement!r} is not "
                "possible; pass 'after', or take NaturalGradient(model, fl.Exact(), ...)"
            )
        if options["decoupled"] and placement != "after":
            raise ValueError(
                f"decoupled weight decay is no part of the gradient; leave out "
                f"weight_decay_placement={placement!r}, or decoupled=True"
            )
        super().add_param_group(param_group)

    def gradients(self) -> dict[str, Tensor]:
        """The `[weight | bias]` to precondition: `g`, or `g + w W` with the decay placed before."""
        before = [group for group in self.param_groups if _placed_before(group)]
        decays = {p: float(group["weight_decay"]) for group in before for p in group["params"]}
        found = {}
        for name, weight in self.weights.items():
            gradient = weight.gradient()
            if gradient is None:
                continue
            params = [p for p in (weight.weight, weight.bias) if p is not None]
            if any(decays.get(p, 0.0) for p in params):
                gradient = gradient + weight.joined({p: decays.get(p, 0.0) * p for p in params})
            found[name] = gradient
        return found

    def option(self, weight: Weight, name: str) -> Any:
        """An option of the group that the layer's weight is in."""
        return self.param_groups[weight.group][name]

    def due(self) -> tuple[str, ...]:
        """What the next step does beyond every step, such as `statistics`: its cost depends on it.

        Nothing here: every step is like the others.
        """
        return ()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step from the gradients that the last `backward()` left."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.coverage.check(self.model)
        if not self.coverage.finite(self.nonfinite):
            self._discard()
            return loss
        directions = self._directions()
        self._apply(self._clipped(directions))
        self.steps += 1
        if self.steps == 1:
            self.coverage.warn_of_share(stacklevel=4)
        return loss

    @abstractmethod
    def _directions(self) -> dict[nn.Parameter, Tensor]:
        """The preconditioned gradient of each parameter that has one; changes no parameter."""

    def remove(self) -> None:
        """Take the optimizer's hooks off the model."""
        for hooks in self.hooked:
            hooks.remove()

    def _check_ranks(self, factors: list[float]) -> None:
        """Refuse ranks whose examples DDP weighs differently.

        `factors` turn each pass's `dL/ds` into the gradient of the per-example loss: the number of
        examples for a mean. DDP's `p.grad` is that of the joint batch where they agree.
        """
        if self.ranks is None:
            return
        every = self.ranks.objects(factors)
        for rank, theirs in enumerate(every):
            ours = every[0]
            if len(theirs) != len(ours) or any(
                not math.isclose(a, b, rel_tol=1e-4) for a, b in zip(ours, theirs, strict=True)
            ):
                weights = [[f"1/{factor:.6g}" for factor in side] for side in (ours, theirs)]
                raise OptimizerError(
                    f"the ranks weigh their examples differently (dL/dl_n is "
                    f"{', '.join(weights[0])} on rank 0 and {', '.join(weights[1])} on rank "
                    f"{rank}): DDP averages ranks, not examples, so with "
                    "unequal batches p.grad is not the joint batch's. Give every rank the same "
                    "number of examples (drop_last=True), or scale the loss of each by world_size "
                    "* its examples / all examples; no parameter was changed"
                )

    def _discard(self) -> None:
        """Forget what a skipped step recorded."""

    def _clipped(self, directions: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        if not directions or (self.max_norm is None and self.kl_clip is None):
            return directions
        scale = 1.0
        if self.max_norm is not None:
            norm = torch.stack(torch._foreach_norm(list(directions.values()))).norm().item()
            scale = min(scale, self.max_norm / max(norm, 1e-300))
        if self.kl_clip is not None:
            change = self._predicted_kl(directions)
            bound = self.kl_clip * min(1.0, (self.steps + 1) / max(1, self.warmup))
            scale = min(scale, math.sqrt(bound / max(abs(change), 1e-300)))
        if scale == 1.0:
            return directions
        self.clipped += 1
        scaled = torch._foreach_mul(list(directions.values()), scale)
        return dict(zip(directions, scaled, strict=True))

    def _predicted_kl(self, directions: dict[nn.Parameter, Tensor]) -> float:
        """`sum lr^2 <direction, gradient>`, to second order twice the KL divergence of the step."""
        products = [
            group["lr"] ** 2
            * torch.dot(directions[p].flatten(), _decayed(p, p.grad, group).flatten())
            for group in self.param_groups
            for p in group["params"]
            if p in directions
        ]
        return torch.stack(products).sum().item()

    def _apply(self, directions: dict[nn.Parameter, Tensor]) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            steps = [
                directions[p] if p in directions else _decayed(p, cast(Tensor, p.grad), group)
                for p in params
            ]
            lr, decay = float(group["lr"]), group["weight_decay"]
            if group["decoupled"] and decay:
                torch._foreach_mul_(params, 1 - lr * decay)
            buffers = [self.state[p].get("momentum_buffer") for p in params]
            fused = _laid_out_alike(params, steps, buffers)
            sgd(
                params,
                steps,
                buffers,
                weight_decay=0.0 if group["decoupled"] or _placed_before(group) else decay,
                momentum=group["momentum"],
                lr=lr,
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                foreach=not fused,
                fused=fused,
            )
            if group["momentum"]:
                for p, buffer in zip(params, buffers, strict=True):
                    self.state[p]["momentum_buffer"] = buffer

    # state --------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        bounds = {"max_norm": self.max_norm, "kl_clip": self.kl_clip}
        stated = ", ".join(f"{key}={bound:g}" for key, bound in bounds.items() if bound is not None)
        if not stated:
            return super().__repr__()
        many = f"{self.clipped} of {self.steps} steps so far were shortened"
        moot = (
            ""
            if self.kl_clip is None
            else "; one that kl_clip shortens is as long at any larger lr"
        )
        return f"{super().__repr__()}\n{stated} ({many}{moot})"

    @property
    def method(self) -> str:
        """What a state belongs to."""
        return type(self).__name__

    def _extra_state(self) -> dict[str, Any]:
        """What a subclass remembers, as nested dicts of tensors and numbers."""
        return {}

    def _load_extra_state(self, extra: dict[str, Any]) -> None:
        """Restore `_extra_state`, dtypes included."""

    def state_dict(self) -> dict[str, Any]:
        """torch's own state, and under "fisherlab" what the method remembers."""
        state = super().state_dict()
        # a rule is code, not state: the loading optimizer brings its own
        state["param_groups"] = [
            {key: value for key, value in group.items() if not callable(value)}
            for group in state["param_groups"]
        ]
        counts = {"steps": self.steps, "clipped": self.clipped}
        state["fisherlab"] = {"method": self.method, **counts, **self._extra_state()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; one of another optimizer is refused before anything is changed."""
        if "fisherlab" not in state_dict:
            raise ValueError(
                "this state was not saved by a FisherLab optimizer: no 'fisherlab' key"
            )
        rest = {k: v for k, v in state_dict.items() if k != "fisherlab"}
        extra = dict(state_dict["fisherlab"])
        rest["param_groups"] = [
            {
                "weight_decay_placement": "after",
                **{key: value for key, value in ours.items() if callable(value)},
                **theirs,
            }
            for ours, theirs in zip(self.param_groups, rest["param_groups"], strict=True)
        ]
        if (method := extra.pop("method", self.method)) != self.method:
            raise ValueError(f"this state is of {method}, and this optimizer is {self.method}")
        self._check_momentum(rest)
        super().load_state_dict(rest)
        # torch has put other groups in their place
        self.coverage.groups = self.param_groups
        self.steps, self.clipped = extra.pop("steps"), extra.pop("clipped", 0)
        self._load_extra_state(extra)

    def _check_momentum(self, state: dict[str, Any]) -> None:
        for ours, theirs in zip(self.param_groups, state["param_groups"], strict=True):
            # lengths that differ are torch's to refuse
            for p, index in zip(ours["params"], theirs["params"], strict=False):
                buffer = state["state"].get(index, {}).get("momentum_buffer")
                if buffer is not None and buffer.shape != p.shape:
                    raise ValueError(
                        f"this state is of another model: parameter {index} has shape "
                        f"{tuple(buffer.shape)} there and {tuple(p.shape)} here"
                    )


def _placed_before(group: dict[str, Any]) -> bool:
    return group["weight_decay_placement"] != "after" and not group["decoupled"]


def _decayed(p: Tensor, gradient: Tensor, group: dict[str, Any]) -> Tensor:
    """`g + w W` where the group's weight decay is placed before; else `g`."""
    if not (_placed_before(group) and group["weight_decay"]):
        return gradient
    return gradient.add(p, alpha=float(group["weight_decay"]))


def _laid_out_alike(
    params: list[nn.Parameter], steps: list[Tensor], buffers: list[Tensor | None]
) -> bool:
    """Whether torch's fused SGD, which goes over the bare memory of all three, may be used."""
    known = {buffer is not None for buffer in buffers}
    return len(known) == 1 and all(
        p.dtype == step.dtype
        and p.stride() == step.stride()
        and (buffer is None or buffer.stride() == p.stride())
        for p, step, buffer in zip(params, steps, buffers, strict=True)
    )
