"""Who scales by what, and who is wrong where: one table, and the page that is made of it."""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import pandas as pd

EQUAL, WRONG, REFUSED = "equal to 1e-8", "wrong", "refused"
LAYERS = ("convolution", "sequence")


@dataclass(frozen=True)
class Convention:
    """One method of one library on one kind of layer, against the definition that FisherLab has.

    Args:
        library: its name.
        method: "KFAC" or "EKFAC".
        layer: "convolution" or "sequence", a `nn.Linear` with inputs `[n, s, i]`.
        A: its input factor, or the basis.
        B: its output factor, or the eigenvalues.
        undone: the change that the adapter makes.
        verdict: whether the block is then ours.
        reason: why it is not.
    """

    library: str
    method: str
    layer: str
    A: str
    B: str
    undone: str
    verdict: str
    reason: str = ""


# BackPACK's factors of a convolution: S times KFAC-expand's A, and KFAC-reduce's B
_SUM_A, _SUMS_B = "(1/N) sum_n sum_s a a^T", "(1/N) sum_n (sum_s g)(sum_s g)^T"
_MEAN_A, _MEAN_B = "(1/NS) sum a a^T", "(1/N) sum g g^T"
_BASIS, _VALUES = "eigenvectors of KFAC's factors", "(1/N) sum_n (Q_B^T (sum_s g a^T) Q_A)^2"


def _both(library: str, method: str, A: str, B: str, undone: str) -> list[Convention]:
    return [Convention(library, method, layer, A, B, undone, EQUAL) for layer in LAYERS]


CONVENTIONS: tuple[Convention, ...] = (
    *_both("FisherLab", "KFAC", _MEAN_A, _MEAN_B, "nothing"),
    *_both("curvlinops", "KFAC", _MEAN_A, f"{_MEAN_B}; N times that of a summed loss", "the N"),
    Convention(
        "BackPACK", "KFAC", "convolution", _SUM_A, _SUMS_B, "nothing", WRONG,
        "A is S times KFAC-expand's, B is KFAC-reduce's: the product is neither",
    ),
    Convention(
        "BackPACK", "KFAC", "sequence", "", "", "", REFUSED,
        "its extensions of nn.Linear take inputs [n, i] only",
    ),
    Convention(
        "NNGeometry", "KFAC", "convolution", "sqrt(C) (1/N) sum_n sum_s a a^T",
        "(1/sqrt(C)) (1/NS) sum g g^T", "nothing: the product is ours", EQUAL,
    ),
    Convention(
        "NNGeometry", "KFAC", "sequence", "", "", "", REFUSED,
        "0.4 takes inputs [n, i] only; its development version lacks a 1/S there",
    ),
    *_both("Kronfluence", "KFAC", _MEAN_A, "(1/NS) sum g g^T", "the 1/S of B"),
    Convention(
        "bergson", "KFAC", "convolution", "", "", "", REFUSED,
        "its hooks take inputs [n, s, i] only",
    ),
    Convention(
        "bergson", "KFAC", "sequence", _MEAN_A, "(1/NS) sum g g^T", "the 1/S of B", EQUAL,
    ),
    Convention("ASDL", "KFAC", "convolution", _MEAN_A, _MEAN_B, "nothing", EQUAL),
    Convention(
        "ASDL", "KFAC", "sequence", _SUM_A, _MEAN_B, "the S of A, by `positions=`", EQUAL,
    ),
    *_both("FisherLab", "EKFAC", _BASIS, _VALUES, "nothing"),
    *_both("curvlinops", "EKFAC", _BASIS, f"{_VALUES}; N times that of a summed loss", "the N"),
    *(
        Convention("BackPACK", "EKFAC", layer, "", "", "", REFUSED, "it has no EKFAC")
        for layer in LAYERS
    ),
    Convention("NNGeometry", "EKFAC", "convolution", _BASIS, _VALUES, "nothing", EQUAL),
    Convention(
        "NNGeometry", "EKFAC", "sequence", "", "", "", REFUSED, "0.4 takes inputs [n, i] only"
    ),
    *(
        Convention(
            "ASDL", "EKFAC", layer, "", "", "", REFUSED,
            "its KFE corrects no eigenvalue of a whole example's gradient",
        )
        for layer in LAYERS
    ),
    Convention(
        "bergson", "EKFAC", "convolution", "", "", "", REFUSED,
        "its hooks take inputs [n, s, i] only",
    ),
    Convention("bergson", "EKFAC", "sequence", _BASIS, _VALUES, "nothing", EQUAL),
    *_both("Kronfluence", "EKFAC", _BASIS, f"{_VALUES}, kept as a sum", "the sum over N"),
)  # fmt: skip


