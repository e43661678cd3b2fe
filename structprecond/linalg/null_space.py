"""Eigenbases whose null space follows a rule instead of rounding errors.

An eigenvector is determined only if its eigenvalue stands out from rounding errors. For the others,
LAPACK returns noise, and Adam in such a basis depends on the noise as much as on the gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from structprecond.errors import DecompositionError
from structprecond.linalg.decompose import decompose
from structprecond.linalg.eigen import eigh
from structprecond.linalg.precision import at_least_float32, full_precision
from structprecond.linalg.product import matmul
from structprecond.linalg.qr import block_reflector, factor_and_diagonal, transposed

# in machine precisions, above the rounding errors of zeros in eigenvectors
_TILT = 16


def null_level(
    dim: int,
    dtype: torch.dtype,
) -> float:
    r"""Return \(4 \sqrt n \, \epsilon\): up to this fraction of the largest, eigenvalues are null.

    n is the size of the matrix, and \(\epsilon\) the machine precision of the computation.

    Example:
        >>> 1e-16 < null_level(4, torch.float64) < 1e-14
        True
    """
    precision: float = torch.finfo(dtype).eps
    return 4 * math.sqrt(dim) * precision


def left_eigenbasis(
    matrix: Tensor,  # (*b, m, n)
) -> Tensor:  # (*b, m, m)
    r"""Return the eigenbasis of \(X X^\top\), columns by descending eigenvalue.

    If \(n < m\), it comes from the cheaper thin singular value decomposition
    \(X = U \Sigma V^\top\). `complete_basis` fills the null space.

    Args:
        matrix: The stack X, of any scale.

    Returns:
        Orthogonal matrices; the identity where X = 0.

    Raises:
        DecompositionError: If a matrix cannot be decomposed in float64 either; names the rows.

    Example:
        >>> left_eigenbasis(torch.tensor([[0.0], [2.0], [0.0]])).round().abs()
        tensor([[0., 1., 0.],
                [1., 0., 0.],
                [0., 0., 1.]])
    """
    X = at_least_float32(matrix)
    largest = X.abs().amax((-2, -1), keepdim=True)
    X = X / torch.where(largest > 0, largest, 1.0)  # keeps NaN, so that the decomposition fails
    m, n = X.shape[-2:]
    with full_precision():
        if n < m:
            U, singular, _ = decompose(_thin_svd, X)
            values = singular.square()
        else:
            values, U = eigh(matmul(X, X.mT))
        null = values <= null_level(m, X.dtype) * values.amax(-1, keepdim=True)
        return complete_basis(U, null)


def _thin_svd(matrix: Tensor) -> tuple[Tensor, ...]:
    U, singular, V = torch.linalg.svd(matrix, False)
    return U, singular, V


def complete_basis(
    vectors: Tensor,  # (*b, n, k) orthonormal columns
    null: Tensor,  # (*b, k) bool, True for the last columns of each matrix only
) -> Tensor:  # (*b, n, n)
    r"""Complete the r columns \(U_r\) that are not null to orthogonal matrices.

    Householder reflections map the columns to the first r axes, \(U_r = H_1 \dots H_r \, [D; 0]\)
    with signs D. The same reflections of the other axes span the null space:

    \[ Q = [U_r \mid H_1 \dots H_r \, e_{r+1} \mid \dots \mid H_1 \dots H_r \, e_n], \quad
       H_1 \dots H_r = I - V T V^\top. \]

    This takes \(O(n^2 r)\) operations and always works. To orthogonalize
    \([U_r \mid e_1 \dots e_{n-r}]\) would take \(O(n^3)\), and depend on rounding if the last r
    rows of \(U_r\) are singular, for example where rows of a gradient are zero.

    LAPACK reflects a column to the farther end of its axis. If the column has a zero there,
    rounding would decide. So each column gets the sign that makes its product with a fixed vector
    positive, and is tilted towards its axis by a few machine precisions.

    Args:
        vectors: The columns U.
        null: The mask of undetermined columns.

    Returns:
        The bases; square matrices without null columns are returned as they are.

    Source: Golub and Van Loan, "Matrix Computations", sections 5.1.6 and 5.2.

    Example:
        >>> complete_basis(torch.eye(3)[:, 1:2], torch.tensor([False])).round().abs()
        tensor([[0., 1., 0.],
                [1., 0., 0.],
                [0., 0., 1.]])
    """
    n, k = vectors.shape[-2:]
    if n == k and not bool(null.any()):
        return vectors
    like: Any = {"dtype": vectors.dtype, "device": vectors.device}
    towards = torch.arange(n, **like).cos_()
    signs = torch.where((vectors.mT @ towards).unsqueeze(-2) < 0, -1.0, 1.0).to(vectors.dtype)
    kept = (vectors * signs).masked_fill_(null.unsqueeze(-2), 0.0)
    kept.diagonal(dim1=-2, dim2=-1).add_(~null, alpha=_TILT * torch.finfo(vectors.dtype).eps)
    rows, T = block_reflector(*torch.geqrf(kept))
    completed = matmul(rows.mT, matmul(-T, rows))
    completed.diagonal(dim1=-2, dim2=-1).add_(1.0)
    if n > k:
        return completed
    return torch.where(null.any(-1)[..., None, None], completed, vectors)


def refresh_eigenbasis(
    matrix: Tensor,  # (*b, n, n) symmetric
    basis: Tensor,  # (*b, n, n) orthogonal
) -> tuple[Tensor, Tensor]:  # (*b, n, n), (*b, n)
    r"""Sort bases by \(\mathrm{diag}(Q^\top A Q)\) and improve them, with one product for both.

    Null columns (see `improve_eigenbasis`) come last, in their present order.

    Args:
        matrix: The stack \(A\).
        basis: The bases \(Q\).

    Returns:
        The improved bases, and the order that sorts \(Q\) by descending Rayleigh quotient.

    Raises:
        DecompositionError: If a product cannot be decomposed in float64 either; names the rows.

    Source: Vyas et al. 2024 (arXiv 2409.11321), algorithm 4 and official implementation.

    Example:
        >>> refresh_eigenbasis(torch.diag(torch.tensor([1.0, 2.0])), torch.eye(2))[1]
        tensor([1, 0])
    """
    A, Q = at_least_float32(matrix), at_least_float32(basis)
    with full_precision():
        product = A @ Q
        quotients = (product * Q).sum(-2)
        return _iterate(A, Q, product, quotients, quotients)


def improve_eigenbasis(
    matrix: Tensor,  # (*b, n, n) symmetric
    basis: Tensor,  # (*b, n, n) orthogonal
) -> Tensor:  # (*b, n, n)
    r"""Improve eigenbases by one step of orthogonal iteration that leaves null spaces alone.

    Columns become those of the orthogonal factor of \(A Q\), as in `orthogonal_iteration`, except
    null columns, where \(A Q\) is rounding noise. Null columns keep their order and direction and
    are only made orthogonal to the others. A column is null if one of these numbers is at most
    `null_level` times the largest \(\lambda_j = q_j^\top A q_j\): \(\lambda_j\), the quotient of
    the new column, or the distance of \(A q_j\) from the span of the columns before it. If A has
    rank r, these are all but r columns.

    Args:
        matrix: The stack \(A\).
        basis: The bases \(Q\).

    Returns:
        The improved bases, with columns in the order of Q.

    Raises:
        DecompositionError: If a product cannot be decomposed in float64 either; names the rows.

    Example:
        >>> improve_eigenbasis(torch.diag(torch.tensor([0.0, 2.0, 0.0])), torch.eye(3)).abs()
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """
    A, Q = at_least_float32(matrix), at_least_float32(basis)
    with full_precision():
        product = A @ Q
        quotients = (product * Q).sum(-2)
        better, order = _iterate(A, Q, product, quotients, torch.zeros_like(quotients))
        places = torch.arange(order.shape[-1], device=order.device)
        # undo the move of null columns to the end
        return better if bool((order == places).all()) else _take(better, order.argsort(-1))


def _iterate(
    matrix: Tensor,  # (*b, n, n)
    basis: Tensor,  # (*b, n, n)
    product: Tensor,  # (*b, n, n)
    quotients: Tensor,  # (*b, n)
    ranks: Tensor,  # (*b, n)
) -> tuple[Tensor, Tensor]:  # (*b, n, n), (*b, n)
    """Return orthonormal columns, by descending rank and null columns last, and their order."""
    if product.ndim == 2:
        better, order = _iterate(*(t[None] for t in (matrix, basis, product, quotients, ranks)))
        return better[0], order[0]
    largest = quotients.amax(-1, keepdim=True).clamp(min=0.0)
    level = null_level(product.shape[-1], product.dtype)
    limit = level * largest
    null = quotients <= limit  # False for NaN, so that the decomposition fails
    better, distances, order = _orthonormalize(basis, product, quotients, ranks, null)
    rows = _rows_with(distances <= level**0.75 * largest)
    while len(rows):
        leading = ~null[rows].gather(-1, order[rows])
        found = (distances[rows] <= limit[rows]) & leading
        # rounding in the columns before may raise distances above the limit
        unclear = _rows_with(~found.any(-1, keepdim=True))
        if len(unclear):
            part = rows[unclear]
            small = (matrix[part] @ better[part] * better[part]).sum(-2) <= limit[part]
            found[unclear] |= small & leading[unclear]
        null[rows] |= torch.zeros_like(found).scatter_(-1, order[rows], found)
        rows = rows[_rows_with(found)]
        if not len(rows):
            break
        parts = (t[rows] for t in (basis, product, quotients, ranks, null))
        try:
            better[rows], distances[rows], order[rows] = _orthonormalize(*parts)
        except DecompositionError as error:
            raise DecompositionError(str(error), rows[error.rows].tolist()) from error
    return better, order


def _rows_with(
    mask: Tensor,  # (b, *, n) bool
) -> Tensor:  # (rows,)
    """Return the indices along the first dimension where a mask is True anywhere."""
    return mask.flatten(1).any(1).nonzero().squeeze(1)


def _orthonormalize(
    basis: Tensor, product: Tensor, quotients: Tensor, ranks: Tensor, null: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormalize the product's columns that are not null, then the basis's null columns.

    Returns:
        The columns, the distance of each from the span of the columns before it, and their order.
    """
    order = ranks.masked_fill(null, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    columns = _take(product, order)
    if not bool(null.any()):
        factor, diagonal = factor_and_diagonal(columns)
        return factor, diagonal.abs(), order
    last = null.gather(-1, order)
    # as long as the other columns, if there are any
    length = quotients.amax(-1)[..., None, None]
    kept = _take(basis, order) * torch.where(length > 0, length, 1.0)
    columns = torch.where(last.unsqueeze(-2), kept, columns)
    factor, diagonal = factor_and_diagonal(columns)
    turned = last & (diagonal < 0)
    return torch.where(turned.unsqueeze(-2), -factor, factor), diagonal.abs(), order


def _take(
    stack: Tensor,  # (*b, n, n)
    order: Tensor,  # (*b, n)
) -> Tensor:  # (*b, n, n)
    """Return the columns of each matrix in that matrix's order."""
    # taken as rows of the transpose: LAPACK needs that layout anyway
    columns = transposed(stack).flatten(0, -2)
    first = torch.arange(0, len(columns), stack.shape[-1], device=stack.device)
    return columns[order + first.view(*order.shape[:-1], 1)].mT
