"""Hierarchical matrices: dense corner blocks, a diagonal middle, and two coupling blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from structprecond.linalg.product import matmul
from structprecond.structures.base import EntrywiseMatrix, _per_matrix, is_transposed, matmul_like


@dataclass(eq=False)
class HierarchicalMatrix(EntrywiseMatrix):
    r"""Hierarchical matrices with dense corner blocks and a diagonal middle.

        [ A  B1  B2 ]     A: k1 x k1     B = [B1 B2]: k1 x (n - k1)
        [ 0  C   0  ]     C: diagonal    D: k2 x (n - k1 - k2)
        [ 0  D   E  ]     E: k2 x k2

    \(\Pi(S)\) keeps these blocks of S and adds the mirrored blocks to B and D. The sizes are part
    of the class: `structure_class("hierarchical15_15")`. Matrices with \(n \le k_1\) are A alone;
    those with \(n \le k_1 + k_2\) have no middle.

    Args:
        a: `(*b, k1, k1)`. b: `(*b, k1, n - k1)`. c: `(*b, n - k1 - k2)`.
        d: `(*b, k2, n - k1 - k2)`. e: `(*b, k2, k2)`. None is copied.

    Source: Lin et al. 2024 (arXiv 2312.05705), figure 5.

    Example:
        >>> from structprecond.structures import structure_class
        >>> structure_class("hierarchical1_1").from_dense(torch.ones(4, 4)).to_dense()
        tensor([[1., 2., 2., 2.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.],
                [0., 2., 2., 1.]])
    """

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    e: Tensor
    top: ClassVar[int]
    bottom: ClassVar[int]

    @classmethod
    def _sizes(cls, n: int) -> tuple[int, int, int]:
        """Return the sizes of A, C and E for matrices of size n."""
        top = min(cls.top, n)
        bottom = min(cls.bottom, n - top)
        return top, n - top - bottom, bottom

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> Self:
        """Project `(*b, n, n)` onto the structure."""
        top, middle, _ = cls._sizes(sym_mat.shape[-1])
        split = top + middle
        return cls(
            sym_mat[..., :top, :top].clone(),
            sym_mat[..., :top, top:] + sym_mat[..., top:, :top].mT,
            sym_mat.diagonal(dim1=-2, dim2=-1)[..., top:split].clone(),
            sym_mat[..., split:, top:split] + sym_mat[..., top:split, split:].mT,
            sym_mat[..., split:, split:].clone(),
        )

    def to_dense(self) -> Tensor:
        """Return the dense matrices."""
        top, middle, _ = self._sizes(self.shape[-1])
        split = top + middle
        dense = self.a.new_zeros(self.shape)
        dense[..., :top, :top] = self.a
        dense[..., :top, top:] = self.b
        dense.diagonal(dim1=-2, dim2=-1)[..., top:split] = self.c
        dense[..., split:, top:split] = self.d
        dense[..., split:, split:] = self.e
        return dense

    @property
    def shape(self) -> torch.Size:
        """The shape `(*b, n, n)`."""
        n = self.a.shape[-1] + self.b.shape[-1]
        return torch.Size([*self.a.shape[:-2], n, n])

    @classmethod
    def zeros(
        cls,
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a stack of zero matrices."""
        top, middle, bottom = cls._sizes(dim)
        shapes = ((top, top), (top, dim - top), (middle,), (bottom, middle), (bottom, bottom))
        return cls(*(torch.zeros(*batch_shape, *s, dtype=dtype, device=device) for s in shapes))

    @classmethod
    def _cut(cls, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the rows of `(*b, n, m)` into those of A, C and E."""
        return X.split(cls._sizes(X.shape[-2]), dim=-2)  # type: ignore[no-any-return]

    def _full_rows(self) -> Tensor:
        """Return the rows of A and E `(*b, k1 + k2, n)`, dense: all but the diagonal middle."""
        below = torch.cat([self.d, self.e], dim=-1)
        below = pad(below, (self.a.shape[-1], 0))
        return torch.cat([torch.cat([self.a, self.b], dim=-1), below], dim=-2)

    def matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A X\)."""
        product = torch.empty_like(X)
        first, middle, last = self._cut(product)
        torch.mul(self._cut(X)[1], self.c.unsqueeze(-1), out=middle)
        rows = matmul(self._full_rows(), X)
        first.copy_(rows[..., : first.shape[-2], :])
        last.copy_(rows[..., first.shape[-2] :, :])
        return product

    def rmatmat(self, X: Tensor) -> Tensor:
        r"""Return \(A^\top X\)."""
        first, middle, last = self._cut(X)
        product = matmul_like(self._full_rows().mT, _cat_rows(first, last))
        self._cut(product)[1].addcmul_(middle, self.c.unsqueeze(-1))
        return product

    def _compose(self, other: Self) -> Self:
        split = self.c.shape[-1]
        c_row = other.c.unsqueeze(-2)
        b1, b2 = self.b[..., :split], self.b[..., split:]
        return type(self)(
            self.a @ other.a,
            self.a @ other.b + torch.cat([b1 * c_row + b2 @ other.d, b2 @ other.e], dim=-1),
            self.c * other.c,
            self.d * c_row + self.e @ other.d,
            self.e @ other.e,
        )

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Self:
        r"""Return \(\Pi(X X^\top)\) from products of row blocks of X."""
        first, middle, last = cls._cut(X)
        top, split = first.shape[-2], first.shape[-2] + middle.shape[-2]
        rows = matmul(_cat_rows(first, last), X.mT)
        above, below = rows[..., :top, :], rows[..., top:, :]
        return cls(
            above[..., :top].clone(),
            2 * above[..., top:],
            middle.square().sum(-1),
            2 * below[..., top:split],
            below[..., split:].clone(),
        )

    def from_inner(self, X: Tensor | None = None) -> Self:
        r"""Return \(\Pi(A^\top X X^\top A)\), with X the identity if None."""
        if X is not None:
            return self.from_mat_inner(self.rmatmat(X))
        b1, b2 = self.b.tensor_split([self.c.shape[-1]], dim=-1)
        c = (self.c.square(), b1.square().sum(-2), self.d.square().sum(-2))
        return type(self)(
            matmul(self.a.mT, self.a),
            2 * matmul(self.a.mT, self.b),
            c[0] + c[1] + c[2],
            2 * (matmul(b2.mT, b1) + matmul(self.e.mT, self.d)),
            matmul(b2.mT, b2) + matmul(self.e.mT, self.e),
        )

    def _diagonals(self) -> tuple[Tensor, Tensor, Tensor]:
        a, e = (t.diagonal(dim1=-2, dim2=-1) for t in (self.a, self.e))
        return a, self.c, e

    def diag_add_(self, value: float | Tensor) -> Self:
        """Add to the diagonal in place."""
        for diagonal in self._diagonals():
            diagonal.add_(_per_matrix(value, diagonal))
        return self

    def average_trace(self) -> Tensor:
        r"""Return \(\mathrm{tr}(A) / n\)."""
        return torch.cat(self._diagonals(), dim=-1).mean(-1)


def _cat_rows(first: Tensor, last: Tensor) -> Tensor:
    """Concatenate along the rows, in their memory layout."""
    if is_transposed(last):
        return torch.cat([first.mT, last.mT], dim=-1).mT
    return torch.cat([first, last], dim=-2)
