"""Inverse roots of stacks of symmetric positive semi-definite matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from structprecond.errors import StructPrecondError
from structprecond.linalg.decompose import decompose
from structprecond.linalg.powers import entrywise_power
from structprecond.linalg.precision import at_least_float32, full_precision
from structprecond.linalg.product import matmul

RootMethod = Literal["eigh", "coupled_newton", "newton_db"]
"""How `matrix_inverse_root` computes roots: by eigenvalues, or by one of two Newton iterations."""

Tensors = tuple[Tensor, ...]


def matrix_inverse_root(
    matrix: Tensor,  # (*b, n, n) symmetric positive semi-definite
    root: float,
    damping: float | Tensor = 0.0,  # broadcasts over (*b,)
    method: RootMethod = "eigh",
) -> Tensor:  # (*b, n, n)
    r"""Compute \((A + \lambda I)^{-1/p}\) for a stack of symmetric matrices.

    With "eigh", eigenvalues are shifted up by \(-\min(0, \lambda_{\min})\) before damping, so the
    result is finite for every damping above 0. The iterations "coupled_newton" and "newton_db" use
    only matrix products, which suits accelerators. At condition numbers of 1e6 and above, they are
    40 to 95 % off in the Frobenius norm.

    Args:
        matrix: The stack \(A\).
        root: The order \(p > 0\): any for "eigh", an integer for "coupled_newton", 2 or 4 for
            "newton_db". Shampoo uses twice the number of its factors.
        damping: \(\lambda\), in units of the eigenvalues. Default: 0.0.
        method: The method. Default: "eigh".

    Raises:
        DecompositionError: If the result is not finite in float64 either; names the rows.
        StructPrecondError: If the method cannot compute the root.

    Source: Gupta et al. 2018 (arXiv 1802.09568), algorithm 1; Anil et al. 2020 (arXiv 2002.09018)
    for the coupled Newton iteration; Denman and Beavers 1976 for Newton-DB.

    Example:
        >>> matrix_inverse_root(4 * torch.eye(2), root=2)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    if not has_inverse_root(method, root):
        raise StructPrecondError(
            f"Method {method!r} cannot compute the inverse root of order {root}. Use 'eigh' for "
            "any order, 'coupled_newton' for integers, or 'newton_db' for 2 and 4."
        )

    def invert(A: Tensor, shift: Tensor) -> tuple[Tensor]:
        if method == "eigh":
            return (_eigh_inverse_root(A, root, shift),)
        iterate = _coupled_newton if method == "coupled_newton" else _newton_db
        eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
        return (iterate(A + shift[..., None, None] * eye, int(root)),)

    A = at_least_float32(matrix)
    shift = torch.as_tensor(damping, dtype=A.dtype, device=A.device)
    with full_precision():
        return decompose(invert, A, shift.expand(A.shape[:-2]))[0]


def has_inverse_root(method: str, root: float) -> bool:
    """Return whether a method of `matrix_inverse_root` can compute a root.

    Example:
        >>> has_inverse_root("newton_db", 8)
        False
    """
    integer = root == int(root)
    known = {"eigh": True, "coupled_newton": integer, "newton_db": root in (2, 4)}
    return known.get(method, False)


def _eigh_inverse_root(A: Tensor, root: float, damping: Tensor) -> Tensor:
    values, Q = torch.linalg.eigh(A)
    values = values - values[..., :1].clamp(max=0.0) + damping.unsqueeze(-1)
    inverse_root: Tensor = matmul(Q * entrywise_power(values, -1.0 / root).unsqueeze(-2), Q.mT)
    return inverse_root


def _scale(A: Tensor) -> Tensor:
    """Return an upper bound of the spectral norm, one per matrix."""
    # scaled by the largest entry, so that no square overflows or underflows
    largest = A.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
    scale: Tensor = largest * torch.linalg.matrix_norm(A / largest, keepdim=True)
    return scale


def _coupled_newton(A: Tensor, p: int) -> Tensor:
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    alpha = -1.0 / p
    z = (p + 1) / (2 * _scale(A))

    def step(X: Tensor, M: Tensor) -> Tensors:
        N = (1 - alpha) * eye + alpha * M
        return X @ N, torch.linalg.matrix_power(N, p) @ M

    return _iterate(step, (entrywise_power(z, 1.0 / p) * eye, z * A), steps=100)[0]


def _newton_db(A: Tensor, p: int) -> Tensor:
    """Return the inverse p-th root for p = 2, or p = 4 in two rounds."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    c = _scale(A)

    def step(Y: Tensor, Z: Tensor, product: Tensor) -> Tensors:
        E = 1.5 * eye - 0.5 * product
        Y, Z = Y @ E, E @ Z
        return Y, Z, Z @ Y

    Y, Z, _ = _iterate(step, step(A / c, eye.expand_as(A), A / c), steps=50)
    return Z / c.sqrt() if p == 2 else _newton_db(c.sqrt() * Y, 2)


def _iterate(
    step: Callable[..., Tensors], start: Tensors, steps: int, tolerance: float = 1e-6
) -> Tensors:
    """Repeat a step on each matrix until the last of its results is the identity.

    On nearly singular matrices, rounding makes the iterations diverge. So a step that raises the
    error by 20 % or more is discarded and ends the iteration of its matrix. Converged matrices stop
    too, so no result depends on the rest of the stack.

    Source: Anil et al. 2020 (arXiv 2002.09018), official implementation.
    """
    eye = torch.eye(start[-1].shape[-1], dtype=start[-1].dtype, device=start[-1].device)

    def error_of(product: Tensor) -> Tensor:
        return (product - eye).abs().amax((-2, -1), keepdim=True)

    results, best = start, error_of(start[-1])
    going = best >= tolerance
    for _ in range(steps):
        if not going.any():
            break
        proposed = step(*results)
        error = error_of(proposed[-1])
        going = going & (error < 1.2 * best)
        results = tuple(
            torch.where(going, new, old) for new, old in zip(proposed, results, strict=True)
        )
        best = torch.minimum(best, error)
        going = going & (error >= tolerance)
    return results
