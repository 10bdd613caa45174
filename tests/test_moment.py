"""A factor kept as few rows, against the same factor as a matrix."""

import pytest
import torch

from fisherlab.blocks import Eigen, Kronecker
from fisherlab.blocks.moment import Moment


def moment(rows, scale):
    return Moment(rows, scale, lambda: torch.linalg.qr(rows.mT).Q)


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
    assert rows.memory_bytes() == dense.memory_bytes()
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
