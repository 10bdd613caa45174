"""A step whose conditions are looked at together, and taken again one by one where one fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from fisherlab.blocks.reads import Together, revocable

T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """The state that a step may change, as it was before."""

    # takes everything back, and says whether the step can be computed again
    back: Callable[[], bool]
    # forgets what that takes
    release: Callable[[], None]


class Attempt:
    """Computes steps with few reads of the device, as long as their conditions hold.

    Where one does not hold, the step is computed again with a read per condition: fallbacks of
    decompositions and messages that name a layer are found there. Steps after that go on so.
    """

    def __init__(self) -> None:
        self.worthwhile = True

    def take(
        self, finite: Callable[[], bool], compute: Callable[[], T], keep: Callable[[], Kept] | None
    ) -> T | None:
        """The result of `compute`, by few reads if its conditions hold.

        Args:
            finite: whether there are finite gradients; raises or says no where there are none.
            compute: makes the step, and changes nothing that `keep` cannot take back.
            keep: notes the state; None: nothing can be taken back.

        Returns:
            None where the gradients are not finite.
        """
        if keep is None:
            return compute() if finite() else None
        if not self.worthwhile:
            return whole(compute, keep()) if finite() else None
        kept = keep()
        try:
            try:
                with Together():
                    finite()
                    return compute()
            except BaseException as error:
                again = kept.back()
                # an interrupted step is not taken again
                if not isinstance(error, Exception):
                    raise
                if not finite():
                    return None
                if not again:
                    raise
            found = whole(compute, kept)
            self.worthwhile = False
            return found
        finally:
            kept.release()


@contextmanager
def calling(refused: Callable[[], None]) -> Iterator[None]:
    """Call a function if the block raises or is interrupted."""
    try:
        yield
    except BaseException:
        refused()
        raise


def whole(compute: Callable[[], T], kept: Kept) -> T:
    """The result of `compute`; where it raises or is interrupted, the state is as it was."""
    try:
        with revocable():
            return compute()
    except BaseException:
        kept.back()
        raise
