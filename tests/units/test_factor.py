"""Factors that are no matrices, and their bases, against the same as matrices."""

import pytest
import torch

from fisherlab.blocks import Diagonal, Eigen, Kronecker, Outer
from fisherlab.blocks.basis import Coordinates, Thin, coordinates, matrix_of
from fisherlab.blocks.factor import Dense, Rows, Spectral, Subspace, factor_of
from fisherlab.blocks.factor import Diagonal as DiagonalFactor


def moment(rows, scale, weight=None):
    def span():
        Q, R = torch.linalg.qr(rows.mT)
        return Q, R.mT

    return Rows(rows, scale, span, weight)


@pytest.mark.parametrize("thin", [(True, True), (True, False), (False, True)])
def test_rows_and_matrix_are_the_same_factor(thin, generator):
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    X, Y, V = draw(3, 7), draw(4, 9), draw(7, 9)
    G, A = 0.5 * X.mT @ X, 2.0 * Y.mT @ Y
    rows = Kronecker(moment(X, 0.5) if thin[0] else G, moment(Y, 2.0) if thin[1] else A)
    dense = Kronecker(G, A)
    torch.testing.assert_close(rows @ V, dense @ V)
    torch.testing.assert_close(rows.trace(), dense.trace())
    inverse = rows.power(-1, 0.3)
    assert isinstance(inverse, Eigen) and inverse.thin
    torch.testing.assert_close(inverse @ V, dense.power(-1, 0.3) @ V)
    assert rows.formed_bytes() == dense.formed_bytes() == dense.memory_bytes() == 8 * (49 + 81)
    kept = (8 * 3 * 7 if thin[0] else 8 * 49, 8 * 4 * 9 if thin[1] else 8 * 81)
    assert rows.memory_bytes() == sum(kept)
    # the matrix is made beside the rows, which stay, as do the eigenvectors already found
    before = rows.eigen.Q_A
    torch.testing.assert_close(rows.A, A)
    torch.testing.assert_close(rows.G, G)
    assert rows.eigen.Q_A is before and rows.memory_bytes() == sum(kept)


def test_a_scaled_moment_keeps_its_eigenvectors(generator):
    one = moment(torch.randn(3, 8, generator=generator, dtype=torch.float64), 1.0)
    values, vectors = one.spectrum("S")
    scaled, same = one.scaled(2.5).spectrum("S")
    torch.testing.assert_close(scaled, 2.5 * values)
    assert same is vectors


def assert_is_its_matrix(S, expected, V):
    torch.testing.assert_close(S.apply(V), V @ expected)
    torch.testing.assert_close(S.trace(), expected.trace())
    values, vectors = S.spectrum("S")
    torch.testing.assert_close(matrix_of(vectors) * values @ matrix_of(vectors).mT, expected)
    torch.testing.assert_close(S.matrix, expected)


def test_factors_that_are_not_formed_are_their_matrices(generator):
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    X, W, V = draw(3, 8), draw(3, 3), draw(2, 8)
    W = W + W.mT
    # the weight acts between the rows
    assert_is_its_matrix(moment(X, 0.5, lambda rows: W @ rows), 0.5 * X.mT @ W @ X, V)
    Q, values = torch.linalg.qr(X.mT).Q, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    assert_is_its_matrix(Subspace(Q, W), Q @ W @ Q.mT, V)
    S, expected = Spectral(values, Q), Q * values @ Q.mT
    assert_is_its_matrix(S, expected, V)
    inverse, same = (Kronecker(F, F).power(-1, 0.3) for F in (S, expected))
    torch.testing.assert_close(inverse.trace(), same.trace())


