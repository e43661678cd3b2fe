"""Spectral functions of matrices with dense diagonal blocks, block by block."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from structprecond.linalg import (
    RootMethod,
    eigh,
    full_precision,
    improve_eigenbasis,
    matrix_inverse_root,
    refresh_eigenbasis,
)
from structprecond.linalg.product import matmul
from structprecond.structures.base import EntrywiseMatrix, _per_matrix


class BlockwiseMatrix(EntrywiseMatrix):
    """A structure whose fields are stacks of square diagonal blocks `(*b, [blocks,] k, k)`.

    The fields are in the order of the rows. All spectral functions work block by block.
    """

    def eigenbasis(self) -> Self:
        """Return the eigenvectors of symmetric matrices, by descending eigenvalue in each block.

        Raises:
            DecompositionError: If a block cannot be decomposed in float64 either.
        """
        return self._map(lambda block: eigh(block)[1] if block.numel() else block)

    @classmethod
    def eigenbasis_of_inner(cls, X: Tensor) -> Self:
        r"""Return the eigenbasis of \(\Pi(X X^\top)\) for `X` of shape `(*b, n, m)`.

        LAPACK fills the null spaces. Subclasses that know the rows of X in each block override this
        with `structprecond.linalg.left_eigenbasis`, where null spaces follow a rule.

        Raises:
            DecompositionError: If a block cannot be decomposed in float64 either.
        """
        return cls.from_mat_inner(X).eigenbasis()

    def refresh_eigenbasis(self, basis: Self) -> tuple[Self, Tensor]:
        r"""Improve the eigenbasis of symmetric matrices by one step of orthogonal iteration.

        In each block, the columns of Q are sorted by descending \(\mathrm{diag}(Q^\top S Q)\), and
        Q becomes the orthogonal factor of \(S Q\), except for null columns, see
        `structprecond.linalg.refresh_eigenbasis`.

        Args:
            basis: The present bases \(Q\).

        Returns:
            The new bases, and the order `(*b, n)` that sorts the columns of Q.
        """
        bases, orders, start = [], [], 0
        batch = self.shape[:-2]
        for S, Q in zip(self.named_tensors().values(), basis.named_tensors().values(), strict=True):
            if not S.numel():
                bases.append(Q)
                continue
            better, order = refresh_eigenbasis(S, Q)
            bases.append(better)
            k = S.shape[-1]
            order = order.reshape(*batch, -1, k)
            first = start + k * torch.arange(order.shape[-2], device=order.device)
            orders.append((order + first.unsqueeze(-1)).flatten(-2))
            start += k * order.shape[-2]
        return type(self)(*bases), torch.cat(orders, dim=-1)

    def orthogonal_iteration(self, basis: Self) -> Self:
        r"""Improve the eigenbasis of symmetric matrices: \(Q \leftarrow \mathrm{qr}(S Q)\).

        The columns of `basis` are not sorted, and null columns left alone, see
        `structprecond.linalg.improve_eigenbasis`.
        """
        return self._map(lambda S, Q: improve_eigenbasis(S, Q) if S.numel() else Q, basis)

    def off_diagonal_ratio(self, basis: Self) -> Tensor:
        r"""Return \(\|\mathrm{offdiag}(Q^\top S Q)\|_F / \|S\|_F\), `(*b,)`: 0 for eigenbases."""
        dtype = torch.promote_types(basis.dtype, torch.float32)
        # squares of entries leave the range of float32 long before the entries do
        largest = self.infinity_vector_norm()
        largest = torch.where(largest > 0, largest, 1.0).to(dtype)
        scaled = self.to(dtype=dtype)._map(lambda S: S / _per_matrix(largest, S))
        with full_precision():
            rotated = basis.to(dtype=dtype)._map(lambda Q, S: matmul(matmul(Q.mT, S), Q), scaled)
        norm = rotated.frobenius_norm()
        for block in rotated.named_tensors().values():
            block.diagonal(dim1=-2, dim2=-1).zero_()
        return rotated.frobenius_norm() / torch.where(norm > 0, norm, 1.0)

    def inverse_root(
        self, root: float, damping: float | Tensor = 0.0, method: RootMethod = "eigh"
    ) -> Self:
        r"""Return \((A + \lambda I)^{-1/p}\) of symmetric positive semi-definite matrices.

        Args:
            root: The order \(p\).
            damping: \(\lambda\), a number or one number per matrix `(*b,)`. Default: 0.0.
            method: See `structprecond.linalg.matrix_inverse_root`. Default: "eigh".
        """
        batch_ndim = len(self.shape) - 2

        def one(block: Tensor) -> Tensor:
            shift = damping
            if isinstance(shift, Tensor):
                shift = shift.reshape(shift.shape + (1,) * (block.ndim - 2 - batch_ndim))
            return matrix_inverse_root(block, root, shift, method) if block.numel() else block

        return self._map(one)
