"""Powers of entries: right, and the same bits wherever an entry is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from structprecond import DiagonalMatrix
from structprecond.linalg import matrix_inverse_root
from structprecond.linalg.powers import entrywise_power

EXPONENTS = pytest.mark.parametrize("exponent", [-0.25, -0.125, 1 / 3, -1 / 6, -1.5])


@EXPONENTS
def test_powers_are_those_of_numpy(exponent: float) -> None:
    x = torch.rand(50) * 3 + 0.1
    expected = torch.from_numpy(np.power(x.double().numpy(), exponent)).float()
    assert torch.equal(entrywise_power(x, exponent), expected)
    assert entrywise_power(x.double(), exponent).dtype == torch.float64


@EXPONENTS
def test_an_entry_has_the_same_bits_anywhere(exponent: float) -> None:
    x = torch.rand(2000) * 3 + 0.1
    whole = entrywise_power(x, exponent)
    # torch computes 16 entries at once, and the others one by one
    for size in (1, 4, 16, 33):
        parts = [entrywise_power(part, exponent) for part in x.clone().split(size)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("root", [2, 3, 4, 6])
@pytest.mark.parametrize("n", [2, 4, 6])  # products of odd sizes depend on where a matrix starts
def test_the_root_of_a_matrix_has_the_same_bits_in_any_stack(root: int, n: int) -> None:
    for _ in range(50):
        X = torch.randn(4, n, n)
        A = X @ X.mT + 0.1 * torch.eye(n)
        diagonals = DiagonalMatrix(torch.rand(4, n) + 0.1)
        roots, of_diagonals = matrix_inverse_root(A, root), diagonals.inverse_root(root).diag
        for row in range(4):
            alone = slice(row, row + 1)
            assert torch.equal(matrix_inverse_root(A[alone].clone(), root), roots[alone])
            one = DiagonalMatrix(diagonals.diag[alone].clone()).inverse_root(root).diag
            assert torch.equal(one, of_diagonals[alone])
