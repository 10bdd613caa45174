"""Layers of many outputs: everything is measured in the few dimensions that their columns span."""

import pandas as pd
import pytest
import torch
from torch import nn

import fisherlab as fl
from fisherlab.blocks import contractions
from fisherlab.blocks.columns import Columns, span_of

CE = nn.CrossEntropyLoss()
WORDS, WIDTH, DAMPING = 60, 4, 1e-2


class Language(nn.Module):
    """Scores `[n, words, t]` of the next word; `tied`: the head is the embedding."""

    def __init__(self, tied):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=not tied)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(torch.tanh(self.words(x))).mT


def products(layer):
    """Every method's block as a dense matrix, from its definition in float64."""
    a, g = layer.inputs, layer.output_gradients
    D = torch.einsum("nti,mnto->mnoi", a, g).flatten(0, 1)
    n, t = a.shape[:2]
    G = torch.einsum("mnto,mntp->op", g, g) / n
    A = torch.einsum("nti,ntj->ij", a, a) / (n * t)
    trace = D.square().sum() / n
    left, right = (torch.einsum(s, D, D) / n for s in ("roi,rpi->op", "roi,roj->ij"))

    def corrected(left, right):
        Q_G, Q_A = (torch.linalg.eigh(S).eigenvectors for S in (left, right))
        Q = torch.kron(Q_G, Q_A)
        return Q * ((Q_G.mT @ D @ Q_A).square().sum(0) / n).flatten() @ Q.mT

    U = D.flatten(1)
    return U.mT @ U / n, {
        "kfac": torch.kron(G, A),
        "ekfac": corrected(G, A),
        "tkfac": torch.kron(left, right) / trace,
        "tekfac": corrected(left, right),
        "diagonal": (U.square().sum(0) / n).diag(),
    }


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_against_dense_matrices(tied, fisher_type):
    torch.manual_seed(0)
    model = Language(tied).double()
    x, y = torch.randint(WORDS, (2, 3)), torch.randint(WORDS, (2, 3))
    draws = [torch.Generator().manual_seed(1) for _ in range(2)]
    names = ["words"] if tied else ["words", "head"]
    captures = fl.capture(model, CE, x, y, fisher_type=fisher_type, generator=draws[0])
    table = fl.compare(
        model, CE, x, y, fisher_type=fisher_type, generator=draws[1], dampings=[DAMPING],
        approximations=["kfac", "ekfac", "tkfac", "tekfac", "diagonal"], layers=names,
    )  # fmt: skip
    assert set(table.frame["layer"]) == set(names)
    for name in names:
        layer = captures[name]
        space = layer.columns.space
        assert space is not None and ((name == "words" and not tied) or space.G is not None)
        F, blocks = products(layer)
        damping = DAMPING * F.trace() / len(F)
        eye = damping * torch.eye(len(F), dtype=F.dtype)
        gradient = layer.gradient.flatten()
        exact = torch.linalg.solve(F + eye, gradient)
        for method, X in blocks.items():
            at = (table.frame["layer"] == name) & (table.frame["approximation"] == method)
            row = table.frame[at].iloc[0]
            ours = torch.linalg.solve(X + eye, gradient)
            inner = (X * F).sum() / (X.norm() * F.norm())
            stein = torch.linalg.solve(X + eye, F + eye).trace() - len(F)
            stein += torch.logdet(X + eye) - torch.logdet(F + eye)
            model_value = -gradient @ ours + ours @ (F + eye) @ ours / 2
            expected = {
                "relative_error": (X - F).norm() / F.norm(),
                "trace_ratio": X.trace() / F.trace(),
                "cosine": inner,
                "stein_loss": stein,
                "direction_cosine": torch.cosine_similarity(ours, exact, 0),
                "direction_error": (ours - exact).norm() / exact.norm(),
                "quadratic_decrease": model_value / (-gradient @ exact / 2),
                "quadratic_decrease_scaled": (gradient @ ours) ** 2
                / (ours @ (F + eye) @ ours * (gradient @ exact)),
            }
            for key, value in expected.items():
                assert row[key] == pytest.approx(value.item(), rel=1e-6, abs=1e-8), (method, key)


