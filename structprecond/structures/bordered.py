"""Triangular matrices: a diagonal plus one full row or column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from structprecond.structures.base import EntrywiseMatrix, _per_matrix


@dataclass(eq=False)
class BorderedDiagonalMatrix(EntrywiseMatrix):
    r"""Diagonal matrices plus one full row or column, the first or the last.

    \(\Pi(S)\) keeps the diagonal and adds the mirrored entries to the border. The position of the
    border is that of the subclass.

    Args:
        diag: The diagonals `(*b, n)`; not copied.
        border: The border without its diagonal entry `(*b, n - 1)`; not copied.

    Source: Lin et al. 2024 (arXiv 2312.05705), figure 5.
    """

    diag: Tensor
    border: Tensor
    corner: ClassVar[int]
    """Index of the border: 0 for the first row or column, -1 for the last."""
    column: ClassVar[bool]
    """Whether the border is a column."""

    @classmethod
    def _others(cls) -> slice:
        """Return all indices but the corner."""
        return slice(1, None) if cls.corner == 0 else slice(None, -1)

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> Self:
        """Project `(*b, n, n)` onto the structure."""
        others = cls._others()
        return cls(
            sym_mat.diagonal(dim1=-2, dim2=-1).clone(),
            sym_mat[..., others, cls.corner] + sym_mat[..., cls.corner, others],
        )

    def to_dense(self) -> Tensor:
        """Return the dense matrices."""
        dense = self.diag.diag_embed()
        (dense if self.column else dense.mT)[..., self._others(), self.corner] = self.border
        return dense

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
        return cls(
            *(torch.zeros(*batch_shape, n, dtype=dtype, device=device) for n in (dim, dim - 1))
        )

    def matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A X\)."""
        return self._multiply(X, column=self.column)

    def rmatmat(self, X: Tensor) -> Tensor:
        r"""Return \(A^\top X\)."""
        return self._multiply(X, column=not self.column)

    def _multiply(self, X: Tensor, column: bool) -> Tensor:
        others = self._others()
        product = self.diag.unsqueeze(-1) * X
        if column:
            corner = X[..., self.corner, :].unsqueeze(-2)
            product[..., others, :] += self.border.unsqueeze(-1) * corner
        else:
            product[..., self.corner, :] += (self.border.unsqueeze(-2) @ X[..., others, :]).squeeze(
                -2
            )
        return product

    def _compose(self, other: Self) -> Self:
        first, second = (self, other) if self.column else (other, self)
        corner = second.diag[..., self.corner].unsqueeze(-1)
        border = first.diag[..., self._others()] * second.border + first.border * corner
        return type(self)(self.diag * other.diag, border)

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Self:
        r"""Return \(\Pi(X X^\top)\) from sums of squares and one matrix-vector product."""
        border = X[..., cls._others(), :] @ X[..., cls.corner, :].unsqueeze(-1)
        return cls(X.square().sum(-1), 2 * border.squeeze(-1))

    def from_inner(self, X: Tensor | None = None) -> Self:
        r"""Return \(\Pi(A^\top X X^\top A)\), with X the identity if None."""
        if X is not None:
            return self.from_mat_inner(self.rmatmat(X))
        others = self._others()
        diag = self.diag.square()
        if self.column:
            diag[..., self.corner] += self.border.square().sum(-1)
            return type(self)(diag, 2 * self.border * self.diag[..., others])
        # off the diagonal, only the corner of the border's outer product is in the space
        diag[..., others] += self.border.square()
        return type(self)(diag, 2 * self.border * self.diag[..., self.corner].unsqueeze(-1))

    def diag_add_(self, value: float | Tensor) -> Self:
        """Add to the diagonal in place."""
        self.diag.add_(_per_matrix(value, self.diag))
        return self

    def average_trace(self) -> Tensor:
        r"""Return \(\mathrm{tr}(A) / n\)."""
        return self.diag.mean(-1)


class TrilBottomRightDiagMatrix(BorderedDiagonalMatrix):
    """Lower triangular with a diagonal bottom-right block: the first column is full."""

    name, corner, column = "trilbottomrightdiag", 0, True


class TrilTopLeftDiagMatrix(BorderedDiagonalMatrix):
    """Lower triangular with a diagonal top-left block: the last row is full."""

    name, corner, column = "triltopleftdiag", -1, False


class TriuTopLeftDiagMatrix(BorderedDiagonalMatrix):
    """Upper triangular with a diagonal top-left block: the last column is full."""

    name, corner, column = "triutopleftdiag", -1, True


class TriuBottomRightDiagMatrix(BorderedDiagonalMatrix):
    """Upper triangular with a diagonal bottom-right block: the first row is full."""

    name, corner, column = "triubottomrightdiag", 0, False
