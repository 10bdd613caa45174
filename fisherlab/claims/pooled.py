"""TKFAC against KFAC on unseen examples, at the maps of pooled transformer classifiers."""

from __future__ import annotations

import torch
from torch import nn

from fisherlab import datasets
from fisherlab.approximations.exact import Exact
from fisherlab.approximations.tkfac import TKFAC
from fisherlab.claims import dense
from fisherlab.claims.base import EXTENSION, Case, Usually
from fisherlab.claims.instances import captured, choice, integer
from fisherlab.extract import capture
from fisherlab.metrics import relative_error
from fisherlab.models.attention import Classifier

FEATURES, SEEN, UNSEEN = 6, 48, 120
STEPS, BATCH, RATE = 40, 32, 0.5


class TkfacWhenPooled(Usually, name="tkfac_beats_kfac_when_pooled_out_of_sample"):
    """Early in training TKFAC is usually nearer than KFAC at a pooled transformer's maps, unseen.

    KFAC takes inputs and gradients of positions as independent. TKFAC's partial traces keep each
    `a_t` with its own `g_t`: A is weighed by `|g_t|^2`, and summed over positions.
    """

    source = "TEKFAC section 2.4"
    kind = EXTENSION
    latex = r"P(\|F' - F_{\mathrm{TKFAC}}\| \le \|F' - F_{\mathrm{KFAC}}\|) > 1/2"
    scale = 1.0
    trials = 12
    sides = ("TKFAC", "KFAC")

    def draw(self, generator: torch.Generator, size: float) -> Case:
        """A classifier of the rows of digits, after up to 40 steps, at one of its shared maps."""
        x, y = datasets.load("digits").train.tensors
        rows = torch.randperm(len(x), generator=generator)
        x, y = x[rows].double(), y[rows]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(integer(generator, 0, 2**30))
            net = Classifier(8, 8, 10, FEATURES, choice(generator, ("token", "mean"))).double()
        criterion, weights = nn.CrossEntropyLoss(), list(net.parameters())
        for _ in range(integer(generator, 0, STEPS, size)):
            picked = torch.randint(SEEN + UNSEEN, len(x), (BATCH,), generator=generator)
            slopes = torch.autograd.grad(criterion(net(x[picked]), y[picked]), weights)
            with torch.no_grad():
                for weight, slope in zip(weights, slopes, strict=True):
                    weight.sub_(slope, alpha=RATE)
        names = [
            name for name, module in net.layer.named_modules() if isinstance(module, nn.Linear)
        ]
        name = f"layer.{choice(generator, names)}"
        parts = []
        for part in (slice(SEEN), slice(SEEN, SEEN + UNSEEN)):
            batch = (net, criterion, x[part], y[part])
            found = capture(*batch, fisher_type="mc", layers=[name], generator=generator)
            parts.append(found[name])
        seen, unseen = parts
        return {
            "layer": name,
            "a": seen.inputs,
            "g": seen.output_gradients,
            "unseen_a": unseen.inputs,
            "unseen_g": unseen.output_gradients,
        }

    def left(self, case: Case) -> float:
        reference = Exact()(captured({"a": case["unseen_a"], "g": case["unseen_g"]}))
        return relative_error(TKFAC()(captured(case)), reference).item()

    def right(self, case: Case) -> float:
        unseen = {"a": case["unseen_a"], "g": case["unseen_g"]}
        return dense.product_error(unseen, *dense.kfac(case))
