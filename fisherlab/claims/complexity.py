"""The cost of the methods: fitted exponents of counted operations and of the largest tensor.

Counted, not timed: a count does not depend on the machine, nor on what else it is doing.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fisherlab.approximations import Approximation
from fisherlab.approximations.ifang import IFANG
from fisherlab.approximations.kfac import KFAC
from fisherlab.blocks import contractions
from fisherlab.claims.base import EXTENSION, REFUTED, AtMost, Case, Claim, Order
from fisherlab.claims.instances import captured, normal
from fisherlab.optim import create

aten = torch.ops.aten
# n^3 / 3 multiplications of a Cholesky factorisation, and about as many n^3 as is usual of others.
_CUBIC: dict[Any, float] = {
    aten.linalg_cholesky_ex: 1 / 3,
    aten.cholesky_inverse: 2 / 3,
    aten.linalg_inv_ex: 2.0,
    aten._linalg_eigh: 9.0,
    aten._linalg_solve_ex: 2 / 3,
}
HALVINGS = 6


class Counted(TorchDispatchMode):
    """Counts the operations of products and factorisations, and the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.largest, self.written = 0.0, 0, 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.operations += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet in _CUBIC:
            self.operations += _CUBIC[packet] * args[0].shape[-1] * args[0].numel()
        elif packet is aten.cholesky_solve:
            self.operations += 2 * args[0].numel() * args[1].shape[-1]
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.largest = max([self.largest, *sizes])
        self.written += 0 if func.is_view else sum(sizes)
        return out


def counted(work: Callable[[], object]) -> Counted:
    """The counts of one call."""
    with Counted() as count:
        work()
    return count


