"""A factor kept as few rows, against the same factor as a matrix."""

import pytest
import torch

from fisherlab.blocks import Diagonal, Eigen, Kronecker, Outer
from fisherlab.blocks.coordinates import formed
from fisherlab.blocks.moment import Decomposed, Lifted, Moment
from fisherlab.blocks.numerics import coordinates
from fisherlab.blocks.span import Span


def moment(rows, scale, weight=None):
    def frame():
        Q, R = torch.linalg.qr(rows.mT)
        return Q, R.mT

    return Moment(rows, scale, frame, weight)


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
    # once the matrix is asked for it is the factor, with the eigenvectors already found
    before = rows.eigen.Q_A
    torch.testing.assert_close(rows.A, A)
    torch.testing.assert_close(rows.G, G)
    assert rows.eigen.Q_A is before


def test_a_scaled_moment_keeps_its_eigenvectors(generator):
    one = moment(torch.randn(3, 8, generator=generator, dtype=torch.float64), 1.0)
    values, vectors = one.spectral("S")
    scaled, same = one.scaled(2.5).spectral("S")
    torch.testing.assert_close(scaled, 2.5 * values)
    assert same is vectors


def assert_is_its_matrix(S, expected, V):
    torch.testing.assert_close(S.apply(V), V @ expected)
    torch.testing.assert_close(S.trace(), expected.trace())
    values, vectors = S.spectral("S")
    torch.testing.assert_close(vectors * values @ vectors.mT, expected)
    torch.testing.assert_close(S.formed(), expected)


def test_factors_that_are_not_formed_are_their_matrices(generator):
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    X, W, V = draw(3, 8), draw(3, 3), draw(2, 8)
    W = W + W.mT
    # the weight acts between the rows
    assert_is_its_matrix(moment(X, 0.5, lambda rows: W @ rows), 0.5 * X.mT @ W @ X, V)
    Q, values = torch.linalg.qr(X.mT).Q, torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64)
    assert_is_its_matrix(Lifted(Q, W), Q @ W @ Q.mT, V)
    S, expected = Decomposed(values, Q), Q * values @ Q.mT
    assert_is_its_matrix(S, expected, V)
    inverse, same = (Kronecker(F, F).power(-1, 0.3) for F in (S, expected))
    torch.testing.assert_close(inverse.trace(), same.trace())


def test_blocks_within_the_space_of_their_inputs(generator):
    """`(I (x) V)^T F (I (x) V)` of every form that is known to vanish beside `V`."""
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    a, g = draw(2, 2, 9), draw(3, 2, 2, 4)
    F = Outer(a, g)
    V = F.of.input_space
    assert V is not None and V.shape == (9, 4)
    columns = F.of
    G = draw(4, 4)
    G = G @ G.mT
    A = Kronecker(G, Moment(a, 0.5, lambda: columns.input_frame))
    R = Moment(a, 0.5, lambda: columns.input_frame, lambda x: columns.gradient_products @ x)
    Q_G, Q_A = A.eigen.Q_G, A.eigen.Q_A
    for block in (F, A, Kronecker(G, R), A.eigen, Eigen(Q_G, Q_A, draw(4, 4).square())):
        inside = block.within(V)
        assert inside is not None
        lift = torch.kron(torch.eye(4, dtype=torch.float64), V.contiguous())
        torch.testing.assert_close(inside.dense(), lift.mT @ block.dense() @ lift)
        torch.testing.assert_close(lift @ inside.dense() @ lift.mT, block.dense())
    # what is known of neither
    assert Diagonal(draw(4, 9)).within(V) is None
    assert F.power(-1, 0.1).within(V) is None
    assert Eigen(Q_G, torch.linalg.qr(draw(9, 4)).Q, draw(4, 4)).within(V) is None
    assert A.eigen.power(-1, 0.1).within(V) is None


def test_a_basis_in_coordinates_is_a_tensor_that_is_multiplied_out_when_used(generator):
    V = torch.linalg.qr(torch.randn(7, 4, generator=generator, dtype=torch.float64))[0]
    C = torch.linalg.qr(torch.randn(4, 3, generator=generator, dtype=torch.float64))[0]
    basis, matrix = Span(V, C), V @ C
    assert (basis.shape, len(basis), basis.dtype, basis.device) == ((7, 3), 7, V.dtype, V.device)
    assert basis.numel() * basis.element_size() == 21 * 8
    assert coordinates(basis, V) is C
    assert basis._product is None
    for result, expected in [
        (basis.mT, matrix.mT),
        (matrix.mT @ basis, torch.eye(3, dtype=V.dtype)),
        (basis.square().sum(0), torch.ones(3, dtype=V.dtype)),
        (torch.einsum("ik,ik->k", basis, matrix), torch.ones(3, dtype=V.dtype)),
        (basis[:, [2, 0]], matrix[:, [2, 0]]),
        (basis.float(), matrix.float()),
        (formed(basis), matrix),
    ]:
        assert type(result) is torch.Tensor
        torch.testing.assert_close(result, expected)
