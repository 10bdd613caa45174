"""Fisher blocks, slow and dense: autograd for one example, one output and one label at a time.

    F = (1/M) sum_n J_n^T H_n J_n       J_n = d f_n / d vec [W b],  row-major, the bias last column

Written from the formulas alone; nothing here calls FisherLab.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on the seed alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(*layers: nn.Module) -> nn.Sequential:
    """The layers, from what was just drawn for them on, in float64 and evaluation mode."""
    torch.manual_seed(0)
    return nn.Sequential(*layers).double().eval()


@dataclass(eq=False)
class Reference:
    """The blocks of one weight (some of its output `rows`) and, where it has one, its bias."""

    model: nn.Module
    criterion: nn.Module
    x: Tensor
    y: Tensor
    weight: Tensor
    bias: Tensor | None = None
    rows: tuple[int | None, int | None] = (None, None)

    @property
    def examples(self) -> int:
        return len(self.y)

    @cached_property
    def outputs(self) -> Tensor:
        return torch.cat([self.model(x) for x in self.x.split(1)]).detach()

    @cached_property
    def jacobians(self) -> Tensor:
        """`J` `[n, outputs, o i]`."""
        return torch.stack([self._jacobian(x) for x in self.x.split(1)])

    def _jacobian(self, x: Tensor) -> Tensor:
        parameters = [self.weight] if self.bias is None else [self.weight, self.bias]
        rows = []
        for output in self.model(x).flatten():
            parts = torch.autograd.grad(output, parameters, retain_graph=True)
            matrix = torch.cat(
                [part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts], 1
            )
            rows.append(matrix[slice(*self.rows)].flatten())
        return torch.stack(rows)

    @property
    def per_example(self) -> int:
        """`l_n = M L` restricted to example n under a mean, `L` under a sum."""
        return self.examples if self.criterion.reduction == "mean" else 1

    def _loss(self, n: int, output: Tensor) -> Tensor:
        """`l_n` as a function of `f_n`, the outputs of the other examples held fixed."""
        outputs = torch.cat([self.outputs[:n], output[None], self.outputs[n + 1 :]])
        return self.per_example * self.criterion(outputs, self.y)

    def empirical(self) -> Tensor:
        """`H_n = v v^T`, `v = d l_n / d f_n` at the observed labels."""
        return _mean_of_squares(self.gradients())

    def gradients(self) -> Tensor:
        """`d l_n / d vec [W b]` at the observed labels, `[n, o i]`."""
        rows = []
        for n, J in enumerate(self.jacobians):
            free = self.outputs[n].clone().requires_grad_()
            (v,) = torch.autograd.grad(self._loss(n, free), free)
            rows.append(v.flatten() @ J)
        return torch.stack(rows)

    def exact(self) -> Tensor:
        """`H_n`, the Hessian of `l_n` in `f_n`: the Gauss-Newton matrix of the user's loss."""
        blocks = []
        for n, J in enumerate(self.jacobians):
            H = hessian(lambda output, n=n: self._loss(n, output), self.outputs[n])
            blocks.append(J.mT @ H.reshape(len(J), len(J)) @ J)
        return torch.stack(blocks).mean(0)

    def mc(self, draws: list[Tensor]) -> Tensor:
        """`H_n = (c / S) sum_s v_s v_s^T`, `v_s = sum_j d l_nj(y_s) / d f_n`, `c = M / Z`."""
        columns = [row for labels in draws for row in self.scores(labels)]
        return _mean_of_squares(torch.stack(columns)) * self.scale

    def scores(self, labels: Tensor) -> Tensor:
        """`sum_j grad l_nj(y_j)`, un-averaged and without label smoothing, `[n, o i]`."""
        rows = []
        for n, J in enumerate(self.jacobians):
            free = self.outputs[n : n + 1].clone().requires_grad_()
            terms = _terms(self.criterion, free, labels[n : n + 1]) * self.counted[n : n + 1]
            (v,) = torch.autograd.grad(terms.sum(), free)
            rows.append(v.flatten() @ J)
        return torch.stack(rows)

    @property
    def counted(self) -> Tensor:
        """Which terms are in the loss."""
        ignored = getattr(self.criterion, "ignore_index", None)
        return torch.ones_like(self.y) if ignored is None else self.y != ignored

    @property
    def scale(self) -> float:
        """`c = M / Z`: Z the number of terms under a mean, M under a sum."""
        mean = self.criterion.reduction == "mean"
        return self.examples / self.counted.sum().item() if mean else 1.0


def _terms(criterion: nn.Module, outputs: Tensor, labels: Tensor) -> Tensor:
    if isinstance(criterion, nn.CrossEntropyLoss):
        return F.cross_entropy(outputs, labels, reduction="none")
    if isinstance(criterion, nn.MSELoss):
        return (outputs - labels) ** 2
    return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")


def _mean_of_squares(rows: Tensor) -> Tensor:
    return rows.mT @ rows / len(rows)


def relative(found: Tensor, expected: Tensor) -> float:
    """`||found - expected|| / ||expected||`, 0 for two zeros."""
    error = (found - expected).norm().item()
    return error / expected.norm().item() if error else 0.0
