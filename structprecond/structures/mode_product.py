"""Matricizations and mode products of stacked tensors `(b, d1, ..., dN)`."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from structprecond.structures.base import StructuredMatrix


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
    matrix: StructuredMatrix,  # (b, d_axis, d_axis)
    axis: int,
    transpose: bool = False,
) -> Tensor:  # (b, d1, ..., dN)
    r"""Multiply one axis of a stack of tensors with a stack of structured matrices.

    Computes \(G \times_k A\), or \(G \times_k A^\top\) with `transpose`.

    Args:
        tensor: The stack G.
        matrix: The stack A.
        axis: The axis k, from 0 to N - 1; the batch dimension does not count.
        transpose: Whether to multiply with the transposes.

    Example:
        >>> from structprecond import DiagonalMatrix
        >>> A = DiagonalMatrix(torch.tensor([[1.0, 2.0]]))
        >>> mode_product(torch.ones(1, 2, 2), A, axis=1)
        tensor([[[1., 2.],
                 [1., 2.]]])
    """
    dims = tensor.shape[1:]
    if axis == len(dims) - 1 and len(dims) > 1:
        rows = tensor.reshape(-1, prod(dims[:-1]), dims[-1])
        product = matrix.matmat_right(rows) if transpose else matrix.rmatmat_right(rows)
        return product.reshape(tensor.shape)
    flat = matricize(tensor, axis)
    product = matrix.rmatmat(flat) if transpose else matrix.matmat(flat)
    moved = torch.Size([dims[axis], *dims[:axis], *dims[axis + 1 :]])
    return product.view(-1, *moved).movedim(1, axis + 1)
