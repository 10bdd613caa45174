"""ANG: from the natural gradient to SGD's direction along the sphere; and truncated KFAC."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.approximations import Approximation
from fisherlab.blocks.numerics import dot
from fisherlab.blocks.reads import with_next_read
from fisherlab.optim.natural_gradient import NaturalGradient
from fisherlab.optim.options import gathered
from fisherlab.optim.schedule import Schedule

Curve = Callable[[float], float]
Matrices = dict[str, Tensor]

CURVES: dict[str, Curve] = {
    "linear": lambda p: p,
    "concave": lambda p: (1 - math.exp(-5 * p)) / (1 - math.exp(-5)),
    "convex": lambda p: (math.exp(5 * p) - 1) / (math.exp(5) - 1),
}


# How the step gets from one direction to the other: ANG (7), (6), (5).
PATHS = ("sphere", "chord", "sum")


class ANG(NaturalGradient):
    """`W <- W + lr u`, `u` between the natural direction `d = G^{-1} t` and `t = -grad`.

        u = rho (sin((1 - s) Omega) d/|d| + sin(s Omega) t/|t|) / sin Omega,
        rho = |d|,   Omega = arccos(d.t / (|d| |t|)),   s from 0 (natural) to 1 (Euclidean)

    ANG (5)-(7), Alg. 2; linear blending where Omega vanishes, `t` where `d.t < 0`. `s` follows
    `curve` ("linear", "concave", "convex" or a callable of progress in [0, 1]) over `total_steps`.
    An option `schedule` that is no `Schedule` is taken as `curve`, its earlier name. The amplitude
    stays `rho` (`"natural"`, the paper). At s = 1 the step is `(|d|/|t|) t`: SGD with a layer-wise
    factor, kept in `factors`. `"blended"` takes `rho^{1-s} |t|^s`. `scope`: per "layer" (Alg. 2) or
    "global", over all layers together.

    `path` is "sphere", (7); "chord", the linear blend `rho ((1 - s) d/|d| + s t/|t|)` of (6); or
    "sum", `rho (d/|d| + t/|t|)` of the adaptive lambdas (4), (5), at every `s`.

    Args:
        model: the model.
        approximation: makes the natural direction, such as `fl.KFAC()`.
        total_steps: steps over which `s` goes from 0 to 1.
        curve: the course of `s`: "linear", "concave", "convex", or a callable of progress in [0,
            1].
        scope: "layer" or "global".
        amplitude: "natural" or "blended".
        path: "sphere", "chord" or "sum".
        options: further arguments of `NaturalGradient`.
    """

    def __init__(
        self,
        model: nn.Module,
        approximation: Approximation,
        *,
        total_steps: int,
        curve: str | Curve = "concave",
        scope: str = "layer",
        amplitude: str = "natural",
        path: str = "sphere",
        **options: Any,
    ) -> None:
        doors.choice(path, "path", PATHS)
        doors.count(total_steps, "total_steps, the length of the run,")
        options = {"curve": curve, **respelled(options)}
        curve = options.pop("curve")
        if not callable(curve) and not (isinstance(curve, str) and curve in CURVES):
            raise ValueError(
                f"curve must be {', '.join(CURVES)} or a callable, got {doors.said(curve)}; "
                "a `schedule` that is no Schedule is read as `curve`"
            )
        doors.choice(scope, "scope", ("layer", "global"))
        doors.choice(amplitude, "amplitude", ("natural", "blended"))
        super().__init__(model, approximation, **options)
        self.total_steps, self.scope, self.amplitude = total_steps, scope, amplitude
        self.path = path
        self.curve = curve if callable(curve) else CURVES[curve]
        self.factors: dict[str, float] = {}

    @property
    def blend(self) -> float:
        """`s` of the current step: 0 natural, 1 Euclidean."""
        progress = min(1.0, self.steps / max(1, self.total_steps - 1))
        return float(self.curve(progress))

    def combine(
        self, gradients: dict[str, Tensor], directions: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        names = list(directions)
        if self.scope == "layer":
            ours = [directions[name] for name in names]
            theirs = [gradients[name] for name in names]

            def take(norms: list[float]) -> None:
                pairs = zip(norms[: len(names)], norms[len(names) :], strict=True)
                sizes = [rho / max(size, 1e-30) for rho, size in pairs]
                self.factors |= zip(names, sizes, strict=True)

            with_next_read(torch._foreach_norm(ours + theirs), take)
            return self._blended(directions, gradients)
        d = torch.cat([directions[name].flatten() for name in names])
        t = torch.cat([gradients[name].flatten() for name in names])
        (one,) = self._blended({"all": d}, {"all": t}).values()
        pieces = one.split([directions[n].numel() for n in names])
        return {n: piece.view_as(directions[n]) for n, piece in zip(names, pieces, strict=True)}

    def _blended(self, directions: Matrices, gradients: Matrices) -> Matrices:
        pairs = [(d, gradients[name]) for name, d in directions.items()]
        # layers may be on several devices
        device = pairs[0][0].device
        found = torch.stack([products(d, t).to(device) for d, t in pairs])
        shares = shares_of(found, self.blend, self.amplitude, self.path)
        return {
            name: mixed(d, t, share)
            for name, (d, t), share in zip(directions, pairs, shares, strict=True)
        }


def respelled(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the curve under its name, which was `schedule` before."""
    curve = options.get("schedule")
    if curve is None or isinstance(curve, Schedule):
        return options
    return {**{key: value for key, value in options.items() if key != "schedule"}, "curve": curve}


