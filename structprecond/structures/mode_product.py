"""Matricizations and mode products of stacked tensors `(b, d1, ..., dN)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import prod
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import TypeIs

from structprecond.structures.base import StructuredMatrix
from structprecond.structures.dense import DenseMatrix

# Axes as short as those of a convolution's kernel: products along one of them take longer to set up
# than to compute, and the copies around them longer still.
_SHORT, _SHORT_TOGETHER = 7, 49


def matricize(
    tensor: Tensor,  # (b, d1, ..., dN)
    axis: int,
) -> Tensor:  # (b, d_axis, product of the other dims)
    """Flatten all axes but one: a view for the first and the last axis, where products are cheap.

    Args:
        tensor: The stack.
        axis: The axis k that stays, from 0 to N - 1; the batch dimension does not count.

    Example:
        >>> matricize(torch.zeros(5, 2, 3, 4), axis=2).shape
        torch.Size([5, 4, 6])
    """
    if axis == tensor.ndim - 2:
        return tensor.flatten(1, -2).mT if tensor.ndim > 2 else tensor.unsqueeze(-1)
    return tensor.movedim(axis + 1, 1).flatten(2)


def mode_product(
    tensor: Tensor,  # (b, d1, ..., dN)
    multiply: Callable[[Tensor], Tensor],  # (b, d_axis, m) to (b, d_axis, m)
    axis: int,
) -> Tensor:  # (b, d1, ..., dN)
    r"""Multiply one axis of a stack of tensors: \(G \times_k A\) for a linear map A.

    Args:
        tensor: The stack G.
        multiply: Multiplies matricizations `(b, d_axis, m)` with A from the left, such as the
            methods `matmat`, `rmatmat` and `outer_matmat` of a structured matrix.
        axis: The axis k, from 0 to N - 1; the batch dimension does not count.

    Example:
        >>> from structprecond import DiagonalMatrix
        >>> A = DiagonalMatrix(torch.tensor([[1.0, 2.0]]))
        >>> mode_product(torch.ones(1, 2, 2), A.matmat, axis=1)
        tensor([[[1., 2.],
                 [1., 2.]]])
    """
    dims = tensor.shape[1:]
    product: Tensor = multiply(matricize(tensor, axis))
    if axis == len(dims) - 1:
        return product.mT.reshape(tensor.shape)
    moved = (*product.shape[:2], *dims[:axis], *dims[axis + 1 :])
    return product.reshape(moved).movedim(1, axis + 1)


def multiply_axes(
    tensor: Tensor,  # (b, d1, ..., dN)
    matrices: Sequence[StructuredMatrix | None],
    method: Literal["matmat", "rmatmat", "outer_matmat"],
) -> Tensor:  # (b, d1, ..., dN)
    r"""Multiply every axis of a stack with a matrix of its own.

    \[ G \times_1 A_1 \dots \times_N A_N, \text{ with } A_k^\top \text{ for "rmatmat" and }
       A_k A_k^\top \text{ for "outer_matmat"}. \]

    Args:
        tensor: The stack G.
        matrices: A stack of matrices per axis; None for an axis to leave alone.
        method: The name of the product.

    Example:
        >>> from structprecond import DiagonalMatrix
        >>> A = DiagonalMatrix(torch.tensor([[1.0, 2.0]]))
        >>> multiply_axes(torch.ones(1, 2, 2), [A, A], "matmat")
        tensor([[[1., 2.],
                 [2., 4.]]])
    """
    dims = tensor.shape
    for axis, run in enumerate(_runs(matrices)):
        if isinstance(run, tuple):
            # neighbours are one axis, along which their Kronecker product multiplies
            tensor = tensor.flatten(axis + 1, axis + len(run))
            matrix: StructuredMatrix | None = reduce(
                _kronecker, (matrix.to(tensor.dtype) for matrix in run)
            )
        else:
            matrix = run
        if matrix is not None:
            tensor = mode_product(tensor, getattr(matrix.to(tensor.dtype), method), axis)
    return tensor.reshape(dims)


def average_inner_(
    matrices: Sequence[StructuredMatrix | None],
    tensor: Tensor,  # (b, d1, ..., dN)
    beta: float,
) -> None:
    r"""Average inner products of all matricizations in place.

    \[ A_k \leftarrow \beta A_k + (1 - \beta) \Pi(G_{(k)} G_{(k)}^\top). \]

    Args:
        matrices: A stack of matrices per axis; None for an axis to leave alone.
        tensor: The stack G.
        beta: The decay.

    Example:
        >>> A = DenseMatrix(torch.zeros(1, 2, 2))
        >>> average_inner_([A], torch.tensor([[1.0, 2.0]]), beta=0.5)
        >>> A.mat
        tensor([[[0.5000, 1.0000],
                 [1.0000, 2.0000]]])
    """
    for axis, run in enumerate(_runs(matrices)):
        if isinstance(run, tuple):
            tensor = tensor.flatten(axis + 1, axis + len(run))
            _average_short_(run, matricize(tensor, axis), beta)
        elif run is not None:
            run.add_inner_(matricize(tensor, axis), beta, 1 - beta)


def _runs(
    matrices: Sequence[StructuredMatrix | None],
) -> list[StructuredMatrix | tuple[DenseMatrix, ...] | None]:
    """Put neighbouring dense matrices of short axes into tuples."""
    runs: list[StructuredMatrix | tuple[DenseMatrix, ...] | None] = []
    for matrix in matrices:
        last = runs[-1] if runs else None
        before = last if isinstance(last, tuple) else (last,)
        together = [m for m in (*before, matrix) if _is_short(m)]
        size = prod(m.shape[-1] for m in together)
        if len(together) == len(before) + 1 and size <= _SHORT_TOGETHER:
            runs[-1] = tuple(together)
        else:
            runs.append(matrix)
    return runs


def _is_short(matrix: StructuredMatrix | None) -> TypeIs[DenseMatrix]:
    # subclasses may mean something else by a product
    return type(matrix) is DenseMatrix and matrix.shape[-1] <= _SHORT


def _kronecker(left: DenseMatrix, right: DenseMatrix) -> DenseMatrix:
    a, b = left.mat, right.mat
    n = a.shape[-1] * b.shape[-1]
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return DenseMatrix(product.reshape(*a.shape[:-2], n, n))


def _average_short_(run: Sequence[DenseMatrix], X: Tensor, beta: float) -> None:
    """Average the inner products of short axes, which are partial traces of that of all of them."""
    inner = X @ X.mT
    dims = [matrix.shape[-1] for matrix in run]
    for i, matrix in enumerate(run):
        before, after = prod(dims[:i]), prod(dims[i + 1 :])
        shape = (len(inner), before, dims[i], after, before, dims[i], after)
        trace = torch.einsum("bpiqpjq->bij", inner.view(shape))
        wide = matrix.to(trace.dtype)
        wide.mul_(beta).add_(DenseMatrix(trace), alpha=1 - beta)
        if wide.dtype != matrix.dtype:
            matrix.copy_(wide)
