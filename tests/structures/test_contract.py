"""Every structure against dense oracles written entry by entry."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from structprecond import DenseMatrix, DiagonalMatrix, StructuredMatrix, StructureError
from structprecond.structures import structure_class
from structprecond.testing import StructuredMatrixContract


def _indices(n: int) -> tuple[Tensor, Tensor]:
    i = torch.arange(n)
    return i[:, None].expand(n, n), i[None, :].expand(n, n)


def _keep(matrix: Tensor, once: Tensor, twice: Tensor | None = None) -> Tensor:
    """Keep the entries in one mask; add mirrored entries to those in another."""
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
    """Diagonal matrices with only the two required methods."""

    diagonal: Tensor

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> _Minimal:
        return cls(sym_mat.diagonal(dim1=-2, dim2=-1).clone())

    def to_dense(self) -> Tensor:
        return self.diagonal.diag_embed()


class TestDenseFallback(_DiagonalContract):
    structure = _Minimal


@pytest.mark.parametrize("size", [255, 767, 768, 901])
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


@pytest.mark.parametrize("operation", ["__add__", "__sub__", "__matmul__", "add_", "copy_"])
def test_different_structures_do_not_combine(operation: str) -> None:
    A, B = DiagonalMatrix.eye(3), DenseMatrix.eye(3)
    with pytest.raises(StructureError, match="diagonal can only be combined with diagonal"):
        getattr(A, operation)(B)
    assert torch.equal(A.to_dense(), torch.eye(3))


@pytest.mark.parametrize("name", ["dense", "hierarchical1_2"])
def test_products_with_transposed_views_are_transposed_views(name: str) -> None:
    A = structure_class(name).eye(5, (2,))
    X, Y = torch.randn(2, 5, 7), torch.randn(2, 7, 5).mT
    assert A.rmatmat(X).stride() == (35, 7, 1)
    assert A.rmatmat(Y).stride() == (35, 1, 5)
    assert torch.allclose(A @ Y, Y)


def _spectral_case(name: str, batch: tuple[int, ...]) -> tuple[StructuredMatrix, list[slice]]:
    """Return positive definite matrices of size 11, and the slices of their blocks."""
    generator = torch.Generator().manual_seed(5)
    X = torch.randn(*batch, 11, 20, generator=generator, dtype=torch.float64)
    size = {"dense": 11, "block4diagonal": 4, "block11diagonal": 11, "block20diagonal": 20}[name]
    blocks = [slice(start, min(start + size, 11)) for start in range(0, 11, size)]
    return structure_class(name).from_dense(X @ X.mT), blocks


_SPECTRAL = pytest.mark.parametrize(
    "name", ["dense", "block4diagonal", "block11diagonal", "block20diagonal"]
)
_BATCHES = pytest.mark.parametrize("batch", [(), (3,), (2, 3)])


@_SPECTRAL
@_BATCHES
def test_inverse_roots_are_those_of_the_dense_matrices(name: str, batch: tuple[int, ...]) -> None:
    A, _ = _spectral_case(name, batch)
    damping = 1 + torch.rand(batch, dtype=torch.float64)
    values, Q = torch.linalg.eigh(A.to_dense())
    for given in (0.0, 0.5, damping):
        shift = torch.as_tensor(given, dtype=torch.float64)[..., None].expand(*batch, 1)
        expected = (Q * (values + shift).pow(-1 / 3).unsqueeze(-2)) @ Q.mT
        actual = A.inverse_root(3, given)  # type: ignore[attr-defined]
        assert torch.allclose(actual.to_dense(), expected, atol=1e-10)
    diagonal = DiagonalMatrix.from_dense(A.to_dense())
    entries = A.to_dense().diagonal(dim1=-2, dim2=-1) + damping.unsqueeze(-1)
    actual = diagonal.inverse_root(3, damping)
    assert torch.allclose(actual.to_dense(), entries.pow(-1 / 3).diag_embed(), atol=1e-10)


@_SPECTRAL
@_BATCHES
def test_staleness_is_that_of_the_dense_matrices(name: str, batch: tuple[int, ...]) -> None:
    A, _ = _spectral_case(name, batch)
    noise = torch.randn(*batch, 11, 11, dtype=torch.float64)
    exact = A.eigenbasis()  # type: ignore[attr-defined]
    other = type(A).from_dense(noise + noise.mT).eigenbasis()  # type: ignore[attr-defined]
    Q, dense = other.to_dense(), A.to_dense()
    rotated = Q.mT @ dense @ Q
    rest = rotated - rotated.diagonal(dim1=-2, dim2=-1).diag_embed()
    expected = rest.square().sum((-2, -1)).sqrt() / dense.square().sum((-2, -1)).sqrt()
    assert torch.allclose(A.off_diagonal_ratio(other), expected, atol=1e-12)  # type: ignore[attr-defined]
    assert (A.off_diagonal_ratio(exact) < 1e-12).all()  # type: ignore[attr-defined]
    zero = (A * 0.0).off_diagonal_ratio(other)  # type: ignore[attr-defined]
    assert torch.equal(zero, torch.zeros(batch, dtype=torch.float64))


@_SPECTRAL
@_BATCHES
def test_eigenbases_are_refreshed_block_by_block(name: str, batch: tuple[int, ...]) -> None:
    A, blocks = _spectral_case(name, batch)
    dense = A.to_dense()
    noise = torch.randn(*batch, 11, 11, dtype=torch.float64)
    Q = type(A).from_dense(noise + noise.mT).eigenbasis()  # type: ignore[attr-defined]
    better, order = A.refresh_eigenbasis(Q)  # type: ignore[attr-defined]
    unsorted = A.orthogonal_iteration(Q).to_dense()  # type: ignore[attr-defined]
    exact = A.eigenbasis().to_dense()  # type: ignore[attr-defined]
    assert order.shape == (*batch, 11)
    for rows in blocks:
        S, q = dense[..., rows, rows], Q.to_dense()[..., rows, rows]
        quotients = torch.einsum("...ij,...ik,...kj->...j", q, S, q)
        expected = quotients.argsort(dim=-1, descending=True)
        assert torch.equal(order[..., rows] - rows.start, expected)
        picked = torch.take_along_dim(q, expected.unsqueeze(-2), dim=-1)
        for found, start in ((better.to_dense(), picked), (unsorted, q)):
            # with the orthogonal factor Q, R = Q' S Q_old is triangular
            factor = found[..., rows, rows]
            R = factor.mT @ S @ start
            assert R.tril(-1).abs().max() < 1e-10
            assert torch.allclose(factor @ R, S @ start, atol=1e-10)
        values = torch.linalg.eigvalsh(S).flip(-1)
        vectors = exact[..., rows, rows]
        assert torch.allclose(S @ vectors, vectors * values.unsqueeze(-2), atol=1e-9)


def test_cost_of_a_refresh_is_cubic_in_the_blocks() -> None:
    assert DenseMatrix.refresh_cost(7) == 343
    assert structure_class("block4diagonal").refresh_cost(11) == 64 + 64 + 27
    assert structure_class("block4diagonal").refresh_cost(8) == 128
    assert DiagonalMatrix.refresh_cost(7) == 0


@pytest.mark.parametrize("name", ["dense", "diagonal", "block4diagonal"])
def test_matrices_without_entries_or_columns(name: str) -> None:
    structure = structure_class(name)
    empty = structure.from_mat_inner(torch.ones(2, 0, 3))
    assert empty.shape == (2, 0, 0)
    assert empty.from_inner().shape == (2, 0, 0)
    zero = structure.from_mat_inner(torch.ones(2, 5, 0))
    assert torch.equal(zero.to_dense(), torch.zeros(2, 5, 5))
    assert zero.outer_matmat(torch.ones(2, 5, 0)).shape == (2, 5, 0)
    zero.add_inner_(torch.ones(2, 5, 0), beta=0.5, alpha=0.5)
    assert torch.equal(zero.to_dense(), torch.zeros(2, 5, 5))


@pytest.mark.parametrize("name", ["dense", "diagonal", "block4diagonal"])
def test_products_have_gradients(name: str) -> None:
    X = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    structure = structure_class(name)
    torch.autograd.gradcheck(lambda X: structure.from_mat_inner(X).to_dense(), X)
    A = structure.eye(6, (2,), dtype=torch.float64)
    torch.autograd.gradcheck(A.outer_matmat, X)
