"""A run of laws: each is called, what fails is collected, and all of it is said at once."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-4}


class LawError(AssertionError):
    """A block, a statistic, a method or an optimizer breaks laws; the message lists which."""


@dataclass(frozen=True)
class Report:
    """The laws that held, and on which layers."""

    what: str
    laws: dict[str, list[str]]

    def __str__(self) -> str:
        rows = [f"{self.what}: {len(self.laws)} laws hold"]
        for law, places in self.laws.items():
            rows.append(f"  {law}{f', on {len(places)} layers' if any(places) else ''}")
        return "\n".join(rows)

    __repr__ = __str__


@dataclass
class Run:
    """Calls laws about one thing.

    Args:
        what: The name of the thing, for messages.
    """

    what: str
    held: dict[str, list[str]] = field(default_factory=dict)
    broken: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def law(self, name: str, where: str, check: Callable[..., None], *args: Any) -> bool:
        """Call `check(*args)`; the law holds if nothing is raised."""
        try:
            check(*args)
        except AssertionError as error:
            found = str(error) or "no"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = f"{type(error).__name__}: {error} (raised in {last.name}, line {last.lineno})"
        else:
            self.held.setdefault(name, []).append(where)
            return True
        self.broken.setdefault(name, []).append((where, found))
        return False

    def report(self) -> Report:
        """The laws that held.

        Raises:
            LawError: one did not.
        """
        if not self.broken:
            return Report(self.what, self.held)
        rows = [f"{self.what} breaks {len(self.broken)} of {self._tried()} laws:"]
        for law, places in self.broken.items():
            where, found = places[0]
            more = f" (and on {len(places) - 1} more)" if len(places) > 1 else ""
            rows.append(f"- {law}{f', on {where}{more}' if where else ''}: {found}")
        raise LawError("\n".join(rows))

    def _tried(self) -> int:
        return len({*self.held, *self.broken})


def near(
    found: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    scale: float = 0.0,
    bound: float | None = None,
) -> None:
    """Assert `||found - expected|| <= bound max(||expected||, scale)`.

    Args:
        found: The tensor to test.
        expected: The reference, of the same shape.
        dtype: The precision that chooses the bound where none is given: 1e-10 or 5e-4.
        scale: A norm that `expected` is a small difference of, if it is.
        bound: The relative bound.
    """
    assert found.shape == expected.shape, (
        f"its shape is {tuple(found.shape)}, not {tuple(expected.shape)}"
    )
    bound = TOLERANCE[dtype] if bound is None else bound
    error = (found.double() - expected.double()).norm().item()
    size = max(expected.double().norm().item(), scale)
    assert error <= bound * size, f"off by {error:.3e} at a size of {size:.3e}, bound {bound:.0e}"


def number(found: Tensor, expected: Tensor | float, dtype: torch.dtype, scale: float = 0.0) -> None:
    """Assert that `found` is a float64 scalar near `expected`."""
    assert found.ndim == 0, f"it has {found.ndim} axes, not 0"
    assert found.dtype == torch.float64, f"it is {found.dtype}, not torch.float64"
    near(found, torch.as_tensor(expected, dtype=torch.float64), dtype, scale)


def refused(kind: type[Exception], words: str, act: Callable[..., object], *args: object) -> None:
    """Assert that `act(*args)` raises `kind` with these words in its message."""
    try:
        act(*args)
    except kind as error:
        assert words in str(error), f"the message {str(error)!r} does not say {words!r}"
        return
    raise AssertionError(f"it was not refused by a {kind.__name__} that says {words!r}")


def unchanged(make: Callable[[], Tensor], held: Iterable[Tensor], what: str) -> None:
    """Assert that `make()` is the same twice, whatever torch's random stream, and changes nothing.

    Args:
        make: The tensor to make twice.
        held: The tensors that it reads.
        what: A name of its product, for messages: "totals".
    """
    tensors = list(held)
    before = [t.clone() for t in tensors]
    one = make().clone()
    with other_stream():
        assert torch.equal(one, make()), f"two {what} of one capture differ"
    same = all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert same, "it changes the capture it reads"


@contextmanager
def other_stream() -> Iterator[None]:
    """Torch's global random stream at another place inside, and back where it was after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() % 2**31 + 1)
        yield


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A seeded normal tensor."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