def test_blocks_within_the_space_of_their_inputs(generator):
    """`(I (x) V)^T F (I (x) V)` of every form that is known to vanish beside `V`."""
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    a, g = draw(2, 2, 9), draw(3, 2, 2, 4)
    F = Outer(a, g)
    columns, space = F.columns, F.columns.space
    assert space is not None and space.G is None and space.A.shape == (9, 4)
    V = space.A
    G = draw(4, 4)
    G = G @ G.mT
    A = Kronecker(G, Rows(a, 0.5, lambda: columns.input_span))
    R = Rows(a, 0.5, lambda: columns.input_span, lambda x: columns.gradient_products @ x)
    Q_G, Q_A = A.eigen.Q_G, A.eigen.Q_A
    for block in (F, A, Kronecker(G, R), A.eigen, Eigen(Q_G, Q_A, draw(4, 4).square())):
        inside = block.restricted_to(space)
        assert inside is not None
        lift = torch.kron(torch.eye(4, dtype=torch.float64), V.contiguous())
        torch.testing.assert_close(inside.dense(), lift.mT @ block.dense() @ lift)
        torch.testing.assert_close(lift @ inside.dense() @ lift.mT, block.dense())
    # what is known of neither
    assert Diagonal(draw(4, 9)).restricted_to(space) is None
    assert F.power(-1, 0.1).restricted_to(space) is None
    assert Eigen(Q_G, torch.linalg.qr(draw(9, 4)).Q, draw(4, 4)).restricted_to(space) is None
    assert A.eigen.power(-1, 0.1).restricted_to(space) is None


@pytest.mark.parametrize("kind", ["thin", "coordinates"])
def test_a_basis_is_used_as_its_matrix(kind, generator):
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    V, C = torch.linalg.qr(draw(7, 4)).Q, torch.linalg.qr(draw(4, 3)).Q
    basis = Thin(V, C) if kind == "thin" else Coordinates(draw(7))
    matrix = V @ C if kind == "thin" else torch.eye(7, dtype=torch.float64)
    assert coordinates(basis, V) is (C if kind == "thin" else None)
    assert "matrix" not in vars(basis)
    assert (basis.shape, len(basis), basis.dtype, basis.device) == (
        matrix.shape, 7, V.dtype, V.device
    )  # fmt: skip
    X = draw(7, len(matrix.mT))
    for result, expected in [
        (basis.mT @ X, matrix.mT @ X),
        (X.mT @ basis, X.mT @ matrix),
        (X * basis, X * matrix),
        (basis.square().sum(0), torch.ones(len(matrix.mT), dtype=V.dtype)),
        (basis[:, torch.tensor([2, 0])], matrix[:, [2, 0]]),
        (basis.mT @ basis, torch.eye(len(matrix.mT), dtype=V.dtype)),
        (matrix_of(basis), matrix),
    ]:
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, expected)


def test_every_form_of_a_factor_is_its_matrix(generator):
    """Powers, multiples, norms and diagonals, thin forms with what lies beside their basis."""
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    X, Q, eye = draw(3, 8), torch.linalg.qr(draw(8, 3)).Q, torch.eye(8, dtype=torch.float64)
    C = draw(3, 3)
    forms = {
        "dense": Dense(X.mT @ X + eye),
        "diagonal": DiagonalFactor(draw(8).square()),
        "rows": moment(X, 0.5),
        "spectral": Spectral(draw(3).square(), Q),
        "subspace": Subspace(Q, C @ C.mT),
    }
    for S in forms.values():
        matrix = S.matrix.clone()
        values, vectors = torch.linalg.eigh(matrix)
        for F, expected in ((S, matrix), (S.scaled(2.5), 2.5 * matrix)):
            assert_is_its_matrix(F, expected, draw(2, 8))
            torch.testing.assert_close(F.squared_norm(), expected.square().sum())
            torch.testing.assert_close(F.diagonal(), expected.diagonal())
        for exponent in (1, -1, -0.5):
            powers = (values.clamp(min=0) + 0.3) ** exponent
            torch.testing.assert_close(S.power(exponent, 0.3).matrix, vectors * powers @ vectors.mT)
        assert factor_of(S) is S
        # one decomposition, whoever holds a multiple
        assert S.scaled(2.0).spectrum()[1] is S.spectrum()[1] and S.scaled(3.0).decomposed