def conventions() -> pd.DataFrame:
    """KFAC and EKFAC of every library on a convolution and on a sequence, one row each.

    Returns:
        A frame: library, method, layer, formulas of `A` and `B`, the scale that is undone, verdict
        and reason.
    """
    names = [field.name for field in fields(Convention)]
    return pd.DataFrame([astuple(row) for row in CONVENTIONS], columns=names)


def page() -> str:
    """The page `docs/conventions.md`."""
    head = [name for name in conventions().columns if name not in ("method", "layer")]
    lines = [*_INTRODUCTION]
    for method in ("KFAC", "EKFAC"):
        for layer in LAYERS:
            lines += ["", f"## {method} of a {layer}", "", f"| {' | '.join(head)} |"]
            lines.append(f"| {' | '.join('---' for _ in head)} |")
            lines += [
                f"| {' | '.join(_cell(name, getattr(row, name)) for name in head)} |"
                for row in CONVENTIONS
                if (row.method, row.layer) == (method, layer)
            ]
    return "\n".join([*lines, "", *_CODE, ""])


def _cell(name: str, text: str) -> str:
    return f"`{text}`" if name in ("A", "B") and text else text or "–"


_INTRODUCTION = """\
# Conventions

Every library scales the factors of KFAC in its own way. `fl.adapters` turns them into blocks of
FisherLab's scale, and this page, which `fl.adapters.conventions()` makes, says what is undone. A
test runs each library that is installed on one convolution and on one sequence layer: a row that is
*equal to 1e-8* is measured to be, and a row that is *wrong* or *refused* fails the test once it is
neither any more.

`N` examples, `S` positions (of a convolution: places of the kernel), `C` columns of the outputs'
Hessian; `a` the input at a position, or its patch, with a last entry 1 where there is a bias; `g`
the gradient of an example's own loss at the layer's output. A sum without an index is over all of
them. The weight is `[W | b]` row by row, and the matrix `B (x) A`. All of it approximates
`F = (1/N) sum_n vec(sum_s g a^T) vec(sum_s g a^T)^T`.""".split("\n")

_CODE = """\
## How

```python
table = fl.compare(
    model,
    criterion,
    x,
    y,
    approximations={"curvlinops KFAC": fl.adapters.curvlinops("kfac"), "KFAC": fl.KFAC()},
)
blocks = fl.adapters.from_kronfluence(analyzer.load_all_factors("ekfac"))
table = fl.compare(model, criterion, x, y, approximations={"Kronfluence": blocks})
```

`fl.adapters.curvlinops(method)` runs curvlinops on the inputs and output gradients of a capture.
`from_curvlinops`, `from_backpack`, `from_nngeometry`, `from_kronfluence`, `from_bergson` and
`from_asdl` take what a library has computed on a whole model; `to_curvlinops`, `to_backpack`,
`to_nngeometry` and `to_kronfluence` are the way back. BackPACK and ASDL keep weight and bias apart,
and so does curvlinops by default: their blocks have no entry between the two, and *equal* is of all
others. ASDL has no way back: its preconditioners make their factors themselves.
`as_curvlinops_operator` lends a block, or a matrix of a network, to curvlinops' estimators of
traces, diagonals and spectral densities.

## Beside these

* **bergson**'s `tkfac` (2.5.1) adds `tr(sum g g^T) sum a a^T` of each batch: KFAC's `A` times one
  number a batch, where TKFAC weighs each example by its own `|g|^2`. It is run on one batch in a
  test. bergson requires torchvision, but never imports it: where that wheel fails to load, hide it.
* **ASDL** is the package `asdfghjkl` (0.1a5); the one that is called `asdl` is another project's.
""".strip().split("\n")
