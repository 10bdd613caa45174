"""The weights of a model that have a block, those that have none, and why."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.approximations.damping import Rule, as_rule, lambdas
from fisherlab.blocks import Block
from fisherlab.blocks.reads import holds
from fisherlab.extract import select
from fisherlab.extract.geometry import Convolution, Geometry
from fisherlab.extract.select import Names, check_initialised, chosen, on_tape, weights_of
from fisherlab.extract.tape import Use
from fisherlab.optim.scale import OptimizerError
from fisherlab.optim.watch import Watch
from fisherlab.optim.weight import Weight
from fisherlab.telling import warn


def any_geometry(geometry: Geometry) -> bool:
    """Take every product."""
    return True


# Each model's optimizers that put weighted gradients into `.grad`; others expect plain ones.
_WEIGHS: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


class Coverage:
    """The matrices that an optimizer preconditions.

    `weights` holds the matrices by name. Weights of modules that torch itself calls are known from
    the start; the first call shows the others, which join by `adopt`. `left_out` holds the weights
    that turned out to have no block, each with its reason.

    Args:
        model: the model.
        groups: parameter groups, as a `torch.optim.Optimizer` has them; read at every call.
        layers: names or patterns of the weights that may have a block; None for all trainable ones.
        skip: names or patterns of those that may not.
        takes: whether the method has a block for a product of a geometry.

    Raises:
        CaptureError: for a name or a pattern that means nothing in this model.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        layers: Names = None,
        skip: Names = None,
        takes: Callable[[Geometry], bool] = any_geometry,
    ) -> None:
        check_initialised(model)
        self.groups, self._takes = groups, takes
        self.asked: dict[str, Names] = {"layers": layers, "skip": skip}
        self.owners = weights_of(model, computed=False)
        self._wanted = _meant(self.owners, layers, skip)
        self.weights: dict[str, Weight] = {}
        self.left_out: dict[str, str] = {}
        self.weighs = _WEIGHS
        # sees the products of the weights
        self.watch: Watch | None = None
        # the shape of each matrix as it was first seen, its dtype at the last step
        self._shapes: dict[str, torch.Size] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        where = self.where()
        for name, owner in self.owners.items():
            known = Weight.known(owner, where) if self._may_have(owner, where) else None
            if known is not None and takes(known.geometry):
                self.weights[name] = known
                self._shapes[name] = known.weight.shape

    @property
    def others(self) -> Mapping[str, set[str]]:
        """Weight -> the functions that use it in another way than by a product."""
        return {} if self.watch is None else self.watch.tape.others

    def renew(self, model: nn.Module) -> None:
        """Know the weights of modules that the model was given since; their calls join them."""
        self.owners = weights_of(model, computed=False)
        self._wanted = _meant(self.owners, *self.asked.values())
        if self.watch is not None:
            self.watch.tape.track(on_tape(self.owners))

    def where(self) -> dict[nn.Parameter, int]:
        """The group that each parameter is in."""
        return {p: k for k, group in enumerate(self.groups) for p in group["params"]}

    def option(self, weight: Weight, name: str) -> Any:
        """An option of the group that a weight is in."""
        return self.groups[weight.group][name]

    def dampings(
        self, blocks: Mapping[str, Block], rule: Callable[[Any], Rule] = as_rule
    ) -> dict[str, float]:
        """The lambda of every block, by the damping of its group, which `rule` makes a rule."""
        found: dict[str, float] = {}
        for k, group in enumerate(self.groups):
            ours = {name: F for name, F in blocks.items() if self.weights[name].group == k}
            if ours:
                found |= lambdas(rule(group["damping"]), ours)
        return found

    def _may_have(self, owner: select.Weight, where: Mapping[Any, int]) -> bool:
        wanted = owner.name in self._wanted and not owner.unfit
        return wanted and owner.tensor in where and owner.tensor.requires_grad

    def adopt(self, use: Use) -> Weight | None:
        """The matrix of a weight that a call shows, if it is to have a block; None otherwise."""
        owner = self.owners.get(use.name)
        if owner is None or use.name in self.weights or use.name not in self._wanted:
            return None
        where = self.where()
        if not self._may_have(owner, where) or not self._takes(use.geometry):
            return None
        weight = Weight.used(owner, use, where)
        if weight is not None:
            self.join(weight)
        return weight

    def join(self, weight: Weight) -> None:
        """Take in a matrix that the constructor did not know."""
        self.weights[weight.name] = weight
        self._shapes[weight.name] = weight.weight.shape

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Leave weights out, each of which is said once."""
        for name, reason in reasons.items():
            if name in self.left_out:
                continue
            self.left_out[name] = reason
            warn(f"layer {name!r} has no block and takes its plain gradient: {reason}")

    def check(self, model: nn.Module) -> None:
        """Refuse layers that are no longer those which the hooks and the blocks belong to.

        And gradients that another optimizer of the model has weighted.
        """
        if self.watch is not None:
            self.watch.settle()
        if any(each.coverage is not self for each in self.weighs.get(model, ())):
            raise OptimizerError(
                "another optimizer of this model (TENGraD, NGD-SMW or FNGD) puts its own step into "
                ".grad at each backward pass: delete it, or call its remove(), zero_grad() and "
                "backward() again; no parameter was changed"
            )
        for name, w in self.weights.items():
            dtype = self._dtypes.get(name, w.weight.dtype)
            now = w.weight.dtype
            if now in (torch.float16, torch.bfloat16):
                raise OptimizerError(
                    f"the weight of layer {name!r} is {now}; curvature in half precision is "
                    "noise: keep the model in float32 and use autocast; no parameter was changed"
                )
            change = ""
            if not w.is_in(model):
                change = "was replaced"
            elif w.weight.shape != self._shapes[name]:
                before, after = tuple(self._shapes[name]), tuple(w.weight.shape)
                change = f"had a weight of shape {before} and now has {after}"
            elif now != dtype:
                change = f"was {dtype} at the last step and now is {now}"
            if change:
                raise OptimizerError(
                    f"the model was changed under the optimizer: layer {name!r} {change}; make a "
                    "new optimizer for the changed model; no parameter was changed"
                )

    def stepped(self) -> None:
        """Note the dtypes that a step was taken in, or that a state was loaded for."""
        self._dtypes |= {name: w.weight.dtype for name, w in self.weights.items()}

    def finite(self, nonfinite: str) -> bool:
        """Whether there are finite gradients.

        Raises:
            OptimizerError: there is none, or one has NaN or inf and `nonfinite` is not "skip".
        """
        gradients = [p.grad for group in self.groups for p in group["params"] if p.grad is not None]
        if not gradients:
            raise OptimizerError("step() found no gradient: call loss.backward() first")
        norms = torch.stack([n.to(gradients[0].device) for n in torch._foreach_norm(gradients)])
        if holds(torch.isfinite(norms).all()):
            return True
        if nonfinite == "skip":
            return False
        names = [
            name
            for name, weight in self.weights.items()
            if weight.weight.grad is not None and not torch.isfinite(weight.weight.grad).all()
        ]
        if not names and all(bool(torch.isfinite(g).all()) for g in gradients):
            raise OptimizerError(
                "the gradient has entries so large that its norm overflows: the training diverged; "
                "no parameter was changed. Lower the learning rate, raise the damping, or pass "
                "nonfinite='skip'"
            )
        where = f"layers {', '.join(names)}" if names else "a parameter without a block"
        raise OptimizerError(
            f"the gradient of {where} has NaN or inf entries; no parameter was changed. Lower the "
            "learning rate, raise the damping, or pass nonfinite='skip'"
        )

    def check_directions(self, directions: Mapping[Any, Tensor]) -> None:
        """Refuse directions with NaN or inf, or so long that a step would write such.

        Args:
            directions: by the name of the matrix, or by parameter.

        Raises:
            OptimizerError: the message names the layers.
        """
        if not directions:
            return
        norms = torch._foreach_norm(list(directions.values()))
        if holds(torch.isfinite(torch.stack([n.to(norms[0].device) for n in norms])).all()):
            return
        layers = {p: name for name, w in self.weights.items() for p in (w.weight, w.bias)}
        wild = [key for key, n in zip(directions, norms, strict=True) if not bool(n.isfinite())]
        names = dict.fromkeys(key if isinstance(key, str) else layers[key] for key in wild)
        raise OptimizerError(
            f"the direction of layers {', '.join(names)} has NaN or inf entries, or overflows, "
            "though the gradient does not; no parameter was changed. Scale the loss, or raise the "
            "damping"
        )

    def described(self) -> dict[str, tuple[dict[str, Any], str | None]]:
        """The geometry of each matrix and the name of its bias, in plain values."""
        names = {id(owner.tensor): name for name, owner in self.owners.items()}
        return {n: (asdict(w.geometry), names.get(id(w.bias))) for n, w in self.weights.items()}

    def check_layers(self, names: Iterable[str]) -> None:
        """Refuse layers whose weight the model lacks, or has in no parameter group.

        Raises:
            ValueError: the message names them.
        """
        where = self.where()
        owners = {name: self.owners.get(name) for name in names}
        if missing := [n for n, owner in owners.items() if not owner or owner.tensor not in where]:
            raise ValueError(f"this state has layers that the model lacks: {missing}")

    def recognised(
        self, described: Mapping[str, tuple[dict[str, Any], str | None]]
    ) -> dict[str, Weight]:
        """The matrices that `described` told, those included that no call has shown here yet.

        Raises:
            ValueError: the model lacks one, or has it in another shape.
        """
        self.check_layers(described)
        where, found = self.where(), {}
        for name, (values, bias) in described.items():
            owner = self.owners[name]
            if bias not in {None, *self.owners}:
                raise ValueError(f"this state has layers that the model lacks: {[name]}")
            windows = {k: Convolution(**v) for k, v in values.items() if isinstance(v, dict)}
            geometry = Geometry(**{**values, **windows})
            p: Any = owner.tensor
            leaf: Any = None if bias is None else self.owners[bias].tensor
            known = Weight(name, owner.module, p, leaf, where[p], geometry, owner.local)
            ours = self.weights.get(name, known)
            if ours.shape != known.shape or known.size != ours.size or known.groups != ours.groups:
                raise ValueError(
                    f"this state is of another model: layer {name!r} has shape {known.shape} there "
                    f"and {ours.shape} here"
                )
            found[name] = ours
        return found

    @property
    def share(self) -> float:
        """The share of the trainable parameters of its groups that have a block."""
        total = sum(p.numel() for p in self.where() if p.requires_grad)
        covered = sum(w.size for name, w in self.weights.items() if name not in self.left_out)
        return covered / total if total else 0.0

    @property
    def plain(self) -> dict[str, str]:
        """`{name: reason}` of the trainable parameters of its groups that have no block.

        A bias goes without saying where the weight of its module has none.
        """
        where = self.where()
        inside = {
            id(tensor)
            for name, w in self.weights.items()
            if name not in self.left_out
            for tensor in (w.weight, w.bias)
        }
        plain = {
            name: owner
            for name, owner in self.owners.items()
            if owner.tensor in where and owner.tensor.requires_grad
            if id(owner.tensor) not in inside
        }
        weights = {id(owner.module) for owner in plain.values() if owner.local == "weight"}
        return {
            name: self._why_plain(name)
            for name, owner in plain.items()
            if owner.local != "bias" or id(owner.module) not in weights
        }

    @property
    def stated(self) -> str:
        """The share with a block, and the first of the others, in one line."""
        plain = list(self.plain)
        if not plain:
            return "100% of its trainable parameters have a block"
        names = ", ".join(plain[:3]) + (f" and {len(plain) - 3} more" if len(plain) > 3 else "")
        # rounded down: 100% is said where nothing is left out
        share = f"{min(int(100 * self.share), 99)}%"
        return f"{share} of its trainable parameters have a block; plain gradient: {names}"

    def warn_of_share(self) -> None:
        """Say that most matrices take their plain gradient, and why, where it is so."""
        where = self.where()
        matrices = [
            owner
            for owner in self.owners.values()
            if owner.tensor.ndim > 1 and self._may_have(owner, where)
            if not isinstance(owner.module, nn.Embedding)
        ]
        total = sum(owner.tensor.numel() for owner in matrices)
        inside = sum(
            w.weight.numel() for name, w in self.weights.items() if name not in self.left_out
        )
        if 2 * inside >= total:
            return
        plain = [o for o in matrices if o.name not in self.weights or o.name in self.left_out]
        reasons = "; ".join(f"{o.name!r}: {self._why_plain(o.name)}" for o in plain[:5])
        more = f"; and {len(plain) - 5} more" if len(plain) > 5 else ""
        warn(
            f"only {inside / total:.0%} of the trainable matrices have a block; the others take "
            f"their plain gradient. {reasons}{more}"
        )

    def _why_plain(self, name: str) -> str:
        if name in self.left_out:
            return self.left_out[name]
        if name not in self._wanted:
            return "not among the layers that were chosen"
        owner = self.owners[name]
        if isinstance(owner.module, nn.Embedding):
            return "it is looked up; the optimizers have blocks of products with a matrix"
        if owner.tensor.ndim < 2:
            return "it is no matrix; the optimizers have blocks of products with a matrix"
        others = self.others.get(name)
        if others:
            return f"it is used by {', '.join(sorted(others))}, not by a product FisherLab knows"
        return "no product with it was seen"


class Covered:
    """An optimizer with a `Coverage`, which it describes."""

    coverage: Coverage

    @property
    def weights(self) -> dict[str, Weight]:
        """The matrices that have a block, by name."""
        return self.coverage.weights

    @property
    def left_out(self) -> dict[str, str]:
        """`{name: reason}` of the trainable parameters that have no block."""
        return self.coverage.plain

    @property
    def covered_share(self) -> float:
        """The share of the trainable parameters of its groups that have a block."""
        return self.coverage.share


def check_nonfinite(nonfinite: str) -> None:
    """Refuse what is neither "raise" nor "skip"."""
    doors.choice(nonfinite, "nonfinite", ("raise", "skip"))


def _meant(owners: Mapping[str, select.Weight], layers: Names, skip: Names) -> set[str]:
    """The names of the weights that may have a block; frozen ones count, if they are not named."""
    if layers is None and skip is None:
        return set(owners)
    names, _ = chosen(owners, layers, skip)
    if layers is None:
        # some weights that are frozen now may be trained later
        return set(names) | {n for n, owner in owners.items() if not owner.tensor.requires_grad}
    return set(names)


def shown(model: nn.Module, coverage: Coverage) -> Watch:
    """A watch of a first forward pass, which shows the matrices that are not yet known.

    Another one is watched where parameters have joined: unfrozen ones, a new group.
    """
    used: dict[str, list[Use]] = {}
    known = -1

    def trained() -> int:
        return sum(p.requires_grad for group in coverage.groups for p in group["params"])

    def due() -> bool:
        return trained() != known

    def record(use: Use, output: Tensor) -> Tensor:
        if due():  # hooks of modules tell every product, in later passes too
            used.setdefault(use.name, []).append(use)
        return output

    def end(output: Tensor | None) -> None:
        nonlocal known
        if watch.returned:  # a pass that broke off shows no more than a part
            known = trained()
            for name, uses in used.items():
                if name not in watch.tape.others and all(use.kind == "map" for use in uses):
                    coverage.adopt(uses[0])
        used.clear()

    watch = Watch(model, coverage.weights, due, lambda: None, record, end)
    coverage.watch = watch
    return watch
