"""An interactive look at one model's blocks: layer, approximation and damping by hand."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from fisherlab import approximations as registry
from fisherlab import metrics
from fisherlab.approximations.exact import Exact
from fisherlab.blocks import Block, BlockError
from fisherlab.comparison import default_fisher_type
from fisherlab.extract import capture
from fisherlab.extras import named
from fisherlab.names import unknown
from fisherlab.plots import theme
from fisherlab.plots.matrices import heat
from fisherlab.plots.spectra import draw_spectrum

DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
# A spectrum of more parameters than this is not worth the wait between two clicks.
LARGEST = 2_000_000


class Explorer:
    """One batch of one model: `look(layer, approximation, damping)` is a figure.

    Everything is computed when it is first looked at and kept. In a notebook the object shows
    itself with widgets. Where they are not installed or no kernel answers, it is the static picture
    of its first choice.

    Args:
        model: the model.
        criterion: the loss.
        x: the inputs of one batch.
        y: its labels.
        approximations: names; None: all that one capture can build.
        fisher_type: as in `compare`; None: its default.
        dampings: values of lambda relative to `tr F / N`.

    Raises:
        ValueError: an approximation is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[[Tensor, Tensor], Tensor],
        x: Any,
        y: Tensor,
        approximations: Iterable[str] | None = None,
        fisher_type: str | None = None,
        dampings: Sequence[float] = DAMPINGS,
    ) -> None:
        fisher_type = fisher_type or default_fisher_type(model, criterion, x)
        self.captures = capture(model, criterion, x, y, fisher_type=fisher_type, kinds=("map",))
        known = [name for name in registry.names() if name != "exact"]
        usable = [name for name in registry.of_one_batch() if name != "exact"]
        self.approximations = list(approximations or usable)
        for name in self.approximations:
            if name not in known:
                raise ValueError(unknown("approximation", name, known))
        self.layers, self.dampings = list(self.captures), list(dampings)
        self.fisher_type = fisher_type
        self._block = cache(self._build)
        self._exact_step = cache(self._solve)

    def _build(self, layer: str, approximation: str) -> Block:
        kind = Exact if approximation == "exact" else registry.get(approximation)
        return kind()(self.captures[layer])

    def _solve(self, layer: str, damping: float) -> Tensor:
        F = self._block(layer, "exact")
        return -F.solve(self.captures[layer].gradient.to(F.dtype), damping)

    def numbers(self, layer: str, approximation: str, damping: float) -> dict[str, float]:
        """The picture's title; `damping` is relative to `tr F / N`."""
        F, X = self._block(layer, "exact"), self._block(layer, approximation)
        shift = damping * F.trace().item() / F.size
        gradient = self.captures[layer].gradient
        step = metrics.step(X, F, gradient, shift, exact=self._exact_step(layer, shift))
        return {
            "relative error": metrics.relative_error(X, F).item(),
            "trace ratio": metrics.trace_ratio(X, F).item(),
            "direction cosine": step.cosine.item(),
        }

    def look(
        self, layer: str | None = None, approximation: str | None = None, damping: float = 1e-2
    ) -> theme.Picture:
        """Spectra, overlap of leading eigenvectors and direction over damping, of one choice."""
        layer = layer or self.layers[0]
        approximation = approximation or self.approximations[0]
        F, X = self._block(layer, "exact"), self._block(layer, approximation)
        cosines = [self.numbers(layer, approximation, d)["direction cosine"] for d in self.dampings]
        numbers = self.numbers(layer, approximation, damping)
        spectra = {"exact": F, approximation: X}
        values = {k: B.eigenvalues() for k, B in spectra.items()} if F.size <= LARGEST else {}
        overlap = metrics.grouped_overlap(X, F, 10)
        return _draw(
            layer, approximation, values, overlap, self.dampings, cosines, damping, numbers
        )

    def widgets(self) -> Any:
        """The three controls over the picture, as an ipywidgets box."""
        with named():
            import ipywidgets

        picture = ipywidgets.HTML()
        layer = ipywidgets.Dropdown(options=self.layers, description="layer")
        method = ipywidgets.Dropdown(options=self.approximations, description="method")
        options = [(f"{d:g}", d) for d in self.dampings]
        damping = ipywidgets.SelectionSlider(
            options=options, value=self.dampings[len(options) // 2], description="damping"
        )

        def show(_: Any = None) -> None:
            try:
                picture.value = self.look(layer.value, method.value, damping.value)._repr_html_()
            except BlockError as error:
                picture.value = f"<p>{html.escape(str(error))}</p>"

        for control in (layer, method, damping):
            control.observe(show, names="value")
        show()
        return ipywidgets.VBox([ipywidgets.HBox([layer, method, damping]), picture])

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widgets() if interactive() else self.look())

    def _repr_html_(self) -> str:
        return self.look()._repr_html_()

    def __repr__(self) -> str:
        return (
            f"Explorer({len(self.layers)} layers, {len(self.approximations)} approximations, "
            f"{self.fisher_type} Fisher)"
        )


def explore(
    model: nn.Module,
    criterion: Callable[[Tensor, Tensor], Tensor],
    x: Any,
    y: Tensor,
    **options: Any,
) -> Explorer:
    """Look at the blocks of a model by hand; see `Explorer` for the options.

    Args:
        model: the model.
        criterion: the loss.
        x: the inputs of one batch.
        y: its labels.
        options: further arguments of `Explorer`.

    Returns:
        The explorer, which shows itself in a notebook.
    """
    return Explorer(model, criterion, x, y, **options)


def interactive() -> bool:
    """Whether ipywidgets is installed and a notebook kernel is there to answer."""
    try:
        import ipywidgets  # noqa: F401
        from IPython import get_ipython
    except ImportError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None


@theme.themed
def _draw(
    layer: str,
    name: str,
    values: dict[str, Tensor],
    overlap: metrics.GroupedOverlap,
    dampings: Sequence[float],
    cosines: Sequence[float],
    damping: float,
    numbers: dict[str, float],
) -> theme.Picture:
    figure, (left, middle, right) = theme.panels(3, columns=3, height=2.3)
    if values:
        draw_spectrum(left, values)
    else:
        left.text(0.5, 0.5, "too large\nto decompose", ha="center", transform=left.transAxes)
    left.set_title("spectrum")
    heat(middle, overlap.matrix)
    middle.set(title=r"$|\langle v_i, q_j\rangle|$", xlabel=f"eigenvector of {name}")
    middle.set(ylabel="eigenvector of $F$", xticks=[], yticks=[])
    right.plot(dampings, cosines, **theme.look(name).line)
    right.axvline(damping, **theme.GUIDE)
    right.set(xscale="log", ylim=(min(-0.02, *cosines), 1.03), title="direction")
    right.set(xlabel=r"damping in units of $\mathrm{tr}\,F/N$", ylabel="cosine to the exact step")
    theme.legend(figure, ["exact", name])
    told = ", ".join(f"{key} {value:.3f}" for key, value in numbers.items())
    theme.title(figure, f"Layer {layer}, {name} at damping {damping:g}\n{told}")
    return figure
