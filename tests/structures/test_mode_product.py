"""Products along all axes against `tensordot`, especially with short axes multiplied together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Size, Tensor

from structprecond import DenseMatrix, DiagonalMatrix
from structprecond.linalg import fast_float32
from structprecond.structures import StructuredMatrix
from structprecond.structures.mode_product import _runs, average_inner_, multiply_axes

# dims, and the axes without a matrix or with a diagonal one
SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((6, 5), "dd"),
    ((9, 8, 3, 3), "dddd"),
    ((3, 3, 3), "ddd"),
    ((9, 3, 3, 3), "dddd"),
    ((7, 7, 2), "ddd"),
    ((8, 8), "dd"),
    ((9, 1, 3), "ddd"),
    ((1, 1), "dd"),
    ((4, 3, 2, 5), "dd-d"),
    ((3, 2, 3, 2), "-d/d"),
    ((3, 2, 2), "/dd"),
    ((4,), "d"),
    ((2, 2), "--"),
]
ROWS = 3


def _matrix(kind: str, dim: int) -> StructuredMatrix | None:
    mat = torch.randn(ROWS, dim, dim, dtype=torch.float64)
    if kind == "-":
        return None
    return DenseMatrix(mat) if kind == "d" else DiagonalMatrix(mat.diagonal(dim1=1, dim2=2))


def _matrices(dims: Sequence[int], kinds: str) -> list[StructuredMatrix | None]:
    return [_matrix(kind, dim) for kind, dim in zip(kinds, dims, strict=True)]


def _along_axis(matrix: Tensor, tensor: Tensor, axis: int) -> Tensor:
    return torch.tensordot(matrix, tensor, dims=([1], [axis])).movedim(0, axis)


@pytest.mark.parametrize("method", ["matmat", "rmatmat", "outer_matmat"])
@pytest.mark.parametrize(("dims", "kinds"), SHAPES)
def test_every_axis_is_multiplied_with_its_matrix(
    dims: tuple[int, ...], kinds: str, method: Literal["matmat", "rmatmat", "outer_matmat"]
) -> None:
    matrices = _matrices(dims, kinds)
    G = torch.randn(ROWS, *dims, dtype=torch.float64)
    actual = multiply_axes(G, matrices, method)
    assert actual.shape == G.shape
    for row in range(ROWS):
        expected = G[row]
        for axis, matrix in enumerate(matrices):
            if matrix is not None:
                A = matrix.to_dense()[row]
                A = {"matmat": A, "rmatmat": A.T, "outer_matmat": A @ A.T}[method]
                expected = _along_axis(A, expected, axis)
        assert torch.allclose(actual[row], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dims", "kinds"), SHAPES)
def test_every_factor_averages_the_inner_product_of_its_matricization(
    dims: tuple[int, ...], kinds: str
) -> None:
    matrices = _matrices(dims, kinds)
    before = [None if m is None else m.to_dense() for m in matrices]
    G = torch.randn(ROWS, *dims, dtype=torch.float64)
    average_inner_(matrices, G, beta=0.75)
    for axis, (matrix, old) in enumerate(zip(matrices, before, strict=True)):
        if matrix is None or old is None:
            continue
        for row in range(ROWS):
            X = G[row].movedim(axis, 0).reshape(dims[axis], -1)
            inner = X @ X.T
            if isinstance(matrix, DiagonalMatrix):
                inner = inner.diagonal().diag()
            expected = 0.75 * old[row] + 0.25 * inner
            assert torch.allclose(matrix.to_dense()[row], expected, rtol=1e-12, atol=1e-12)


def test_factors_of_lower_precision_are_rounded_once() -> None:
    dims = (9, 3, 3)
    factors = [DenseMatrix(torch.randn(ROWS, n, n).bfloat16()) for n in dims]
    wide = [factor.to(torch.float32) for factor in factors]
    G = torch.randn(ROWS, *dims)
    average_inner_(factors, G, beta=0.9)
    average_inner_(wide, G, beta=0.9)
    for factor, expected in zip(factors, wide, strict=True):
        assert factor.dtype == torch.bfloat16
        assert torch.equal(factor.mat, expected.mat.bfloat16())


def test_short_axes_are_taken_together_and_long_ones_are_not() -> None:
    def lengths(*dims: int) -> list[int]:
        return [len(axes) for axes, _ in _runs(Size([1, *dims]), (True,) * len(dims))]

    assert lengths(64, 64, 3, 3) == [1, 1, 2]
    assert lengths(64, 5, 3, 3) == [1, 3]
    assert lengths(7, 7, 2) == [2, 1]
    assert lengths(8, 8) == [1, 1]
    assert lengths(3, 64, 3) == [1, 1, 1]


def test_kronecker_products_are_made_in_the_precision_of_the_tensor() -> None:
    dims = (3, 3, 2)
    matrices = [DenseMatrix(torch.randn(ROWS, n, n).bfloat16()) for n in dims]
    G = torch.randn(ROWS, *dims)
    actual = multiply_axes(G, matrices, "matmat")
    expected = multiply_axes(G.double(), [m.to(torch.float64) for m in matrices], "matmat")
    assert (actual - expected).norm() < 1e-6 * expected.norm()


def test_subclasses_keep_their_own_products() -> None:
    class Doubled(DenseMatrix):
        def add_inner_(self, X: Tensor, beta: float, alpha: float) -> Doubled:
            super().add_inner_(X, beta, 2 * alpha)
            return self

    factors = [Doubled(torch.zeros(1, 2, 2)) for _ in range(2)]
    average_inner_(factors, torch.ones(1, 2, 2), beta=0.5)
    for factor in factors:
        assert torch.equal(factor.mat, torch.full((1, 2, 2), 2.0))


@pytest.mark.parametrize("n", [3, 64, 800])
def test_an_inner_product_that_counts_for_nothing_leaves_the_decay(n: int) -> None:
    A = DenseMatrix(torch.ones(1, n, n))
    with fast_float32():
        A.add_inner_(torch.randn(1, n, 40), beta=0.5, alpha=0.0)
    assert torch.equal(A.mat, torch.full((1, n, n), 0.5))
