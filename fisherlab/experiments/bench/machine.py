"""The rates of the machine, and the work of a call: why a row is not faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from fisherlab.claims.complexity import Counted
from fisherlab.experiments.training.cost import finished

DECOMPOSITIONS = frozenset({"_linalg_eigh", "linalg_qr", "_linalg_svd", "linalg_cholesky_ex"})
DECOMPOSITIONS |= {"cholesky_inverse", "linalg_inv_ex", "_linalg_solve_ex"}


@dataclass(frozen=True)
class Machine:
    """Measured rates: matrix products and eigendecompositions in 1e9 operations/s, copies in GB/s.

    An eigendecomposition of order n counts as `9 n^3` operations.
    """

    threads: int
    float32: float
    float64: float
    decompositions: float
    copy: float

    @classmethod
    def measured(cls, device: torch.device, size: int = 1024) -> Machine:
        """Rates of products and copies of order `size`, each the best of a few tries."""
        generator = torch.Generator().manual_seed(0)
        square = torch.randn(size, size, generator=generator).to(device)
        wide = square.double()
        order = max(16, size // 2)
        moment = square[:order] @ square[:order].mT
        buffer = torch.empty(size, size, 16, device=device)
        into = torch.empty_like(buffer)

        def best(call: Callable[[], object]) -> float:
            seconds = []
            for _ in range(4):
                finished(device)
                start = time.perf_counter()
                call()
                finished(device)
                seconds.append(time.perf_counter() - start)
            return min(seconds)

        return cls(
            torch.get_num_threads(),
            2 * size**3 / best(lambda: square @ square) / 1e9,
            2 * size**3 / best(lambda: wide @ wide) / 1e9,
            9 * order**3 / best(lambda: torch.linalg.eigh(moment)) / 1e9,
            2 * buffer.numel() * buffer.element_size() / best(lambda: into.copy_(buffer)) / 1e9,
        )


class Footprint(Counted):
    """Counts a call's operations by kind, the bytes it writes, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.by_kind = {"float32": 0.0, "float64": 0.0, "decompositions": 0.0}
        self.bytes_written = 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        before = self.operations
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if self.operations > before:
            name = func._overloadpacket.__name__
            wide = bool(made) and made[0].dtype == torch.float64
            kind = "float64" if wide else "float32"
            kind = "decompositions" if name in DECOMPOSITIONS else kind
            self.by_kind[kind] += self.operations - before
        self._hold(made, func.is_view)
        return out

    def _hold(self, made: list[Tensor], view: bool) -> None:
        for tensor in made:
            storage = tensor.untyped_storage()
            self.bytes_written += 0 if view else tensor.numel() * tensor.element_size()
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: x for key, x in self._alive.items() if not x[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))


def footprint(work: Callable[[], object]) -> Footprint:
    """The footprint of one call."""
    with Footprint() as count:
        work()
    return count


def limits(count: Footprint, machine: Machine, seconds: float) -> dict[str, Any]:
    """The time of a call at the machine's rates, part by part, and its slowest part.

    `explained` is the share of the measured seconds that products, decompositions and writing
    would take one after the other at full speed: near 1, only fewer operations are faster.
    """
    parts = {kind: count.by_kind[kind] / 1e9 / getattr(machine, kind) for kind in count.by_kind}
    # a copy reads as much as it writes
    parts["memory"] = 2 * count.bytes_written / 1e9 / machine.copy
    largest = max(parts, key=lambda kind: parts[kind])
    return {
        "gflop": sum(count.by_kind.values()) / 1e9,
        "peak_bytes": count.peak,
        "bound_seconds": sum(parts.values()),
        "explained": sum(parts.values()) / seconds,
        "limit": f"{largest} {parts[largest] / seconds:.0%}",
    }
