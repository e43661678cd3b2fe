"""Block-diagonal matrices with blocks of one size and a smaller block for the remainder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from structprecond.linalg import left_eigenbasis
from structprecond.structures.base import _per_matrix, is_transposed, matmul_like
from structprecond.structures.blockwise import BlockwiseMatrix


@dataclass(eq=False)
class BlockDiagonalMatrix(BlockwiseMatrix):
    r"""Block-diagonal matrices, \(\Pi(S)\) = the diagonal blocks of S.

        [ B1       ]     blocks: (*b, n // k, k, k)
        [    B2    ]     rest:   (*b, n % k, n % k)
        [       R  ]

    The block size \(k\) is part of the class: `structure_class("block30diagonal")`.

    Args:
        blocks: The full blocks `(*b, n // k, k, k)`; not copied.
        rest: The remainder block `(*b, n % k, n % k)`, possibly empty; not copied.

    Example:
        >>> from structprecond.structures import structure_class
        >>> structure_class("block2diagonal").from_dense(torch.ones(3, 3)).to_dense()
        tensor([[1., 1., 0.],
                [1., 1., 0.],
                [0., 0., 1.]])
    """

    blocks: Tensor
    rest: Tensor
    block_size: ClassVar[int]

    @classmethod
    def from_dense(cls, sym_mat: Tensor) -> Self:
        """Copy the diagonal blocks of `(*b, n, n)`."""
        k, n = cls.block_size, sym_mat.shape[-1]
        split = n // k * k
        full = sym_mat[..., :split, :split].unflatten(-1, (-1, k)).unflatten(-3, (-1, k))
        blocks = full.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return cls(
            blocks.clone(memory_format=torch.contiguous_format),
            sym_mat[..., split:, split:].clone(memory_format=torch.contiguous_format),
        )

    def to_dense(self) -> Tensor:
        """Return the dense matrices."""
        dense = self.rest.new_zeros(self.shape)
        k, split = self.block_size, self._split
        full = dense[..., :split, :split].unflatten(-1, (-1, k)).unflatten(-3, (-1, k))
        full.diagonal(dim1=-4, dim2=-2).copy_(self.blocks.movedim(-3, -1))
        dense[..., split:, split:] = self.rest
        return dense

    @property
    def _split(self) -> int:
        """The first index of the remainder block."""
        return self.blocks.shape[-3] * self.block_size

    @property
    def shape(self) -> torch.Size:
        """The shape `(*b, n, n)`."""
        n = self._split + self.rest.shape[-1]
        return torch.Size([*self.rest.shape[:-2], n, n])

    @classmethod
    def zeros(
        cls,
        dim: int,
        batch_shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a stack of zero matrices."""
        k = cls.block_size
        return cls(
            torch.zeros(*batch_shape, dim // k, k, k, dtype=dtype, device=device),
            torch.zeros(*batch_shape, dim % k, dim % k, dtype=dtype, device=device),
        )

    def matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A X\)."""
        return _multiply(self._all_blocks(), X)

    def rmatmat(self, X: Tensor) -> Tensor:
        r"""Return \(A^\top X\)."""
        return _multiply(self._all_blocks().mT, X)

    def outer_matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A A^\top X\): the outer product has the same blocks."""
        blocks = self._all_blocks()
        return _multiply(blocks @ blocks.mT, X)

    def _all_blocks(self) -> Tensor:  # (*b, blocks, k, k)
        """Return all blocks, with the remainder padded with zeros."""
        count, k, _ = self.blocks.shape[-3:]
        left = self.rest.shape[-1]
        if not left:
            return self.blocks
        if not count:
            return self.rest.unsqueeze(-3)
        rest = pad(self.rest, (0, k - left, 0, k - left))
        return torch.cat([self.blocks, rest.unsqueeze(-3)], dim=-3)

    def _compose(self, other: Self) -> Self:
        return self._map(torch.matmul, other)

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Self:
        r"""Return the diagonal blocks of \(X X^\top\)."""
        n = X.shape[-2]
        rows = _cut(X, max(1, min(n, cls.block_size)))
        return cls._from_all_blocks(rows @ rows.mT, n)

    @classmethod
    def _from_all_blocks(cls, blocks: Tensor, n: int) -> Self:
        """Undo `_all_blocks`."""
        count, left = divmod(n, cls.block_size)
        full = blocks[..., :count, :, :]
        if not count:
            full = blocks.new_empty(*blocks.shape[:-3], 0, cls.block_size, cls.block_size)
        rest = blocks[..., -1, :left, :left] if left else blocks.new_empty(*blocks.shape[:-3], 0, 0)
        return cls(full.contiguous(), rest.contiguous())

    @classmethod
    def eigenbasis_of_inner(cls, X: Tensor) -> Self:
        r"""Return the eigenbasis of each diagonal block of \(X X^\top\), from its rows of X."""
        n, k = X.shape[-2], cls.block_size
        basis = cls.zeros(n, X.shape[:-2], X.dtype, X.device)
        split = n // k * k
        if split:
            basis.blocks = left_eigenbasis(X[..., :split, :].unflatten(-2, (-1, k)))
        if split < n:
            basis.rest = left_eigenbasis(X[..., split:, :])
        return basis

    def from_inner(self, X: Tensor | None = None) -> Self:
        r"""Return the diagonal blocks of \(A^\top X X^\top A\), with X the identity if None."""
        if X is None:
            blocks = self._all_blocks()
            return self._from_all_blocks(blocks.mT @ blocks, self.shape[-1])
        return self.from_mat_inner(self.rmatmat(X))

    @classmethod
    def refresh_cost(cls, dim: int) -> int:
        """Return the operations of decomposing all blocks, up to a constant factor."""
        return dim // cls.block_size * cls.block_size**3 + (dim % cls.block_size) ** 3

    def diag_add_(self, value: float | Tensor) -> Self:
        """Add to the diagonal in place."""
        for tensor in (self.blocks, self.rest):
            diagonal = tensor.diagonal(dim1=-2, dim2=-1)
            diagonal.add_(_per_matrix(value, diagonal))
        return self

    def average_trace(self) -> Tensor:
        r"""Return \(\mathrm{tr}(A) / n\)."""
        total = self.blocks.diagonal(dim1=-2, dim2=-1).sum((-2, -1))
        return (total + self.rest.diagonal(dim1=-2, dim2=-1).sum(-1)) / self.shape[-1]


def _multiply(
    blocks: Tensor,  # (*b, blocks, k, k)
    X: Tensor,  # (*b, n, m)
) -> Tensor:  # (*b, n, m)
    """Multiply the rows of X block by block, all in one product, and keep its memory layout."""
    product = matmul_like(blocks, _cut(X, blocks.shape[-1]))
    n = X.shape[-2]
    if not is_transposed(product):
        flat: Tensor = product.flatten(-3, -2)
        return flat[..., :n, :]
    rows: Tensor = torch.empty_like(X.mT, memory_format=torch.contiguous_format).mT
    count, left = divmod(n, blocks.shape[-1])
    rows[..., : n - left, :].unflatten(-2, (count, -1)).copy_(product[..., :count, :, :])
    if left:
        rows[..., n - left :, :] = product[..., count, :left, :]
    return rows


def _cut(
    X: Tensor,  # (*b, n, m)
    k: int,
) -> Tensor:  # (*b, ceil(n / k), k, m)
    """Cut the rows into blocks, padded with zeros, in memory that one product can multiply."""
    *batch, n, m = X.shape
    count, left = divmod(n, k)
    cut: Tensor
    if not left and X.is_contiguous():
        cut = X.unflatten(-2, (count, k))
        return cut
    if is_transposed(X):
        cut = X.new_empty(*batch, count + bool(left), m, k).mT
    else:
        cut = X.new_empty(*batch, count + bool(left), k, m)
    cut[..., :count, :, :] = X[..., : n - left, :].unflatten(-2, (count, k))
    if left:
        cut[..., count, :left, :] = X[..., n - left :, :]
        cut[..., count, left:, :] = 0
    return cut
