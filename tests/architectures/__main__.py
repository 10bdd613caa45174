"""Writes docs/architectures.md: `PYTHONPATH=tests python -m architectures > docs/architectures.md`.

Needs the extra `hub`.
"""

from __future__ import annotations

import warnings

from architectures import TABLE, Architecture
from architectures.measure import Measured, measured, own_parameters, trainable, trained

HEAD = """\
# Architectures

Every architecture below is built with tiny random weights and captured without options beyond
`forward=`. Each block's per-example gradients equal those of plain autograd, one example at a
time, to {error:.0e} in float64 (`tests/units/test_architectures.py`; the extra `hub` installs
transformers, timm and peft). Weights that a model casts to float32 are compared to float32's
rounding. The last column says what has no block, and its share of the parameters.

Three steps of each optimizer: the column holds the largest cosine of a step and the plain gradient,
on the parameters that it preconditions. 1 is plain gradient descent; "plain" has no block, and the
optimizer says so.

| architecture | from | parameters | share with a block | {optimizers} | left out, and why |
| --- | --- | ---: | ---: | --- | --- |
"""
LONGEST = 200
OPTIMIZERS = ("kfac", "tekfac", "fngd", "shampoo")


def left_out(found: Measured, model) -> str:
    """Every reason with the share of the parameters that it keeps out, the largest first."""
    if found.refusal:
        return f"refused: {short(found.refusal)}"
    params = trainable(model)
    covered = {part.parameter for parts in found.parts.values() for part in parts}
    reasons: dict[str, float] = {}
    for reason, layers in found.skipped.items():
        names = {name for layer in layers for name in known_parameters(model, layer, params)}
        numbers = sum(params[name].numel() for name in names - covered)
        if numbers:
            reasons[reason] = numbers / found.parameters
    ordered = sorted(reasons.items(), key=lambda item: -item[1])
    return "; ".join(f"{short(reason)} ({share:.1%})" for reason, share in ordered)


def known_parameters(model, layer: str, params) -> list[str]:
    try:
        own = own_parameters(model, layer, params)
    except AttributeError:  # the reason names no module: the model itself
        own = [name for name in params if "." not in name]
    return [name for name in own if name in params]


def short(reason: str) -> str:
    reason = reason.replace("|", "/").replace("\n", " ")
    return reason if len(reason) <= LONGEST else f"{reason[:LONGEST]} ..."


def cosine(architecture: Architecture, optimizer: str) -> str:
    """The largest cosine of three steps and plain gradient steps."""
    found = trained(architecture.problem(), optimizer)
    return f"{max(found.cosines):.2f}" if found.cosines else "plain"


def main() -> None:
    rows, worst = [], 0.0
    for architecture in TABLE.values():
        problem = architecture.problem()
        found = measured(problem)
        for block, error in found.errors.items():
            if not any(map(block.endswith, architecture.cast)):
                worst = max(worst, error)
        cells = [
            architecture.name,
            ", ".join(architecture.packages) or "torch",
            f"{found.parameters:,}",
            f"{found.share:.1%}",
            " / ".join(cosine(architecture, name) for name in OPTIMIZERS),
            left_out(found, problem.model),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    print(HEAD.format(error=worst, optimizers=", ".join(OPTIMIZERS)) + "\n".join(rows))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
