"""Every structure against dense oracles that are written out entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from structprecond import DenseMatrix, DiagonalMatrix, StructuredMatrix
from structprecond.structures import structure_class
from structprecond.testing import StructuredMatrixContract


def _indices(n: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(n)
    return i[:, None].expand(n, n), i[None, :].expand(n, n)


def _keep(matrix: Tensor, once: Tensor, twice: Tensor | None = None) -> Tensor:
    """Keep the entries of one mask, and those of another one added to their mirror image."""
    kept = matrix * once
    return kept if twice is None else kept + (matrix + matrix.mT) * twice


class TestDense(StructuredMatrixContract):
    structure = DenseMatrix

    def project(self, matrix: Tensor) -> Tensor:
        return matrix


class _DiagonalContract(StructuredMatrixContract):
    def project(self, matrix: Tensor) -> Tensor:
        i, j = _indices(matrix.shape[-1])
        return _keep(matrix, i == j)


class TestDiagonal(_DiagonalContract):
    structure = DiagonalMatrix


class _BlockContract(StructuredMatrixContract):
    size: int

    def project(self, matrix: Tensor) -> Tensor:
        i, j = _indices(matrix.shape[-1])
        return _keep(matrix, i // self.size == j // self.size)


class TestBlock30(_BlockContract):
    structure, size = structure_class("block30diagonal"), 30


class TestBlock4(_BlockContract):
    structure, size = structure_class("block4diagonal"), 4


class TestBlock1(_BlockContract):
    structure, size = structure_class("block1diagonal"), 1


class _HierarchicalContract(StructuredMatrixContract):
    top: int
    bottom: int

    def project(self, matrix: Tensor) -> Tensor:
        n = matrix.shape[-1]
        i, j = _indices(n)
        bottom = max(self.top, n - self.bottom)
        in_top, in_bottom = i < self.top, i >= bottom
        once = (i == j) | (in_top & (j < self.top)) | (in_bottom & (j >= bottom))
        twice = (in_top & (j >= self.top)) | (in_bottom & (j >= self.top) & (j < bottom))
        return _keep(matrix, once, twice)


class TestHierarchical15(_HierarchicalContract):
    structure, top, bottom = structure_class("hierarchical15_15"), 15, 15


class TestHierarchical2x3(_HierarchicalContract):
    structure, top, bottom = structure_class("hierarchical2_3"), 2, 3


class TestHierarchical0x4(_HierarchicalContract):
    structure, top, bottom = structure_class("hierarchical0_4"), 0, 4


class _ToeplitzContract(StructuredMatrixContract):
    lower: bool

    def project(self, matrix: Tensor) -> Tensor:
        n = matrix.shape[-1]
        result = torch.zeros_like(matrix)
        for d in range(n):
            diagonal = matrix.diagonal(-d, -2, -1).sum(-1)
            if d > 0:
                diagonal = diagonal + matrix.diagonal(d, -2, -1).sum(-1)
            value = diagonal / (n - d)
            result.diagonal(-d if self.lower else d, -2, -1)[:] = value.unsqueeze(-1)
        return result


class TestTrilToeplitz(_ToeplitzContract):
    structure, lower = structure_class("triltoeplitz"), True


class TestTriuToeplitz(_ToeplitzContract):
    structure, lower = structure_class("triutoeplitz"), False


class _BorderedContract(StructuredMatrixContract):
    def border(self, i: Tensor, j: Tensor, last: int) -> Tensor:
        raise NotImplementedError

    def project(self, matrix: Tensor) -> Tensor:
        n = matrix.shape[-1]
        i, j = _indices(n)
        return _keep(matrix, i == j, self.border(i, j, n - 1) & (i != j))


class TestTrilBottomRightDiag(_BorderedContract):
    structure = structure_class("trilbottomrightdiag")

    def border(self, i: Tensor, j: Tensor, last: int) -> Tensor:
        return j == 0


class TestTrilTopLeftDiag(_BorderedContract):
    structure = structure_class("triltopleftdiag")

    def border(self, i: Tensor, j: Tensor, last: int) -> Tensor:
        return i == last


class TestTriuTopLeftDiag(_BorderedContract):
    structure = structure_class("triutopleftdiag")

    def border(self, i: Tensor, j: Tensor, last: int) -> Tensor:
        return j == last


class TestTriuBottomRightDiag(_BorderedContract):
    structure = structure_class("triubottomrightdiag")

    def border(self, i: Tensor, j: Tensor, last: int) -> Tensor:
        return i == 0


@dataclass(eq=False)
class _Minimal(StructuredMatrix):
    """Diagonal matrices again, with nothing but the two methods that a structure needs."""

    diagonal: Tensor

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> _Minimal:
        return cls(sym_mat.diagonal(dim1=-2, dim2=-1).clone())

    def to_dense(self) -> Tensor:
        return self.diagonal.diag_embed()


class TestDenseFallback(_DiagonalContract):
    structure = _Minimal


@pytest.mark.parametrize("size", [255, 256, 301])
def test_large_inner_products_are_complete(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2, size, 7, dtype=torch.float64, generator=generator)
    start = torch.randn(2, size, size, dtype=torch.float64, generator=generator)
    start = start + start.mT
    averaged = DenseMatrix(start.clone()).add_inner_(X, 0.75, 0.5)
    assert torch.allclose(averaged.to_dense(), 0.75 * start + 0.5 * X @ X.mT, atol=1e-12)
    product = DenseMatrix.from_mat_inner(X).to_dense()
    assert torch.allclose(product, X @ X.mT, atol=1e-12)
    assert torch.allclose(product, product.mT, atol=1e-12)
