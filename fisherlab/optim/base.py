"""The base of every curvature optimizer: parameter groups, a step along directions, a state."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.casting import uncasting
from fisherlab.distributed import Ranks, answering, unwrapped
from fisherlab.extract.geometry import Geometry
from fisherlab.extract.select import Names
from fisherlab.optim.alike import Agreement, check_alike, groups_of, options_of
from fisherlab.optim.attempt import Attempt, Kept, calling
from fisherlab.optim.coverage import Coverage, Covered, check_nonfinite
from fisherlab.optim.options import FLAT, gathered
from fisherlab.optim.state import (
    FORMAT,
    check_form,
    check_params,
    check_state,
    sealed,
    state_of,
)
from fisherlab.optim.step import (
    DECAY_PLACEMENTS,
    UNCLIPPED,
    Clip,
    Directions,
    check_group,
    evaluated,
    group_options,
    placed_before,
    predicted_kl,
    take_step,
)


def check_module(model: object) -> None:
    """Refuse what is no model, such as its parameters."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"a curvature optimizer takes the model, got {type(model).__name__}; a subset of its "
            "parameters goes into params="
        )


class CurvatureOptimizer(Covered, torch.optim.Optimizer, ABC):
    """Momentum, weight decay and learning rate per parameter group, after preconditioning.

    A subclass returns the directions of the layers that have a block; every other parameter takes
    its plain gradient. With the preconditioner `P` and `weight_decay` `w`, the direction is

        P g + w W      weight_decay_placement="after"
        P (g + w W)    "before", or "loss": an L2 term `w/2 |W|^2` of the loss has this gradient

    With `decoupled` the weights shrink by `1 - lr w` instead, as AdamW's do. "before" is the
    gradient wherever a gradient is meant: in Shampoo's statistics, ANG's blend and `Clip`.
    `clipped` counts the steps that `clip` has shortened.

    With `control` a layer takes `(|d|/|g|) g` in the place of its direction `d`. This is SGD at the
    method's own step lengths, and shows the value of the direction itself.

    A model wrapped in DistributedDataParallel takes the step of the joint batch on every rank, if
    the method is `data_parallel`: its statistics are summed or gathered over the ranks. Batches of
    different sizes are refused, since DDP averages ranks, not examples.

    Args:
        model: the model.
        params: parameters or groups of them; None: all of the model.
        clip: how long a step may be.
        nonfinite: "raise" or "skip" a step whose gradient has NaN or inf.
        layers: names or patterns of the weights that may have a block; None: all trainable ones.
        skip: names or patterns of those that may not.
        control: keep the method's lengths and take the gradient's directions.
        groups: options that the method adds to a group.
        options: options of `group_options`, and fields of `clip` spelled flat.

    Raises:
        ValueError: an option is out of its range, or the method is not data-parallel.
    """

    data_parallel: ClassVar[bool] = False

    # the placements that a method can take
    decay_placements: ClassVar[tuple[str, ...]] = DECAY_PLACEMENTS

    # functions whose options the constructors pass on, and parts that take flat ones
    takers: ClassVar[tuple[Callable[..., Any], ...]] = (group_options,)
    parts: ClassVar[dict[str, Any]] = {"clip": UNCLIPPED}

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None,
        *,
        clip: Clip = UNCLIPPED,
        nonfinite: str = "raise",
        layers: Names = None,
        skip: Names = None,
        control: bool = False,
        groups: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_module(model)
        options = gathered({"clip": clip, **options})
        clip = options.pop("clip")
        defaults = {**group_options(**options), **(groups or {})}
        check_nonfinite(nonfinite)
        doors.flag(control, "control")
        if params is not None and not isinstance(params, Iterable):
            raise TypeError(
                "params must be parameters, pairs of a name and one, or dicts with 'params'; got "
                f"{doors.said(params)}"
            )
        self.ranks = Ranks.of(model)
        if self.ranks is not None and not self.data_parallel:
            raise ValueError(
                f"{type(self).__name__} is not data-parallel; take NaturalGradient, TENGraD, FNGD "
                "or NGD, or pass the model without DistributedDataParallel in a single process"
            )
        self.model = model = unwrapped(model)
        if self.ranks is not None:
            self.ranks.meet()
            self.ranks.check_model(model, buffers=False)  # DDP spreads those of rank 0
            check_alike(self.ranks, {"the class": type(self).__name__})
        self._agreement = Agreement()
        super().__init__(model.parameters() if params is None else params, defaults)
        self.clip, self.nonfinite, self.control = clip, nonfinite, control
        self.steps = self.clipped = 0
        self._attempt = Attempt()
        self.coverage = Coverage(model, self.param_groups, layers, skip, self.takes)

    @staticmethod
    def takes(geometry: Geometry) -> bool:
        """Whether the method has a block for a product of this geometry."""
        return True

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse a flat option, which nothing would read."""
        if name in FLAT:
            places = ", ".join(f"{part}.{field}" for part, field in FLAT[name].items())
            raise AttributeError(
                f"an optimizer keeps {name} in {places}; set `optimizer.clip`, or the option of a "
                "parameter group"
            )
        super().__setattr__(name, value)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim` does; refuse an option that no group takes."""
        if not isinstance(param_group, Mapping):
            raise TypeError(f"a parameter group is a dict, got {doors.said(param_group)}")
        if "params" not in param_group:
            raise ValueError(f"a parameter group has 'params', got {doors.said(param_group)}")
        options = {**self.defaults, **param_group}
        placement = options["weight_decay_placement"]
        doors.choice(placement, "weight_decay_placement", DECAY_PLACEMENTS)
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
        check_group(options, self.damped)
        super().add_param_group(param_group)
        if "coverage" in vars(self):
            self.coverage.renew(self.model)

    def gradients(self) -> dict[str, Tensor]:
        """The `[weight | bias]` to precondition: `g`, or `g + w W` with the decay placed before."""
        before = [group for group in self.param_groups if placed_before(group)]
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

    def due(self) -> tuple[str, ...]:
        """The extra work of the next step, such as `statistics`: the step's cost depends on it.

        Nothing here: every step is like the others.
        """
        return ()

    @property
    def damped(self) -> bool:
        """Whether every group has a damping."""
        return True

    @torch.no_grad()
    @uncasting
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step from the gradients that the last `backward()` left."""
        with answering(self.ranks, "taking a step"), calling(self._refused):
            return self._step(closure)

    def _step(self, closure: Callable[[], Tensor] | None) -> Tensor | None:
        for group in self.param_groups:
            check_group(group, self.damped)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = evaluated(closure)
        self.coverage.check(self.model)
        self._agreement.check(self.ranks, self._described)
        directions = self._attempt.take(
            lambda: self.coverage.finite(self.nonfinite),
            lambda: self._clipped(self._directions()),
            self._keep if self.ranks is None else None,
        )
        if directions is None:
            self._refused()
            self._discard()
            return loss
        self._apply(directions)
        self._stepped()
        self.steps += 1
        if self.steps == 1:
            self.coverage.warn_of_share()
        return loss

    def _described(self) -> dict[str, str]:
        """The options and the count of steps, in words that all ranks must share."""
        return {**groups_of(self.coverage), **options_of(self)}

    @abstractmethod
    def _directions(self) -> dict[nn.Parameter, Tensor]:
        """The preconditioned gradient of each parameter that has one; changes no parameter."""

    # notes what `_directions` changes, where it can be taken back
    _keep: Callable[[], Kept] | None = None

    def _install(self, hooks: Any) -> None:
        """Keep what has hooks on the model, which may outlive it and is then as it was."""
        self._hooks = hooks
        weakref.finalize(self, hooks.remove)

    def remove(self) -> None:
        """Take the optimizer's hooks off the model."""
        self._hooks.remove()

    def _discard(self) -> None:
        """Forget what a skipped step recorded."""

    def _refused(self) -> None:
        """A step was refused, skipped or interrupted."""

    def _stepped(self) -> None:
        """A step was taken."""
        self.coverage.stepped()

    def _of_gradients(self, directions: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """`(|d|/|g|) g` of each layer that has a direction `d`."""
        found: dict[nn.Parameter, Tensor] = {}
        for name, g in self.gradients().items():
            weight = self.weights[name]
            own = [p for p in (weight.weight, weight.bias) if p is not None and p in directions]
            if own:
                length = torch.stack([directions[p].norm() for p in own]).norm()
                size = g.norm()
                scaled = g * torch.where(size > 0, length / size, torch.zeros_like(size))
                found |= {p: d for p, d in weight.split(scaled).items() if p in directions}
        return {**directions, **found}

    def _clipped(self, directions: dict[nn.Parameter, Tensor]) -> Directions:
        # a parameter whose gradient was taken away does not move
        directions = {p: d for p, d in directions.items() if p.grad is not None}
        if not directions:
            return directions
        if self.control:
            directions = self._of_gradients(directions)
        self.coverage.check_directions(directions)
        factor = self.clip.factor(directions, lambda: self._predicted_kl(directions), self.steps)
        if factor == 1.0:
            return directions
        self.clipped += 1
        scaled = torch._foreach_mul(list(directions.values()), factor)
        return dict(zip(directions, scaled, strict=True))

    def _predicted_kl(self, directions: Directions) -> Tensor:
        return predicted_kl(self.param_groups, directions)

    def _apply(self, directions: Directions) -> None:
        take_step(self.param_groups, self.state, directions)

    def __repr__(self) -> str:
        lines = [super().__repr__(), self.coverage.stated]
        stated = ", ".join(f"{key}={bound:g}" for key, bound in self.clip.bounds.items())
        if stated:
            many = f"{self.clipped} of {self.steps} steps so far were shortened"
            moot = "; one that kl_clip shortens is as long at any larger lr"
            lines.append(f"{stated} ({many}{moot if self.clip.kl is not None else ''})")
        return "\n".join(lines)

    # state --------------------------------------------------------------------------------------

    @property
    def method(self) -> str:
        """The name of the method to which a state belongs."""
        return type(self).__name__

    def _extra_state(self) -> dict[str, Any]:
        """The state of a subclass, as nested dicts of tensors and numbers."""
        return {}

    def _reading(self, extra: dict[str, Any]) -> Callable[[], None]:
        """Check `_extra_state`, and return what takes it over, dtypes included."""
        return lambda: None

    def __getstate__(self) -> Any:
        """Refuse to be copied or pickled: the hooks would stay with the first model."""
        raise TypeError(
            f"{type(self).__name__} has hooks on its model, which no copy would have; copy the "
            "model, make a new optimizer of it, and load this one's state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """torch's own state, and under "fisherlab" what the method remembers."""
        state = super().state_dict()
        # a rule is code, not state: the loading optimizer brings its own
        state["param_groups"] = [
            {key: value for key, value in group.items() if not callable(value)}
            for group in state["param_groups"]
        ]
        counts = {"steps": self.steps, "clipped": self.clipped}
        about = {"format": FORMAT, "method": self.method}
        buffers = {"momentum": state["state"]}
        state["fisherlab"] = sealed({**about, **counts, **self._extra_state(), **buffers})
        # torch keeps them; here they are known by their form
        del state["fisherlab"]["momentum"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state.

        Raises:
            ValueError: it is of another format, method or model; nothing was loaded.
        """
        whole = isinstance(state_dict, Mapping)
        extra = state_dict.get("fisherlab", {}) if whole else state_dict
        if isinstance(extra, Mapping) and "form" in extra:
            extra = {**extra, "momentum": state_dict.get("state")}
        check_state(extra, "optimizer", self.method)
        if missing := sorted({"state", "param_groups"} - state_dict.keys()):
            raise ValueError(f"this state lacks {', '.join(missing)}; nothing was loaded")
        rest = {k: v for k, v in state_dict.items() if k != "fisherlab"}
        theirs = rest["param_groups"]
        if not isinstance(theirs, list) or not all(isinstance(g, Mapping) for g in theirs):
            raise ValueError(
                "this state is damaged: param_groups is a list of dicts, got "
                f"{doors.said(theirs)}; nothing was loaded"
            )
        if len(theirs) != len(self.param_groups):
            raise ValueError(
                f"this state has {len(theirs)} parameter groups, and this optimizer "
                f"{len(self.param_groups)}; nothing was loaded"
            )
        rules = [{k: v for k, v in group.items() if callable(v)} for group in self.param_groups]
        rest["param_groups"] = [{**r, **group} for r, group in zip(rules, theirs, strict=True)]
        for ours, group in zip(self.param_groups, rest["param_groups"], strict=True):
            if missing := sorted(ours.keys() - group.keys()):
                raise ValueError(
                    f"a parameter group of this state lacks {', '.join(missing)}; nothing was "
                    "loaded"
                )
        for group in rest["param_groups"]:
            check_group(group, self.damped)
            check_params(group)
        check_form(extra)
        self._check_momentum(rest)
        take = self._reading(extra)
        super().load_state_dict(rest)
        # torch has put other groups in their place
        self.coverage.groups = self.param_groups
        self.steps, self.clipped = extra["steps"], extra["clipped"]
        take()
        self.coverage.stepped()

    def _check_momentum(self, state: dict[str, Any]) -> None:
        for ours, theirs in zip(self.param_groups, state["param_groups"], strict=True):
            # lengths that differ are torch's to refuse
            for p, index in zip(ours["params"], theirs["params"], strict=False):
                kept = state_of(state["state"], index)
                buffer = kept.get("momentum_buffer")
                if buffer is None:
                    continue
                if not isinstance(buffer, Tensor) or not buffer.is_floating_point():
                    raise ValueError(
                        f"this state is damaged: the momentum of parameter {index} is "
                        f"{doors.said(buffer)}; nothing was loaded"
                    )
                if buffer.shape != p.shape:
                    raise ValueError(
                        f"this state is of another model: parameter {index} has shape "
                        f"{tuple(buffer.shape)} there and {tuple(p.shape)} here"
                    )
