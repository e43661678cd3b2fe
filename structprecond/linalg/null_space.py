"""Eigenbases whose null space follows a rule, where decompositions leave it to rounding.

An eigenvector is determined only where its eigenvalue stands out from rounding errors. What LAPACK
returns for the others is noise, and Adam in such a basis depends on it as much as on the gradient.
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

# Entries of eigenvectors that should be zero are known to a few machine precisions.
_TILT = 16


def null_level(
    dim: int,
    dtype: torch.dtype,
) -> float:
    r"""Return \(4 \sqrt n \, \epsilon\), times the largest eigenvalue what may be rounding of 0.

    Args:
        dim: The size n of the matrix.
        dtype: What it is computed in, of the machine precision \(\epsilon\).

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

    With few columns it comes from the thin singular value decomposition \(X = U \Sigma V^\top\), at
    the cost of a problem of the size n. Its null space is filled by `complete_basis`.

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
    X = X / torch.where(largest > 0, largest, 1.0)  # NaN stays, for the decomposition to fail
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

    They are reflected onto the first r axes, \(U_r = H_1 \dots H_r \, [D; 0]\) with signs D, and
    the reflections of the other axes are the null space:

    \[ Q = [U_r \mid H_1 \dots H_r \, e_{r+1} \mid \dots \mid H_1 \dots H_r \, e_n], \quad
       H_1 \dots H_r = I - V T V^\top. \]

    This is the orthogonal factor of \(U_r\), with all of its n columns. The null columns are those
    of the orthogonal factor of \([U_r \mid e_1 \dots e_{n-r}]\) but for an orthogonal
    transformation among them that \(U_r\) determines. To apply it would take \(O(n^3)\)
    operations, these are \(O(n^2 r)\); and where the last r rows of \(U_r\) are singular, as a unit
    without a gradient makes them, that factor is left to rounding too. Reflections always exist.

    A column is reflected to the end of its axis that is farther away. Where both are as far, which
    is where \(U_r\) has a zero, rounding would decide. So columns get the sign that makes their
    product with a fixed vector positive, and are tilted towards their axes by a few machine
    precisions. The result does not depend on the signs that are given.

    Args:
        vectors: The columns U.
        null: Which of them are undetermined.

    Returns:
        The bases; U itself for a matrix without null columns, if it is square.

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
    r"""Sort a basis by \(\mathrm{diag}(Q^\top A Q)\), then improve it: one product for both.

    The null columns of `improve_eigenbasis` come last, in the order that they have.

    Args:
        matrix: The stack \(A\).
        basis: The bases \(Q\).

    Returns:
        The better bases, and the order of the columns that the permutation \(P\) from \(Q\) to
        \(Q P\) brings about: descending Rayleigh quotients.

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

    Columns become those of the orthogonal factor of \(A Q\), as in `orthogonal_iteration`, but for
    null columns, of which \(A Q\) holds nothing but rounding. They keep their order and direction
    and are only made orthogonal to all others. Null are, with the fraction `null_level` of the
    largest \(\lambda_j = q_j^\top A q_j\) as limit, those with \(\lambda_j\) up to the limit; and
    those where the new column has no larger quotient, or \(A q_j\) is not farther from the space of
    the columns before it, as for all but r columns if A has rank r.

    Args:
        matrix: The stack \(A\).
        basis: The bases \(Q\).

    Returns:
        The better bases; the j-th column is that of Q, improved.

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
        # null columns were put behind the others
        return better if bool((order == places).all()) else _take(better, order.argsort(-1))


def _iterate(
    matrix: Tensor,  # (*b, n, n)
    basis: Tensor,  # (*b, n, n)
    product: Tensor,  # (*b, n, n)
    quotients: Tensor,  # (*b, n)
    ranks: Tensor,  # (*b, n)
) -> tuple[Tensor, Tensor]:  # (*b, n, n), (*b, n)
    """Return orthonormal columns by descending ranks, null columns last, and their order."""
    if product.ndim == 2:
        better, order = _iterate(*(t[None] for t in (matrix, basis, product, quotients, ranks)))
        return better[0], order[0]
    largest = quotients.amax(-1, keepdim=True).clamp(min=0.0)
    level = null_level(product.shape[-1], product.dtype)
    limit = level * largest
    null = quotients <= limit  # not where these are NaN: the decomposition is to fail
    better, distances, order = _orthonormalize(basis, product, quotients, ranks, null)
    rows = _rows_with(distances <= level**0.75 * largest)
    while len(rows):
        leading = ~null[rows].gather(-1, order[rows])
        found = (distances[rows] <= limit[rows]) & leading
        # rounding in the columns before may make distances from their space larger than the limit
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
    """Orthonormalize columns of the product that are not null, then those of the basis that are.

    Returns:
        The columns, the distance of each from the space of those before it, and their order.
    """
    order = ranks.masked_fill(null, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    columns = _take(product, order)
    if not bool(null.any()):
        factor, diagonal = factor_and_diagonal(columns)
        return factor, diagonal.abs(), order
    last = null.gather(-1, order)
    # of a length like that of the others, of which there may be none
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
    """Return columns in an order of their own in each matrix."""
    # they are taken as rows of the transpose: LAPACK needs that layout anyway
    columns = transposed(stack).flatten(0, -2)
    first = torch.arange(0, len(columns), stack.shape[-1], device=stack.device)
    return columns[order + first.view(*order.shape[:-1], 1)].mT