def network(case: Case, inputs: int, examples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """One layer of three outputs on random data; what is counted does not depend on the numbers."""
    generator = torch.Generator().manual_seed(case["seed"])
    layer = nn.Linear(inputs - 1, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(normal(generator, 3, inputs - 1) / inputs)
        layer.bias.zero_()
    x = normal(generator, examples, inputs - 1)
    return nn.Sequential(layer), x, torch.randint(3, (examples,), generator=generator)


def training_step(name: str, case: Case, inputs: int, examples: int, **options: Any) -> Counted:
    """Forward, backward and step of one optimizer."""
    model, x, y = network(case, inputs, examples)
    optimizer = create(name, model, lr=0.01, **options)
    with warnings.catch_warnings():
        # flat coefficients of FNGD are another claim's matter
        warnings.simplefilter("ignore")
        for _ in range(options.get("coefficient_steps", 0)):
            _step(optimizer, model, x, y)
    return counted(lambda: _step(optimizer, model, x, y))


def _step(optimizer: torch.optim.Optimizer, model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


class _Counts(Claim):
    """Counts do not depend on the numbers: one trial is enough, and its case is a seed."""

    trials = 1

    def draw(self, generator: torch.Generator, size: float) -> Case:
        return {"seed": int(torch.randint(1000, (), generator=generator))}


class _Exponent(_Counts, Order):
    """Counts at a size halved five times grow with the stated power of it."""

    source = "NGM sections 3, 4.4"
    sides = ("counted", "power law")
    largest_size = 512

    @property
    def sizes(self) -> list[int]:
        """The largest first."""
        return [self.largest_size >> k for k in range(HALVINGS)]

    @abstractmethod
    def count(self, case: Case, size: int) -> float:
        """The count at a size."""

    def left(self, case: Case) -> Tensor:
        return torch.tensor([self.count(case, n) for n in self.sizes], dtype=torch.float64)

    def right(self, case: Case) -> Tensor:
        # the counts themselves are fitted: they are compared with nothing
        return torch.zeros(HALVINGS, dtype=torch.float64)


class _StepTime(_Exponent):
    """Operations of a training step of one optimizer, by the number of parameters."""

    optimizer: str

    def count(self, case: Case, size: int) -> float:
        return training_step(self.optimizer, case, size, 2).operations


class DenseTime(_StepTime, name="dense_ngd_takes_p3_operations"):
    """Natural gradient descent with the dense Fisher takes O(p^3) operations for p parameters."""

    latex = r"\text{operations} \propto p^3"
    order = 3.0
    optimizer = "ngd_dense"


class DenseMemory(_Exponent, name="dense_ngd_stores_p2_numbers"):
    """Natural gradient descent with the dense Fisher stores O(p^2) numbers for p parameters."""

    latex = r"\text{memory} \propto p^2"
    order = 2.0

    def count(self, case: Case, size: int) -> float:
        return training_step("ngd_dense", case, size, 2).largest


class ExactTime(_StepTime, name="exact_ngd_by_gram_matrices_takes_p_operations"):
    """The exact natural gradient by Gram matrices takes O(p) operations, not O(p^3)."""

    kind = EXTENSION
    latex = r"\text{operations of } (F + \lambda I)^{-1} g \propto p"
    order = 1.0
    largest_size = 4096
    optimizer = "ngd"


class TengradTime(_StepTime, name="tengrad_scales_like_sgd"):
    """TENGraD's operations grow with the number of parameters like SGD's, linearly."""

    source = "NGM section 4.4, figure 5"
    latex = r"\text{operations} \propto p"
    order = 1.0
    largest_size = 4096
    optimizer = "tengrad"


class FngdLikeSGD(_Counts, AtMost, name="fngd_second_phase_costs_like_sgd"):
    """After its first phase FNGD's products cost what SGD's do, within 2 percent."""

    source = "FNGD IV"
    latex = r"\text{operations of FNGD} \le 1.02 \, \text{operations of SGD}"
    sides = ("FNGD", "1.02 SGD")

    def left(self, case: Case) -> float:
        return training_step("fngd", case, 256, 32, coefficient_steps=1).operations

    def right(self, case: Case) -> float:
        model, x, y = network(case, 256, 32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return 1.02 * counted(lambda: _step(optimizer, model, x, y)).operations


class FngdExtra(_Exponent, name="fngd_second_phase_adds_md_numbers"):
    """The second phase of FNGD computes O(M D) more than SGD: the scaled rows of a layer."""

    source = "FNGD IV-C, table I"
    latex = r"\text{numbers written beside SGD's} \propto M"
    order = 1.0
    largest_size = 1024

    def count(self, case: Case, size: int) -> float:
        ours = training_step("fngd", case, 4, size, coefficient_steps=1).written
        return ours - training_step("sgd", case, 4, size).written


def printed_gram(O: int, I: int, M: int) -> float:
    """`O^2 M + I^2 M + M^2`, a multiplication and an addition each."""
    return 2.0 * (O * O * M + I * I * M + M * M)


def counted_gram(seed: int, O: int, I: int, M: int) -> float:
    """The operations of FisherLab's Gram matrix."""
    generator = torch.Generator().manual_seed(seed)
    a, g = normal(generator, M, 1, I), normal(generator, 1, M, 1, O)
    return counted(lambda: contractions.gram(a, g)).operations


class GramTime(_Exponent, name="gram_matrix_costs_m2"):
    """The Gram matrix by inputs and output gradients takes O((O + I) M^2) operations."""

    source = "FNGD (12)"
    kind = EXTENSION
    latex = r"\text{operations of } U^\top U \propto (O + I) M^2"
    order = 2.0
    largest_size = 256

    def count(self, case: Case, size: int) -> float:
        return counted_gram(case["seed"], 4, 8, size)


class GramPrinted(_Counts, AtMost, name="gram_matrix_cost_as_printed"):
    """For wide layers the identity (12) lowers the cost to at most O^2 M + I^2 M + M^2."""

    source = "FNGD IV-C"
    latex = r"\text{operations of } U^\top U \leq 2 (O^2 M + I^2 M + M^2)"
    assumption = "a wide layer: at least as many inputs and outputs as examples"
    outside = "gram_matrix_cost_for_any_batch"
    sides = ("counted", "printed")
    trials = 12

    def draw(self, generator: torch.Generator, size: float) -> Case:
        M, O, I = (1 + int(64 * size * draw) for draw in torch.rand(3, generator=generator))
        return {**super().draw(generator, size), "O": O + M - 1, "I": I + M - 1, "M": M}

    def assume(self, case: Case) -> bool:
        return case["M"] <= min(case["O"], case["I"])

    def left(self, case: Case) -> float:
        return counted_gram(case["seed"], case["O"], case["I"], case["M"])

    def right(self, case: Case) -> float:
        return printed_gram(case["O"], case["I"], case["M"])


class GramAnyBatch(_Exponent, name="gram_matrix_cost_for_any_batch"):
    """Taken to batches of width^2 examples, the printed cost still bounds the operations."""

    source = "FNGD IV-C"
    kind = EXTENSION
    latex = r"\text{operations of } U^\top U / (O^2 M + I^2 M + M^2) \propto O^0,\ M = O^2 = I^2"
    expected = REFUTED
    sides = ("counted / printed", "power law")
    order = 0.0
    largest_size = 32

    def count(self, case: Case, size: int) -> float:
        sizes = (size, size, size**2)
        return counted_gram(case["seed"], *sizes) / printed_gram(*sizes)


class IfangTime(_Exponent, name="ifang_inverse_is_free_of_n3"):
    """IFANG's damped inverse and its product with a gradient take O(n^2) operations."""

    source = "ANG section 2.3"
    latex = r"\text{operations} \propto n^2"
    order = 2.0
    largest_size = 256
    approximation: Approximation = IFANG()

    def examples(self, size: int) -> int:
        """How many the factors are made of."""
        return 4

    def count(self, case: Case, size: int) -> float:
        generator = torch.Generator().manual_seed(case["seed"])
        M = self.examples(size)
        a, g = normal(generator, M, 1, size), normal(generator, 1, M, 1, size)
        block = self.approximation(captured({"a": a, "g": g}))
        V = normal(generator, size, size)
        return counted(lambda: self.approximation.damped(block, 0.1) @ V).operations


class KfacTime(IfangTime, name="kfac_inverse_takes_n3"):
    """KFAC's damped inverse takes O(n^3) operations."""

    latex = r"\text{operations} \propto n^3"
    order = 3.0
    approximation = KFAC(placement="factored")

    def examples(self, size: int) -> int:
        # factors of full rank: those of few examples have a cheaper inverse
        return size