def blended(
    d: Tensor, t: Tensor, s: float, amplitude: str = "natural", path: str = "sphere"
) -> Tensor:
    """The point between `d` and `t` on the sphere, of the length of `d`.      ANG (7).

    On the chord for (6), their sum for (5).
    """
    return mixed(d, t, shares_of(products(d, t), s, amplitude, path))


def products(d: Tensor, t: Tensor) -> Tensor:
    """`<d, d>`, `<t, t>` and `<d, t>`, `[3]` float64."""
    return torch.stack([dot(d, d), dot(t, t), dot(d, t)])


def mixed(d: Tensor, t: Tensor, shares: Tensor) -> Tensor:
    """`a d + b t` of the shares `a`, `b`, `[2]`."""
    wide = torch.promote_types(d.dtype, torch.float32)
    of_d, of_t = shares.to(d.device, wide).unbind()
    return torch.add(of_d * d.to(wide), of_t * t.to(wide)).to(d.dtype)


def shares_of(products: Tensor, s: float, amplitude: str, path: str) -> Tensor:
    """The shares of `d` and of `t` in the step.

    Args:
        products: `<d, d>`, `<t, t>` and `<d, t>`, `[..., 3]`; the host reads none of them.
        s: from 0, natural, to 1, Euclidean.
        amplitude: "natural" or "blended".
        path: "sphere", "chord" or "sum".

    Returns:
        `[..., 2]`.
    """
    dd, tt, dt = products.unbind(-1)
    rho, size = dd.sqrt(), tt.sqrt()
    parts = (1.0, 1.0) if path == "sum" else (1 - s, s)
    toward = torch.stack([torch.full_like(rho, part) for part in parts], -1)
    if path == "sphere":
        omega = (dt / (rho * size)).clamp(max=1).acos()[..., None]
        toward = torch.where(omega >= 1e-4, (toward * omega).sin() / omega.sin(), toward)
    length = rho if amplitude == "natural" else rho ** (1 - s) * size**s
    shares = toward * (length[..., None] / torch.stack([rho, size], -1))
    alone = torch.eye(2, dtype=products.dtype, device=products.device)
    shares = torch.where((dt < 0)[..., None], alone[1], shares)
    return torch.where(((dd == 0) | (tt == 0))[..., None], alone[0], shares)


class TruncatedNaturalGradient(NaturalGradient):
    """The natural gradient until `switch_step`, then SGD with a fresh momentum buffer.    ANG 3.1.

    The paper states neither learning rate nor buffer after the switch: the schedule goes on and
    the buffer, whose velocity has another scale, is emptied.

    Args:
        model: the model.
        approximation: an instance such as `fl.KFAC()`.
        switch_step: the step from which it is SGD.
        options: further arguments of `NaturalGradient`.
    """

    def __init__(
        self, model: nn.Module, approximation: Approximation, *, switch_step: int, **options: Any
    ) -> None:
        until = doors.count(switch_step, "switch_step")
        options = gathered({**self.parts, **options})
        options["schedule"] = replace(options["schedule"], until=until)
        super().__init__(model, approximation, **options)

    def _directions(self) -> dict[nn.Parameter, Tensor]:
        if self.steps == self.preconditioner.schedule.until:
            for state in self.state.values():
                state.pop("momentum_buffer", None)
        return super()._directions()
