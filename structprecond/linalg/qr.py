"""Orthogonal factors of stacks of square matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from structprecond.linalg.cholesky_qr import cholesky_qr2
from structprecond.linalg.decompose import decompose
from structprecond.linalg.precision import full_precision
from structprecond.linalg.product import matmul

# Measured on 2 cores, float32: from this size on, 3 times as fast as LAPACK, whose panels are
# narrower; below, panels are too small for fast products.
_SMALLEST_BLOCKED = 512
_PANEL = 128


def orthogonal_factor(
    matrix: Tensor,  # (*b, n, n)
) -> Tensor:  # (*b, n, n)
    r"""Return Q of \(A = Q R\), with R upper triangular.

    Q is orthogonal even if A is rank-deficient or zero. The CPU uses Householder reflections;
    accelerators use `cholesky_qr2` for well-conditioned matrices. The signs of the columns, which
    are those of the diagonal of R, depend on the method.

    Args:
        matrix: The stack \(A\), of any scale, in float32 or float64.

    Raises:
        DecompositionError: If a matrix cannot be decomposed in float64 either; names the rows.

    Source: Golub and Van Loan, "Matrix Computations", section 5.2.

    Example:
        >>> orthogonal_factor(torch.tensor([[0.0, 2.0], [1.0, 0.0]])).abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    return factor_and_diagonal(matrix)[0]


def factor_and_diagonal(
    matrix: Tensor,  # (*b, n, n)
) -> tuple[Tensor, Tensor]:  # (*b, n, n), (*b, n)
    r"""Return Q and the diagonal of R of \(A = Q R\), as in `orthogonal_factor`.

    \(|R_{jj}|\) is the distance of column j from the span of the columns before it.

    Example:
        >>> factor_and_diagonal(torch.tensor([[1.0, 1.0], [0.0, 2.0]]))[1].abs()
        tensor([1., 2.])
    """
    # columns of 1e-30 would underflow inside; one scale per matrix does not change the factor
    largest, smallest = matrix.amax((-2, -1), keepdim=True), matrix.amin((-2, -1), keepdim=True)
    scale = torch.maximum(largest, -smallest)
    with full_precision():
        factor, diagonal = decompose(
            _factor_and_diagonal, matrix / torch.where(scale > 0, scale, 1.0)
        )
    return factor, diagonal * scale.squeeze(-1)


def _factor_and_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor]:
    if not _reflections_are_slow(matrix.device):
        return _reflect(matrix)
    flat = matrix.reshape(-1, *matrix.shape[-2:])
    factor, reliable = cholesky_qr2(flat)
    diagonal = (factor * flat).sum(-2)
    # the only host-device sync, besides the check for success
    if not bool(reliable.all()):
        others = (~reliable).nonzero().squeeze(1)
        factor[others], diagonal[others] = _reflect(flat[others])
    return factor.view(matrix.shape), diagonal.view(matrix.shape[:-1])


def _reflections_are_slow(device: torch.device) -> bool:
    """Return whether a device is slow at work that goes column by column."""
    return device.type != "cpu"


def _reflect(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Do what `torch.linalg.qr` does without the triangular factor, in half the time."""
    if matrix.device.type != "cpu" or matrix.shape[-1] < _SMALLEST_BLOCKED:
        reflected, tau = torch.geqrf(matrix)
        factor: Tensor = torch.linalg.householder_product(reflected, tau)
        return factor, reflected.diagonal(dim1=-2, dim2=-1)
    factor, diagonal = matrix.new_empty(matrix.shape), matrix.new_empty(matrix.shape[:-1])
    flat, flat_factor = (t.reshape(-1, *t.shape[-2:]) for t in (matrix, factor))
    stacks = (flat, flat_factor, diagonal.view(-1, diagonal.shape[-1]))
    for one in zip(*stacks, strict=True):
        _reflect_by_panels(*one)
    return factor, diagonal


def _reflect_by_panels(matrix: Tensor, factor: Tensor, diagonal: Tensor) -> None:
    """Write the orthogonal factor of one matrix, and the diagonal of the triangular one.

    Reflections are applied one panel of columns at a time, so nearly all work is large products.
    """
    # transposed, so that panels of columns are contiguous, as LAPACK wants them
    columns = matrix.mT.clone(memory_format=torch.contiguous_format)
    panels = []
    for start in range(0, len(columns), _PANEL):
        stop = start + _PANEL
        reflected, tau = torch.geqrf(columns[start:stop, start:].mT)
        diagonal[start:stop] = reflected.diagonal()
        rows, T = block_reflector(reflected, tau)
        rest = columns[stop:, start:]
        if len(rest):
            rest.addmm_((rest @ rows.mT) @ T, rows, alpha=-1)
        panels.append((rows, T))
    factor.zero_().diagonal().fill_(1.0)
    for i, (rows, T) in reversed(list(enumerate(panels))):
        corner = factor[i * _PANEL :, i * _PANEL :]
        corner.addmm_(rows.mT, T @ (rows @ corner), alpha=-1)


def block_reflector(
    reflected: Tensor,  # (*b, n, k)
    tau: Tensor,  # (*b, k)
) -> tuple[Tensor, Tensor]:  # (*b, k, n), (*b, k, k)
    r"""Return \(V^\top\) and T of \(H_1 \dots H_k = I - V T V^\top\), from `torch.geqrf`.

    V holds the reflection vectors, and
    \(T^{-1} = \mathrm{striu}(V^\top V) + \mathrm{diag}(1 / \tau)\).

    Args:
        reflected: The reflection vectors, below the diagonal.
        tau: The factors of the reflections; 0 for no reflection.

    Source: Schreiber and Van Loan 1989, "A storage-efficient WY representation"; Puglisi 1992 for
        the inverse of T.

    Example:
        >>> rows, T = block_reflector(*torch.geqrf(torch.tensor([[3.0], [4.0]])))
        >>> torch.eye(2) - rows.mT @ T @ rows
        tensor([[-0.6000, -0.8000],
                [-0.8000,  0.6000]])
    """
    rows = reflected.mT.triu(1)
    rows.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    inverse = matmul(rows, rows.mT).triu_(1)
    # a column of zeros has no reflection: tau = 0, and T has a row and column of zeros
    inverse.diagonal(dim1=-2, dim2=-1).copy_(1 / tau)
    eye = torch.eye(tau.shape[-1], dtype=tau.dtype, device=tau.device)
    return rows, torch.linalg.solve_triangular(inverse, eye.expand_as(inverse), upper=True)


def transposed(
    stack: Tensor,  # (*b, m, n)
) -> Tensor:  # (*b, n, m)
    """Return contiguous transposes.

    Example:
        >>> transposed(torch.tensor([[1, 2], [3, 4]]))
        tensor([[1, 3],
                [2, 4]])
    """
    if stack.device.type != "cpu" or stack.shape[-1] < _SMALLEST_BLOCKED or stack.ndim == 2:
        return stack.mT.contiguous()
    # torch transposes single matrices by blocks, stacks entry by entry, 5 times slower
    copy = stack.new_empty(stack.mT.shape)
    for one, target in zip(
        stack.flatten(0, -3).unbind(), copy.flatten(0, -3).unbind(), strict=True
    ):
        target.copy_(one.mT)
    return copy