def test_unseen_examples_form_no_matrix_of_two_vocabularies(monkeypatch):
    """Energies beside a thin basis are found in the basis."""
    torch.manual_seed(0)
    model = Language(False).double()
    (x, y), unseen = torch.randint(WORDS, (2, 2, 3)), torch.randint(WORDS, (2, 4, 3))
    shapes = []
    for side in ("left_moment", "right_moment"):
        of = getattr(contractions, side)
        seen = lambda *args, of=of: shapes.append((found := of(*args)).shape) or found  # noqa: E731
        monkeypatch.setattr(contractions, side, seen)
    methods = ["kfac", "ekfac", "tekfac"]
    fl.compare(
        model, CE, x, y, reference=[tuple(unseen)], approximations=methods, layers=["head"],
        fisher_type="empirical", dampings=[DAMPING],
    )  # fmt: skip
    assert shapes and (WORDS, WORDS) not in shapes
    captures = [fl.capture(model, CE, *batch)["head"] for batch in ((x, y), unseen)]
    _, blocks = products(captures[0])
    F = fl.Exact()(captures[1])
    for method in methods:
        X = fl.approximations.get(method)()(captures[0])
        damped = torch.linalg.inv(blocks[method] + DAMPING * torch.eye(F.size, dtype=F.dtype))
        expected = (damped * products(captures[1])[0]).sum()
        torch.testing.assert_close(F.inner(X.power(-1, DAMPING)), expected)


def test_sparse_rows_are_spanned_by_their_features(generator):
    rows = torch.zeros(2, 20, 100, dtype=torch.float64)
    rows[0, :, [3, 50]] = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    rows[1, :4] = torch.randn(4, 100, generator=generator, dtype=torch.float64)
    V, inside = span_of(rows)
    assert V.shape == (100, 6)  # two features, four dense rows, and none of the zero ones
    torch.testing.assert_close(V.mT @ V, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(inside @ V.mT, rows)
    V, inside = span_of(torch.zeros_like(rows))
    assert V.shape == (100, 40) and not inside.any()


def test_a_wide_layer_without_gradients_is_measured():
    """A residual branch whose last factor is 0, as deep nets begin, gets no gradient at all."""
    model = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2))
    nn.init.zeros_(model[2].weight)
    table = fl.compare(model, CE, torch.ones(4, 3), torch.arange(4) % 2, layers=["0"])
    assert len(table.frame) and (table.frame["note"].str.contains("the exact block is zero")).all()


def test_blocks_within_the_space_of_their_outputs(generator):
    """What is zero beside the space is kept there; what is not has no block in it."""
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    F = fl.blocks.Outer.over(Columns(draw(2, 1, 3), draw(1, 2, 1, 9)))
    space = F.columns.space
    assert space.G.shape == (9, 2) and space.A.shape == (3, 2)
    near = F.restricted_to(space)
    lift = torch.kron(space.G.contiguous(), space.A.contiguous())
    torch.testing.assert_close(lift @ near.dense() @ lift.mT, F.dense())
    Q_G, Q_A, spectrum = space.G, space.A, draw(2, 2).square()
    Eigen = fl.blocks.Eigen
    assert Eigen(Q_G, Q_A, spectrum).restricted_to(space) is not None
    for tails in ({"tail_G": draw(2)}, {"tail_A": draw(2)}, {"tail": draw(())}):
        assert Eigen(Q_G, Q_A, spectrum, **tails).restricted_to(space) is None


def test_the_roles_of_a_large_weight_lie_in_one_tensor(monkeypatch):
    """The table has the same digits, and the columns are no copy of the capture's gradients."""
    model = Language(tied=True)
    x = torch.randint(60, (3, 4), generator=torch.Generator().manual_seed(0))
    names, found = ("kfac", "ekfac", "diagonal"), []
    for large in (2**40, 0):
        monkeypatch.setattr("fisherlab.extract.assemble.LARGE", large)
        layer = fl.capture(model, CE, x, x, fisher_type="mc", layers=["words.weight"])
        g = layer["words"].output_gradients
        first = layer["words"].raw_output_gradients[0]
        assert (g.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()) == (not large)
        table = fl.compare(
            *(model, CE, x, x),
            **{"fisher_type": "mc", "layers": ["words"], "approximations": names},
        ).frame
        found.append(table[[c for c in table if "seconds" not in c]])
    pd.testing.assert_frame_equal(*found, check_exact=True)


def test_float64_columns_of_large_gradients_are_made_a_part_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(*s, generator=generator) for s in ((5, 9, 4), (1, 5, 9, 3)))
    whole, streamed = (fl.blocks.Outer(a, g).double for _ in range(2))
    V = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    assert whole.columns.formed is not None
    expected = whole @ V
    monkeypatch.setattr("fisherlab.blocks.columns.STREAMED", 0)
    torch.testing.assert_close(streamed @ V, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(streamed.solve(V, 0.1), whole.solve(V, 0.1), rtol=1e-11, atol=1e-11)
    assert not {"g", "_cached formed"} & vars(streamed.columns).keys()
