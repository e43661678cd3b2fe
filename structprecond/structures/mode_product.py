"""Matricizations and mode products of stacked tensors `(b, d1, ..., dN)`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


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
