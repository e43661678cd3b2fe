"""Dense matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from structprecond.linalg import left_eigenbasis
from structprecond.linalg.product import as_stack
from structprecond.linalg.symmetric import baddgram
from structprecond.structures.base import _per_matrix, matmul_like
from structprecond.structures.blockwise import BlockwiseMatrix


@dataclass(eq=False)
class DenseMatrix(BlockwiseMatrix):
    r"""Dense matrices, \(\Pi(S) = S\).

    Args:
        mat: The matrices `(*b, n, n)`; not copied.

    Example:
        >>> DenseMatrix(2 * torch.eye(2)).from_inner().to_dense()
        tensor([[4., 0.],
                [0., 4.]])
    """

    mat: Tensor
    name = "dense"

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> Self:
        r"""Copy the matrices `(*b, n, n)`."""
        return cls(sym_mat.clone())

    def to_dense(self) -> Tensor:
        """Return a copy of the matrices."""
        return self.mat.clone()

    @property
    def shape(self) -> torch.Size:
        """The shape `(*b, n, n)`."""
        return self.mat.shape

    def matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A X\)."""
        return matmul_like(self.mat, X)

    def rmatmat(self, X: Tensor) -> Tensor:
        r"""Return \(A^\top X\)."""
        return matmul_like(self.mat.mT, X)

    def outer_matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A A^\top X\), in the order that takes fewer operations."""
        if X.shape[-1] > X.shape[-2]:
            return matmul_like(_gram(self.mat), X)
        return self.matmat(self.rmatmat(X))

    def _compose(self, other: Self) -> Self:
        return type(self)(self.mat @ other.mat)

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Self:
        r"""Return \(X X^\top\)."""
        return cls(_gram(X))

    def from_inner(self, X: Tensor | None = None) -> Self:
        r"""Return \(A^\top X X^\top A\), with X the identity if None."""
        return self.from_mat_inner(self.mat.mT if X is None else self.rmatmat(X))

    def add_inner_(self, X: Tensor, beta: float, alpha: float) -> Self:
        r"""Average in place: \(A \leftarrow \beta A + \alpha X X^\top\)."""
        if X.dtype != self.dtype:
            return super().add_inner_(X, beta, alpha)
        _add_gram_(self.mat, X, beta, alpha)
        return self

    @classmethod
    def eigenbasis_of_inner(cls, X: Tensor) -> Self:
        r"""Return the eigenbasis of \(X X^\top\), from the shorter side of X."""
        return cls(left_eigenbasis(X))

    def diag_add_(self, value: float | Tensor) -> Self:
        """Add to the diagonal in place."""
        diagonal = self.mat.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(_per_matrix(value, diagonal))
        return self

    def average_trace(self) -> Tensor:
        r"""Return \(\mathrm{tr}(A) / n\)."""
        return self.mat.diagonal(dim1=-2, dim2=-1).mean(-1)


def _gram(X: Tensor) -> Tensor:
    """Return `X @ X.mT`."""
    if X.requires_grad:
        return X @ X.mT  # autograd does not support `out`
    gram = X.new_empty(*X.shape[:-1], X.shape[-2])
    _add_gram_(gram, X, 0.0, 1.0)
    return gram


def _add_gram_(matrix: Tensor, X: Tensor, beta: float, alpha: float) -> None:
    """Set a contiguous symmetric stack to `beta * matrix + alpha * X @ X.mT`."""
    flat = as_stack(X)
    stack = matrix.view(len(flat), *matrix.shape[-2:])
    baddgram(stack, flat, beta=beta, alpha=alpha, out=stack)
