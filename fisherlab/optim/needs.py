"""An approximation needs parts of a model's passes; a recorder keeps these alone."""

from __future__ import annotations

from dataclasses import dataclass

# fields of a capture that sums of the raw tensors over the examples determine
SUMS = frozenset({"mean_input_sum", "label_gradient_sum"})


@dataclass(frozen=True)
class Needs:
    """The parts of a capture that are read, of which Fisher matrix, of which examples.

    Tensors that no approximation needs are not kept: the backward pass reuses their memory.

    Args:
        parts: what of a capture the approximation reads.
        fisher_type: "empirical", "mc" or "exact".
        examples: the first rows of a batch that count; None: all.
    """

    parts: frozenset[str]
    fisher_type: str = "empirical"
    examples: int | None = None

    @property
    def summed(self) -> bool:
        """Whether sums over the examples are enough."""
        return self.parts <= SUMS

    @property
    def inputs(self) -> bool:
        """Whether the inputs of each example are read."""
        return "inputs" in self.parts

    @property
    def gradients(self) -> bool:
        """Whether any gradient at a layer's output is read."""
        return not self.parts <= {"inputs", "outputs", "activation_slope"}

    @property
    def outputs(self) -> bool:
        """Whether the layers' outputs are read."""
        return "outputs" in self.parts

    @property
    def slopes(self) -> bool:
        """Whether the slopes of the activations are read."""
        return "activation_slope" in self.parts

    @property
    def columns(self) -> bool:
        """Whether vectors of the model's own distribution are sent back."""
        return self.fisher_type != "empirical" and "output_gradients" in self.parts

    @property
    def chosen(self) -> str:
        """The option that chose the Fisher matrix, as messages name it."""
        return f"fisher_type={self.fisher_type!r}"

    @property
    def rows(self) -> bool:
        """Whether rows of all examples are kept, so that their products can be proven."""
        return self.examples is None and not self.summed
