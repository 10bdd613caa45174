"""`SOAP`: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlab import doors
from fisherlab.blocks.basis import Basis, Coordinates, matrix_of
from fisherlab.blocks.energies import carried
from fisherlab.blocks.factor import LARGEST_FACTOR
from fisherlab.blocks.numerics import eigh_each
from fisherlab.casting import uncasting
from fisherlab.optim.plain import check_gradients, check_loaded
from fisherlab.optim.step import evaluated


def _check_group(group: Mapping[str, Any]) -> None:
    """Refuse options that are none; a loop may write into a group between two steps."""
    for name in ("lr", "eps", "weight_decay"):
        doors.number(group.get(name), name, least=0.0)
    betas = group.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"betas are two weights of the past, got {doors.said(betas)}")
    for b in betas:
        doors.number(b, "each of betas", least=0.0, below=1.0)
    doors.count(group.get("basis_every"), "basis_every, which counts steps,")
    doors.count(group.get("largest_factor"), "largest_factor", 0)


def _shapes(_: Mapping[str, Any], p: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that is kept of a parameter with a gradient."""
    return {"step": (), **dict.fromkeys(("exp_avg", "exp_avg_sq"), tuple(matrix(p).shape))}


def _sides(p: Tensor) -> dict[str, tuple[int, ...]]:
    """Those of the factors and eigenvectors of its sides, which large ones lack."""
    o, i = matrix(p).shape
    return {"L": (o, o), "Q_L": (o, o), "R": (i, i), "Q_R": (i, i)}


