"""What matrices made of dense diagonal blocks share: spectral functions, block by block."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Self

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

    The fields come in the order of the rows, so everything that is computed from eigenvalues and
    eigenvectors is computed block by block.
    """

    def eigenbasis(self) -> Self:
        """Return the eigenvectors of symmetric matrices, by descending eigenvalue in each block.

        Raises:
            DecompositionError: If a block cannot be decomposed in float64 either.
        """
        return self._map(lambda block: eigh(block)[1] if block.numel() else block)

    @classmethod
    def eigenbasis_of_inner(cls, X: Tensor) -> Self:
        r"""Return the eigenbasis of \(\Pi(X X^\top)\), with null spaces that follow a rule.

        Subclasses that know the rows of X in each block find them as
        `structprecond.linalg.left_eigenbasis` does; here LAPACK fills the null spaces.

        Args:
            X: The stack `(*b, n, m)`.

        Raises:
            DecompositionError: If a block cannot be decomposed in float64 either.
        """
        return cls.from_mat_inner(X).eigenbasis()

    def refresh_eigenbasis(self, basis: Self) -> tuple[Self, Tensor]:
        r"""Improve the eigenbasis of symmetric matrices by one step of orthogonal iteration.

        In each block, the columns of Q are ordered by descending \(\mathrm{diag}(Q^\top S Q)\), and
        Q becomes the orthogonal factor of \(S Q\); but for null columns, which
        `structprecond.linalg.refresh_eigenbasis` leaves alone.

        Args:
            basis: The bases \(Q\) so far.

        Returns:
            The new bases, and the order `(*b, n)` into which the columns were brought.
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

        Null columns are left alone, see `structprecond.linalg.improve_eigenbasis`.

        Args:
            basis: The bases \(Q\) so far; their columns are not sorted.
        """
        return self._map(lambda S, Q: improve_eigenbasis(S, Q) if S.numel() else Q, basis)

    def off_diagonal_ratio(self, basis: Self) -> Tensor:
        r"""Measure how stale a basis is: \(\|\mathrm{offdiag}(Q^\top S Q)\|_F / \|S\|_F\), `(*b,)`.

        Args:
            basis: The bases \(Q\).
        """
        dtype = torch.promote_types(basis.dtype, torch.float32)
        # squares of entries would leave the range of float32 long before the entries do
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
            damping: \(\lambda\), a number or one number per matrix `(*b,)`.
            method: How to compute it, see `structprecond.linalg.matrix_inverse_root`.
        """
        batch_ndim = len(self.shape) - 2

        def one(block: Tensor) -> Tensor:
            shift = damping
            if isinstance(shift, Tensor):
                shift = shift.reshape(shift.shape + (1,) * (block.ndim - 2 - batch_ndim))
            return matrix_inverse_root(block, root, shift, method) if block.numel() else block

        return self._map(one)
