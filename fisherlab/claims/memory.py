"""Outside one batch: fresh examples, averaged statistics and moving bases (TEKFAC)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherlab.approximations import Approximation, Running
from fisherlab.approximations.eigen_corrected import EKFAC, TEKFAC
from fisherlab.approximations.exact import Exact
from fisherlab.claims import dense
from fisherlab.claims.base import EXTENSION, REFUTED, AtMost, Case, Claim, Identity
from fisherlab.claims.instances import captured, layer_case, without_one
from fisherlab.metrics import relative_error

# Examples of the block that stands for the population.
REFERENCE = 256


class _Batches(Claim):
    """Several batches of one layer, and a last one, from which no statistics are taken.

    The paper's theorem is about one batch: what is said of others is ours.
    """

    kind = EXTENSION
    sides = ("corrected", "its factors")
    batches = 1
    reference = REFERENCE
    examples = 6

    def draw(self, generator: torch.Generator, size: float) -> Case:
        n = self.batches * self.examples + self.reference
        case = layer_case(generator, size, examples=(n, n), positions=1)
        return self._split(case)

    def _split(self, case: Case) -> Case:
        rows = [self.examples] * self.batches + [len(case["a"]) - self.batches * self.examples]
        # copies: a view would be saved with all of its storage
        a = [part.clone() for part in case["a"].split(rows)]
        g = [part.clone() for part in case["g"].split(rows, 1)]
        return {"a": a, "g": g}

    def adapt(self, real: Case, generator: torch.Generator) -> Case | None:
        # at least as many examples are left for the reference as for the statistics
        enough = len(real["a"]) >= 2 * self.batches * self.examples
        return self._split(real) if enough else None

    def smaller(self, case: Case) -> Iterator[Case]:
        a, g = case["a"], case["g"]
        for k in range(len(a) - 1 if len(a) > 2 else 0):
            yield {**case, "a": a[:k] + a[k + 1 :], "g": g[:k] + g[k + 1 :]}
        half = len(a[-1]) // 2
        if half >= 8:
            yield {
                **case,
                "a": [*a[:-1], a[-1][:half].clone()],
                "g": [*g[:-1], g[-1][:, :half].clone()],
            }
        for keep in without_one(g[0].shape[3]):
            yield {**case, "g": [part[..., keep] for part in g]}
        for keep in without_one(a[0].shape[2]):
            yield {**case, "a": [part[..., keep] for part in a]}


def parts(case: Case) -> list[Case]:
    """One layer case per batch, the reference last."""
    return [{"a": a, "g": g} for a, g in zip(case["a"], case["g"], strict=True)]


class _OutOfSample(_Batches, AtMost):
    """The error against a block of other examples."""

    expected = REFUTED
    scale = 1.0
    noise = 1e-7
    trials = 24
    corrected: Approximation

    def left(self, case: Case) -> float:
        train, reference = (captured(part) for part in parts(case))
        return relative_error(self.corrected(train), Exact()(reference)).item()


class EkfacOutOfSample(_OutOfSample, name="ekfac_error_at_most_kfac_out_of_sample"):
    """EKFAC's error is at most KFAC's on examples that it has not seen, at small M too."""

    source = "TEKFAC (2.7)"
    latex = (
        r"\|F_{\mathrm{pop}} - F_{\mathrm{EKFAC}}\|_F \le \|F_{\mathrm{pop}} - "
        r"F_{\mathrm{KFAC}}\|_F"
    )
    sides = ("EKFAC", "KFAC")
    corrected = EKFAC()

    def right(self, case: Case) -> float:
        train, reference = parts(case)
        return dense.product_error(reference, *dense.kfac(train))


class TekfacOutOfSample(_OutOfSample, name="tekfac_error_at_most_tkfac_out_of_sample"):
    """TEKFAC's error is at most TKFAC's on examples that it has not seen, at small M too."""

    source = "TEKFAC Theorem 3.1"
    latex = (
        r"\|F_{\mathrm{pop}} - F_{\mathrm{TEKFAC}}\|_F \le \|F_{\mathrm{pop}} - "
        r"F_{\mathrm{TKFAC}}\|_F"
    )
    sides = ("TEKFAC", "TKFAC")
    corrected = TEKFAC()

    def right(self, case: Case) -> float:
        train, reference = parts(case)
        return dense.product_error(reference, *dense.tkfac(train))


class WithMemory(_Batches, AtMost, name="tekfac_error_at_most_tkfac_with_memory"):
    """With averaged statistics TEKFAC's error is at most TKFAC's on the batch at hand."""

    source = "TEKFAC (3.6)-(3.8)"
    latex = r"\|F_k - \bar F_{\mathrm{TEKFAC}}\|_F \le \|F_k - \bar F_{\mathrm{TKFAC}}\|_F"
    expected = REFUTED
    sides = ("averaged TEKFAC", "averaged TKFAC")
    scale = 1.0
    noise = 1e-7
    batches = 6
    reference = 12
    decay = 0.95

    def left(self, case: Case) -> float:
        *past, now = (captured(part) for part in parts(case))
        running = Running(TEKFAC(), self.decay)
        for layer in past:
            running.update(layer)
            running.refresh_basis()
            running.correct(layer)
        return relative_error(running.block(), Exact()(now)).item()

    def right(self, case: Case) -> float:
        *past, now = parts(case)
        return dense.product_error(now, *averaged_tkfac(past, self.decay))


def averaged_tkfac(past: list[Case], decay: float) -> tuple[Tensor, Tensor]:
    """TKFAC's factors of the moments averaged with weights `decay^age`."""
    weights = torch.tensor([decay**age for age in reversed(range(len(past)))])
    weights = weights.double() / weights.double().sum()
    pairs = [dense.moments(part) for part in past]
    L, R = (
        torch.einsum("b,bij->ij", weights, torch.stack(side)) for side in zip(*pairs, strict=True)
    )
    return L, R / R.trace()