class SOAP(torch.optim.Optimizer):
    """`W <- (1 - lr w) W - lr Q_L (M' / (sqrt(V) + eps)) Q_R^T`.      Vyas et al. 2024.

        M <- b1 M + (1 - b1) G,   M' = Q_L^T M Q_R,   V <- b2 V + (1 - b2) (Q_L^T G Q_R)^2
        L <- b2 L + (1 - b2) G G^T,   R <- b2 R + (1 - b2) G^T G

    `M` and `V` are divided by `1 - b^t`, as Adam's are. `Q_L` and `Q_R` are the eigenvectors of `L`
    and `R` after the first step and after every `basis_every`-th. The first step, without
    eigenvectors, is Adam's; the authors' code takes none. A parameter of one axis takes Adam's
    step; one of more is the matrix `[o, rest]`. A side of more than `largest_factor` rows has no
    basis.

    The eigenvectors are those of an eigendecomposition, which the paper's power iteration with QR
    tends to. `V` is carried into a new basis by `V <- (Q_L'^T Q_L)^2 V ((Q_R'^T Q_R)^2)^T`,
    entrywise squares, where the paper's stays as it is.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: `(b1, b2)`.
        eps: added to `sqrt(V)`.
        weight_decay: `w`, decoupled as AdamW's.
        basis_every: steps between two bases.
        largest_factor: rows of a side above which it keeps its own coordinates.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        basis_every: int = 10,
        largest_factor: int = LARGEST_FACTOR,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"basis_every": basis_every, "largest_factor": largest_factor}
        _check_group(defaults)
        super().__init__(params, defaults)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; raises `ValueError` for one that is none, of which nothing is loaded."""
        check_loaded(self, state_dict, _check_group, _shapes, _sides)
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, index in zip(ours["params"], theirs["params"], strict=True):
                # torch casts to the dtype of the parameter, which may be half of what is kept
                if p.element_size() < 4 and index in saved:
                    self.state[p] |= {k: v.float().to(p.device) for k, v in saved[index].items()}

    @torch.no_grad()
    @uncasting
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step from the gradients that the last `backward()` left.

        Raises:
            OptimizerError: a gradient has NaN or inf, or is sparse; no parameter was changed.
            ValueError: an option of a group was changed to what is none; no parameter was changed.
        """
        for group in self.param_groups:
            _check_group(group)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = evaluated(closure)
        found = [(p, group) for group in self.param_groups for p in group["params"]]
        found = [(p, group) for p, group in found if p.grad is not None]
        check_gradients("SOAP", [p for p, _ in found], self.state)
        new = [self._factors(p, group) for p, group in found]
        # a decomposition may fail, so it comes before any change
        vectors = _eigenvectors(new)
        for (p, group), factors, turned in zip(found, new, vectors, strict=True):
            self._step(p, group)
            state, like = self.state[p], _gradient(p)
            before = bases(state, like)
            state |= {**factors.sides, **turned}
            if factors.due:
                _carry(state, before, bases(state, like))
        return loss

    def _factors(self, p: Tensor, group: dict[str, Any]) -> _Factors:
        """The factors `L` and `R` after this step, and whether bases are due."""
        state, G, (_, b2) = self.state.get(p, {}), _gradient(p), map(float, group["betas"])
        t = int(state.get("step", 0)) + 1
        if p.ndim < 2:
            return _Factors({}, False)
        sides = {
            name: state.get(name, torch.zeros_like(factor)).lerp(factor, 1 - b2)
            for name, factor in (("L", G @ G.mT), ("R", G.mT @ G))
            if len(factor) <= group["largest_factor"]
        }
        return _Factors(sides, t == 1 or t % group["basis_every"] == 0)

    def _step(self, p: Tensor, group: dict[str, Any]) -> None:
        """Move a parameter and its two moments."""
        state, G, (b1, b2) = self.state[p], _gradient(p), map(float, group["betas"])
        if not state:
            state["step"] = torch.zeros((), device="cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(G), torch.zeros_like(G)
        state["step"] += 1
        t = int(state["step"])
        Q_L, Q_R = bases(state, G)
        M = state["exp_avg"].lerp_(G, 1 - b1)
        rotated = Q_L.mT @ (G @ Q_R)
        V = state["exp_avg_sq"].mul_(b2).addcmul_(rotated, rotated, value=1 - b2)
        size = (V / (1 - b2**t)).sqrt_().add_(float(group["eps"]))
        N = Q_L @ ((Q_L.mT @ (M @ Q_R)) / size) @ Q_R.mT
        lr = float(group["lr"])
        p.mul_(1 - lr * float(group["weight_decay"]))
        p.add_(N.view(p.shape).to(p.dtype), alpha=-lr / (1 - b1**t))


@dataclass(frozen=True)
class _Factors:
    """`L` and `R` of a parameter by name, and whether their bases are due."""

    sides: dict[str, Tensor]
    due: bool


def _gradient(p: Tensor) -> Tensor:
    """The gradient as a matrix, in float32 at least."""
    assert p.grad is not None
    return matrix(p.grad.float() if p.grad.element_size() < 4 else p.grad)


def _eigenvectors(every: list[_Factors]) -> list[dict[str, Tensor]]:
    """`Q_L` and `Q_R` of each parameter whose bases are due."""
    sides = [(k, n) for k, each in enumerate(every) if each.due for n in each.sides]
    factors = [every[k].sides[name] for k, name in sides]
    found: list[dict[str, Tensor]] = [{} for _ in every]
    decomposed = eigh_each(factors, [f"SOAP's {name}" for _, name in sides])
    for (k, name), (_, vectors) in zip(sides, decomposed, strict=True):
        # the largest first, as the authors' order is
        found[k][f"Q_{name}"] = vectors.flip(1)
    return found


def _carry(state: dict[str, Any], old: tuple[Basis, Basis], new: tuple[Basis, Basis]) -> None:
    """`V` in new bases."""
    pair = [dict(zip(("Q_G", "Q_A"), map(matrix_of, each), strict=True)) for each in (old, new)]
    state["exp_avg_sq"] = carried(state["exp_avg_sq"], *pair)


def matrix(tensor: Tensor) -> Tensor:
    """A parameter's tensor as SOAP sees it: `[o, rest]`, or one row."""
    return tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def bases(state: dict[str, Any], like: Tensor) -> tuple[Basis, Basis]:
    """`Q_L` and `Q_R` of a state; a side without one is in its own coordinates."""
    Q_L, Q_R = state.get("Q_L"), state.get("Q_R")
    return (
        Coordinates(like[:, 0]) if Q_L is None else Q_L,
        Coordinates(like[0]) if Q_R is None else Q_R,
    )
