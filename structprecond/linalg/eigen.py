"""Eigenbases of stacks of symmetric positive semi-definite matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from structprecond.linalg.decompose import decompose
from structprecond.linalg.precision import at_least_float32, full_precision
from structprecond.linalg.product import matmul
from structprecond.linalg.qr import orthogonal_factor


def eigh(
    matrix: Tensor,  # (*b, n, n) symmetric
) -> tuple[Tensor, Tensor]:  # (*b, n), (*b, n, n)
    r"""Decompose \(A = Q \, \mathrm{diag}(\lambda) \, Q^\top\), descending.

    Runs in float32, or float64 for float64 input, and retries failed matrices in float64.

    Args:
        matrix: The stack \(A\). Only its lower triangle is read.

    Returns:
        Eigenvalues \(\lambda\), and eigenvectors, the columns of \(Q\); at least in float32.

    Raises:
        DecompositionError: If a matrix cannot be decomposed in float64 either; names the rows.

    Example:
        >>> values, vectors = eigh(torch.diag(torch.tensor([1.0, 3.0])))
        >>> values
        tensor([3., 1.])
    """
    values, vectors = decompose(torch.linalg.eigh, at_least_float32(matrix))
    return values.flip(-1), vectors.flip(-1)


def orthogonal_iteration(
    matrix: Tensor,  # (*b, n, n) symmetric
    basis: Tensor,  # (*b, n, n) orthogonal
    steps: int = 1,
) -> Tensor:  # (*b, n, n)
    r"""Improve approximate eigenbases: \(Q \leftarrow \mathrm{qr}(A Q)\), `steps` times.

    Args:
        matrix: The stack \(A\).
        basis: The bases \(Q\), columns by descending eigenvalue.
        steps: The number of rounds, at least 1. Default: 1.

    Returns:
        Orthogonal matrices, even if \(A Q\) is rank-deficient or zero.

    Raises:
        DecompositionError: If a product cannot be decomposed in float64 either; names the rows.

    Source: Golub and Van Loan, "Matrix Computations", 8.2.4; Vyas et al. 2024 (arXiv 2409.11321).

    Example:
        >>> A = torch.tensor([[2.0, 0.1], [0.1, 1.0]])
        >>> Q = orthogonal_iteration(A, torch.eye(2), steps=20)
        >>> bool(off_diagonal_ratio(A, Q) < 1e-5)
        True
    """
    A, Q = at_least_float32(matrix), at_least_float32(basis)
    with full_precision():
        for _ in range(steps):
            Q = orthogonal_factor(A @ Q)
    return Q


def rayleigh_quotients(
    matrix: Tensor,  # (*b, n, n) symmetric
    basis: Tensor,  # (*b, n, n)
) -> Tensor:  # (*b, n)
    r"""Return \(\mathrm{diag}(Q^\top A Q)\), an estimate of the eigenvalue of each column.

    Example:
        >>> rayleigh_quotients(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2))
        tensor([1., 2.])
    """
    A, Q = at_least_float32(matrix), at_least_float32(basis)
    with full_precision():
        return ((A @ Q) * Q).sum(-2)


def off_diagonal_ratio(
    matrix: Tensor,  # (*b, n, n) symmetric
    basis: Tensor,  # (*b, n, n) orthogonal
) -> Tensor:  # (*b,)
    r"""Measure how stale a basis is: \(\|\mathrm{offdiag}(Q^\top A Q)\|_F / \|A\|_F\).

    From 0, for an eigenbasis or \(A = 0\), to 1. Does not depend on the scale of A.

    Source: Eschenhagen et al. 2025 (arXiv 2506.03595), adaptive refresh of Shampoo's eigenbases.

    Example:
        >>> off_diagonal_ratio(torch.eye(2), torch.eye(2))
        tensor(0.)
    """
    A, Q = at_least_float32(matrix), at_least_float32(basis)
    # squares of entries leave the range of float32 long before the entries do
    largest = A.abs().amax((-2, -1), keepdim=True)
    A = A / torch.where(largest > 0, largest, 1.0)
    with full_precision():
        rotated = matmul(matmul(Q.mT, A), Q)
    norm = torch.linalg.matrix_norm(A)
    rotated.diagonal(dim1=-2, dim2=-1).zero_()
    ratio: Tensor = torch.linalg.matrix_norm(rotated) / torch.where(norm > 0, norm, 1.0)
    return ratio


def get_eigenbasis_eigh(kronecker_factor_list: list[Tensor]) -> list[Tensor]:
    """Return the eigenbasis of each factor, columns by descending eigenvalue.

    Args:
        kronecker_factor_list: Symmetric matrices `(n, n)` or stacks `(*b, n, n)`; empty tensors,
            for axes without a factor, are returned as they are.

    Raises:
        DecompositionError: If a factor cannot be decomposed in float64 either.

    Source: Vyas et al. 2024 (arXiv 2409.11321), algorithm 3.

    Example:
        >>> get_eigenbasis_eigh([torch.diag(torch.tensor([1.0, 3.0]))])[0].abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    return [f if f.numel() == 0 else eigh(f)[1] for f in kronecker_factor_list]


def get_eigenbasis_qr(
    kronecker_factor_list: list[Tensor],
    eigenbasis_list: list[Tensor],
    power_iter_steps: int = 1,
) -> list[Tensor]:
    r"""Improve the eigenbasis of each factor by rounds of \(Q \leftarrow \mathrm{qr}(S Q)\).

    Args:
        kronecker_factor_list: The factors; empty tensors for axes without one.
        eigenbasis_list: Their bases, sorted by `sort_eigenbasis_by_approx_eigvals`.
        power_iter_steps: The number of rounds. Default: 1.

    Source: Vyas et al. 2024 (arXiv 2409.11321), algorithm 4.

    Example:
        >>> get_eigenbasis_qr([torch.eye(2)], [torch.eye(2)])[0].abs()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return [
        q if f.numel() == 0 else orthogonal_iteration(f, q, power_iter_steps)
        for f, q in zip(kronecker_factor_list, eigenbasis_list, strict=True)
    ]


def sort_eigenbasis_by_approx_eigvals(
    kronecker_factor_list: list[Tensor],
    eigenbasis_list: list[Tensor],
    exp_avg_sq: Tensor,
) -> tuple[list[Tensor], Tensor]:
    r"""Order the columns of each basis by descending \(\mathrm{diag}(Q^\top S Q)\).

    Args:
        kronecker_factor_list: The factor of each axis of `exp_avg_sq`; empty for axes without one.
        eigenbasis_list: Their bases.
        exp_avg_sq: The second moment in the eigenbasis `(d1, ..., dN)`.

    Returns:
        The permuted bases, and the second moment with the same permutation of its axes.

    Source: Vyas et al. 2024 (arXiv 2409.11321), official implementation.

    Example:
        >>> S, Q, v = torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2), torch.tensor([10.0, 20.0])
        >>> sort_eigenbasis_by_approx_eigvals([S], [Q], v)[1]
        tensor([20., 10.])
    """
    bases = []
    for axis, (S, Q) in enumerate(zip(kronecker_factor_list, eigenbasis_list, strict=True)):
        if S.numel() == 0:
            bases.append(Q)
            continue
        order = rayleigh_quotients(S, Q).argsort(descending=True)
        bases.append(Q[:, order])
        exp_avg_sq = exp_avg_sq.index_select(axis, order)
    return bases, exp_avg_sq
