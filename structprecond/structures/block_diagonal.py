"""Block-diagonal matrices with blocks of any size and one smaller block for the remainder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from structprecond.structures.base import _per_matrix, matmul_like
from structprecond.structures.blockwise import BlockwiseMatrix


@dataclass(eq=False)
class BlockDiagonalMatrix(BlockwiseMatrix):
    r"""Block-diagonal matrices, \(\Pi(S)\) = the diagonal blocks of S.

        [ B1       ]     blocks: (*b, n // k, k, k)
        [    B2    ]     rest:   (*b, n % k, n % k)
        [       R  ]

    The block size \(k\) belongs to the class: `structure_class("block30diagonal")`.

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
        """The first index that belongs to the remainder block."""
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
        return self._multiply(self.blocks, self.rest, X)

    def rmatmat(self, X: Tensor) -> Tensor:
        r"""Return \(A^\top X\)."""
        return self._multiply(self.blocks.mT, self.rest.mT, X)

    def outer_matmat(self, X: Tensor) -> Tensor:
        r"""Return \(A A^\top X\): the outer product has the same blocks."""
        outer = self._map(lambda t: t @ t.mT)
        return self._multiply(outer.blocks, outer.rest, X)

    def _multiply(self, blocks: Tensor, rest: Tensor, X: Tensor) -> Tensor:
        product = torch.empty_like(X)
        (X_blocks, X_rest), (out_blocks, out_rest) = self._cut(X), self._cut(product)
        for block, X_block, out in _slices(blocks, X_blocks, out_blocks):
            if out.is_contiguous():
                torch.matmul(block, X_block, out=out)
            else:
                out.copy_(matmul_like(block, X_block))
        if rest.shape[-1]:
            out_rest.copy_(matmul_like(rest, X_rest))
        return product

    @classmethod
    def _cut(cls, X: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the rows of `(*b, n, m)` into `(*b, n // k, k, m)` and `(*b, n % k, m)`."""
        split = X.shape[-2] // cls.block_size * cls.block_size
        return X[..., :split, :].unflatten(-2, (-1, cls.block_size)), X[..., split:, :]

    def _compose(self, other: Self) -> Self:
        return self._map(torch.matmul, other)

    @classmethod
    def from_mat_inner(cls, X: Tensor) -> Self:
        r"""Return the diagonal blocks of \(X X^\top\)."""
        X_blocks, X_rest = cls._cut(X)
        blocks = X.new_empty(*X_blocks.shape[:-1], cls.block_size)
        for out, X_block in _slices(blocks, X_blocks):
            out.copy_(X_block @ X_block.mT)
        return cls(blocks, X_rest @ X_rest.mT)

    def from_inner(self, X: Tensor | None = None) -> Self:
        r"""Return the diagonal blocks of \(A^\top X X^\top A\), with X the identity if None."""
        if X is None:
            return self._map(lambda t: t.mT @ t)
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


def _slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Slice tensors `(*b, blocks, ...)` along their blocks or along b, whichever is fewer.

    The blocks of several matrices cannot be flattened to one batch dimension without a copy.
    """
    first = tensors[0]
    matrices = first.shape[:-3].numel()
    if first.shape[-3] < matrices or first.ndim == 3:
        yield from zip(*(t.unbind(-3) for t in tensors), strict=True)
    elif first.numel():
        flat = (t.flatten(0, -4) if t.ndim > 4 else t for t in tensors)
        yield from zip(*(t.unbind(0) for t in flat), strict=True)
