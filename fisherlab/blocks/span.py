"""A basis that is known by its coordinates in another one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Span(Tensor):
    """`V C` `[d, k]`, multiplied out when it is first used as a matrix.

    `V` `[d, r]` and `C` `[r, k]` have orthonormal columns. Whoever works in coordinates of `V`
    reads `C` and never pays for the product, d r k.
    """

    V: Tensor
    C: Tensor
    _product: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, V: Tensor, C: Tensor) -> Span:
        shape = V.shape[0], C.shape[1]
        # a tensor to everybody, without memory of its own
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=C.dtype, device=C.device)
        self.V, self.C, self._product = V, C, None
        return self

    @property
    def product(self) -> Tensor:
        """The matrix."""
        if self._product is None:
            self._product = self.V @ self.C
        return self._product

    def tensors(self) -> Iterator[Tensor]:
        """What it is made of."""
        yield from (self.V, self.C)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map(multiplied, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Span({tuple(self.V.shape)} @ {tuple(self.C.shape)})"


def multiplied(basis: Any) -> Any:
    """A basis as an ordinary tensor; anything else as it is."""
    return basis.product if isinstance(basis, Span) else basis
