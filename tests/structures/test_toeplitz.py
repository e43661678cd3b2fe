"""Triangular Toeplitz matrices, at sizes that use different algorithms."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from structprecond.structures import structure_class
from structprecond.structures.toeplitz import TriangularToeplitzMatrix


def _dense(coefficients: Tensor, lower: bool) -> Tensor:
    n = coefficients.shape[-1]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    distance = i - j if lower else j - i
    return coefficients[..., distance.clamp(min=0)] * (distance >= 0)


def _average_diagonals(matrix: Tensor) -> Tensor:
    n = matrix.shape[-1]
    means = [matrix.diagonal(0, -2, -1).mean(-1)]
    for d in range(1, n):
        both = matrix.diagonal(d, -2, -1).sum(-1) + matrix.diagonal(-d, -2, -1).sum(-1)
        means.append(both / (n - d))
    return torch.stack(means, -1)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("columns", [3, 20, 120])
@pytest.mark.parametrize("n", [1, 2, 200, 256, 257, 300, 800, 1100])
@pytest.mark.parametrize("name", ["triltoeplitz", "triutoeplitz"])
def test_large_matrices_against_dense_ones(name: str, n: int, columns: int, layout: str) -> None:
    structure = structure_class(name)
    assert issubclass(structure, TriangularToeplitzMatrix)
    coefficients = torch.randn(2, n, dtype=torch.float64)
    X = torch.randn(2, n, columns, dtype=torch.float64)
    if layout == "columns":
        X = X.mT.contiguous().mT
    A, dense = structure(coefficients), _dense(coefficients, lower=name == "triltoeplitz")
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9 * n)
    close(A.matmat(X), dense @ X)
    close(A.rmatmat(X), dense.mT @ X)
    expected = _average_diagonals(X @ X.mT)
    close(structure.from_mat_inner(X).coefficients, expected)
    uneven = dense * torch.randn(n, n, dtype=torch.float64)
    expected = _average_diagonals(uneven)
    close(structure.from_dense(uneven).coefficients, expected)


def _diagonal_sums(X: Tensor, Y: Tensor) -> Tensor:
    """Return the sums over the d-th diagonals of X Y', by numpy's direct convolution."""
    pairs = zip(X.mT.double().numpy(), Y.mT.double().numpy(), strict=True)
    return torch.from_numpy(sum(np.convolve(x, y[::-1])[len(x) - 1 :] for x, y in pairs))


@pytest.mark.parametrize("sign", ["positive", "any sign"])
@pytest.mark.parametrize("n", [300, 1500, 4096])
@pytest.mark.parametrize("name", ["triltoeplitz", "triutoeplitz"])
def test_inner_products_in_float32_are_right_on_all_diagonals(name: str, n: int, sign: str) -> None:
    structure = structure_class(name)
    assert issubclass(structure, TriangularToeplitzMatrix)
    random = torch.rand if sign == "positive" else torch.randn
    c, X = random(n), random(n, 3)
    counts = torch.arange(n, 0, -1, dtype=torch.float64)
    both = torch.where(counts == n, 1.0, 2.0) / counts
    # the d-th sum is over products of coefficients u and u - d, each in n - u rows
    expected = both * _diagonal_sums((counts * c)[:, None], c[:, None])
    found = structure(c).from_inner().coefficients
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 2e-7 * expected.abs().max()
    expected = both * _diagonal_sums(X, X)
    found = structure.from_mat_inner(X).coefficients
    assert found.dtype == torch.float32
    assert (found.double() - expected).abs().max() < 2e-7 * expected.abs().max()
    assert structure(c.bfloat16()).from_inner().dtype == torch.bfloat16
