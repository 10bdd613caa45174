"""`Muon`: torch's own, with AdamW for what is no matrix, behind one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisherlab import doors
from fisherlab.casting import uncasting
from fisherlab.optim.plain import check_gradients, check_loaded
from fisherlab.optim.step import evaluated

# what a parameter with a gradient keeps in its own shape, by the rule of its group
_KEPT = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


def _check_group(group: Mapping[str, Any]) -> None:
    """Refuse options that are none; a loop may write into a group between two steps."""
    muon = doors.choice(group.get("rule"), "rule", _KEPT) == "muon"
    for name in ("lr", "weight_decay", "eps", *(("momentum",) if muon else ())):
        doors.number(group.get(name), name, least=0.0)
    if not muon:
        betas = group.get("betas")
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas are two weights of the past, got {doors.said(betas)}")
        for b in betas:
            doors.number(b, "each of betas", least=0.0, below=1.0)
        # torch looks at the others as AdamW steps, when Muon has moved its matrices
        for name in ("amsgrad", "maximize", "capturable", "differentiable"):
            doors.flag(group.get(name), name)
        return
    doors.flag(group.get("nesterov"), "nesterov")
    doors.count(group.get("ns_steps"), "ns_steps")
    coefficients = group.get("ns_coefficients")
    if not isinstance(coefficients, tuple | list) or len(coefficients) != 3:
        raise ValueError(f"ns_coefficients are three, got {doors.said(coefficients)}")
    for coefficient in coefficients:
        doors.number(coefficient, "each of ns_coefficients")


def _shapes(group: Mapping[str, Any], p: Tensor) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that is kept of a parameter with a gradient."""
    steps: dict[str, tuple[int, ...]] = {} if group["rule"] == "muon" else {"step": ()}
    return {**steps, **dict.fromkeys(_KEPT[group["rule"]], tuple(p.shape))}


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` of the matrices, `torch.optim.AdamW` of everything else.

    `W <- (1 - lr w) W - lr s NS(B)`,  `B <- mu B + (1 - mu) G`, the Newton-Schulz iteration of the
    Nesterov average: about `(B B^T)^{-1/2} B`.      Jordan 2024; torch's own code takes the step.

    The rule follows torch's documentation. Muon takes parameters of two axes, embeddings aside.
    AdamW takes biases, norms, embeddings, and convolutions' kernels of three axes or more. The
    default `adjust_lr_fn="match_rms_adamw"`, `s = 0.2 sqrt(max(o, i))`, gives both the same `lr`
    and `weight_decay` (Liu et al. 2025). With "original" a matrix wants some twenty times the `lr`
    of AdamW, which `rest` sets: `rest={"lr": 3e-4}`.

    Args:
        model: the model.
        lr: learning rate of both.
        weight_decay: `w` of both.
        params: parameters, or groups of them with options of their own; None: all of the model.
        rest: options of AdamW that differ: `lr`, `betas`, `eps`, `weight_decay`.
        momentum: `mu` of Muon.
        nesterov: whether Muon looks ahead.
        ns_coefficients: the three of the iteration.
        ns_steps: its steps.
        eps: its smallest norm.
        adjust_lr_fn: `s`, "original" or "match_rms_adamw".

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 5e-3,
        weight_decay: float = 0.01,
        params: Iterable[Any] | None = None,
        rest: dict[str, Any] | None = None,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        ns_steps: int = 5,
        eps: float = 1e-7,
        adjust_lr_fn: str | None = "match_rms_adamw",
    ) -> None:
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        muon = {**shared, "momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps}
        muon |= {"ns_coefficients": ns_coefficients, "eps": eps}
        _check_group({**muon, "rule": "muon"})
        muon["adjust_lr_fn"] = adjust_lr_fn
        if rest is not None and not isinstance(rest, dict):
            raise ValueError(f"rest is a dict of AdamW's options, got {doors.said(rest)}")
        doors.module(model)
        every = list(model.parameters() if params is None else params)
        groups = every if every and isinstance(every[0], dict) else [{"params": every}]
        looked_up = {
            id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        }
        matrices, others = [], []
        for group in groups:
            ours = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
            ours = list(ours)
            own = [p for p in ours if p.ndim == 2 and id(p) not in looked_up]
            rows = {id(p) for p in own}
            matrices.append({**group, "params": own, "rule": "muon"})
            left = [p for p in ours if id(p) not in rows]
            others.append({**group, "params": left, "rule": "adamw"})
        self._parts: dict[str, torch.optim.Optimizer] = {}
        for name, kind, found, options in (
            ("muon", torch.optim.Muon, matrices, muon),
            ("adamw", torch.optim.AdamW, others, {**shared, **(rest or {})}),
        ):
            kept = [group for group in found if group["params"]]
            if kept:
                self._parts[name] = kind(kept, **options)
        made = [group for part in self._parts.values() for group in part.param_groups]
        super().__init__(made, {})
        # torch has copied the dicts of the groups; their options are all there
        self._bind()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: torch's own, and torch's two optimizers."""
        return {**super().__getstate__(), "_parts": self._parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; raises `ValueError` for one that is none, of which nothing is loaded."""
        check_loaded(self, state_dict, _check_group, _shapes)
        super().load_state_dict(state_dict)

    def _bind(self) -> None:
        """Give torch's optimizers the groups and the state of this one, loaded ones included."""
        for name, part in self._parts.items():
            part.param_groups = [g for g in self.param_groups if g["rule"] == name]
            part.state = self.state

    @torch.no_grad()
    @uncasting
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One step of both.

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
        every = [p for group in self.param_groups for p in group["params"]]
        check_gradients("Muon", [p for p in every if p.grad is not None], self.state)
        self._bind()
        for part in self._parts.values():
            part.step()
        return loss