class StaleSpectrum(WithMemory, name="averaged_theta_survives_a_new_basis"):
    """An averaged Theta used as it stands when the basis moves is still no worse than TKFAC."""

    latex = r"\|F_k - Q_k \bar\Theta Q_k^\top\|_F \le \|F_k - \bar F_{\mathrm{TKFAC}}\|_F"
    sides = ("Theta of the old basis", "averaged TKFAC")

    def left(self, case: Case) -> float:
        *past, now = (captured(part) for part in parts(case))
        running = Running(TEKFAC(), self.decay)
        for layer in past:
            running.update(layer)
            if not running.basis:
                running.refresh_basis()
            running.correct(layer)
        stale = {k: v / running.corrections_count for k, v in running.corrections.items()}
        means = running.means
        block = TEKFAC().block(means.given(TEKFAC().basis(means), stale), running.shape)
        return relative_error(block, Exact()(now)).item()


class CarriedTrace(_Batches, Identity, name="carried_theta_keeps_the_trace"):
    """Theta carried into a new basis by squared overlaps, and averaged on, keeps the trace."""

    source = "TEKFAC (3.6)-(3.8)"
    latex = (
        r"\Theta \leftarrow (Q_G'^\top Q_G)^{\circ 2} \, \Theta \, ((Q_A'^\top Q_A)^{\circ 2})^\top"
    )
    batches = 4
    reference = 8
    decay = 0.8

    def left(self, case: Case) -> Tensor:
        running = Running(TEKFAC(), self.decay)
        for part in parts(case)[:-1]:
            running.update(captured(part))
            running.refresh_basis()
            running.correct(captured(part))
        return running.block().trace()

    def right(self, case: Case) -> Tensor:
        past = parts(case)[:-1]
        weights = [self.decay**age for age in reversed(range(len(past)))]
        traces = [dense.gradients(part).square().sum() / len(part["a"]) for part in past]
        ages = torch.tensor(weights, dtype=torch.float64)
        return ages @ torch.stack(traces) / ages.sum()
