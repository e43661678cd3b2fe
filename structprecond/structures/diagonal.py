"""Diagonal matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from structprecond.linalg.powers import entrywise_power
from structprecond.structures.base import EntrywiseMatrix, _per_matrix


@dataclass(eq=False)
class DiagonalMatrix(EntrywiseMatrix):
    r"""Diagonal matrices, \(\Pi(S) = \mathrm{diag}(S)\).

    Args:
        diag: The diagonals `(*b, n)`; not copied.

    Example:
        >>> DiagonalMatrix(torch.tensor([1.0, 2.0])) @ torch.ones(2, 1)
        tensor([[1.],
                [2.]])
    """

    diag: Tensor
    name = "diagonal"

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> Self:
        """Copy the diagonals of `(*b, n, n)`."""
        return cls(sym_mat.diagonal(dim1=-2, dim2=-1).clone())

    def to_dense(self) -> Tensor:
        """Return the dense matrices."""
        return self.diag.diag_embed()

    @property
    def shape(self) -> torch.Size:
        """The shape `(*b, n, n)`."""
        return torch.Size([*self.diag.shape, self.diag.shape[-1]])

    @classmethod
    def zeros(
        cls,
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a stack of zero matrices."""
        return cls(torch.zeros(*batch_shape, dim, dtype=dtype, device=device))

    def matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A X\)."""
        return self.diag.unsqueeze(-1) * X

    def rmatmat(self, X: Tensor) -> Tensor:
        r"""Return \(A^\top X = A X\)."""
        return self.matmat(X)

    def outer_matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A A^\top X = A^2 X\)."""
        return self.diag.square().unsqueeze(-1) * X

    def _compose(self, other: Self) -> Self:
        return type(self)(self.diag * other.diag)

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Self:
        r"""Return \(\mathrm{diag}(X X^\top)\): the sums of squares of the rows."""
        return cls(X.square().sum(-1))

    def from_inner(self, X: Tensor | None = None) -> Self:
        r"""Return \(\mathrm{diag}(A^\top X X^\top A)\), with X the identity if None."""
        square = type(self)(self.diag.square())
        return square if X is None else square._compose(self.from_mat_inner(X))

    def inverse_root(self, root: float, damping: float | Tensor = 0.0) -> Self:
        r"""Return \((A + \lambda I)^{-1/p}\) of positive semi-definite matrices.

        Args:
            root: The order \(p\).
            damping: \(\lambda\), a number or one number per matrix `(*b,)`. Default: 0.0.
        """
        damped = self.diag + _per_matrix(damping, self.diag)
        return type(self)(entrywise_power(damped, -1.0 / root))

    @classmethod
    def refresh_cost(cls, dim: int) -> int:
        """Return 0: there is nothing to decompose."""
        return 0

    def diag_add_(self, value: float | Tensor) -> Self:
        """Add to the diagonal in place."""
        self.diag.add_(_per_matrix(value, self.diag))
        return self

    def average_trace(self) -> Tensor:
        r"""Return \(\mathrm{tr}(A) / n\)."""
        return self.diag.mean(-1)
