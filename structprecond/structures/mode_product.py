"""Matricizations and mode products of stacked tensors `(b, d1, ..., dN)`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from math import prod
from typing import Literal

from torch import Size, Tensor

from structprecond.linalg.product import matmul
from structprecond.structures.base import StructuredMatrix
from structprecond.structures.dense import DenseMatrix

# Neighbouring axes as short as a convolution's kernel are multiplied together: one by one, setting
# up the products and copying around them takes longer than computing them.
_SHORT, _SHORT_TOGETHER = 7, 49

Method = Literal["matmat", "rmatmat", "outer_matmat"]


def matricize(
    tensor: Tensor,  # (b, d1, ..., dN)
    axis: int,
) -> Tensor:  # (b, d_axis, product of the other dims)
    """Flatten all axes but one: a view for the first and the last axis, so products are cheap.

    Args:
        tensor: The stack.
        axis: The axis k that stays, from 0 to N - 1; the batch dimension does not count.

    Example:
        >>> matricize(torch.zeros(5, 2, 3, 4), axis=2).shape
        torch.Size([5, 4, 6])
    """
    return _flatten(tensor.reshape(_around(tensor.shape, [axis])))


def multiply_axes(
    tensor: Tensor,  # (b, d1, ..., dN)
    matrices: Sequence[StructuredMatrix | None],
    method: Method,
) -> Tensor:  # (b, d1, ..., dN)
    r"""Multiply every axis of a stack by its own matrix.

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
    for axes, shape in _runs(dims, tuple(map(_is_dense, matrices))):
        # neighbours form one axis, multiplied by their Kronecker product
        matrix = reduce(_kronecker, (m.to(tensor.dtype) for m in _chosen(matrices, axes)))
        product: Tensor = getattr(matrix, method)(_flatten(tensor.reshape(shape)))
        b, before, n, after = shape
        tensor = product.reshape(b, n, before, after).transpose(1, 2)
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
    for axes, shape in _runs(tensor.shape, tuple(map(_is_dense, matrices))):
        run, X = _chosen(matrices, axes), _flatten(tensor.reshape(shape))
        if len(run) > 1:
            _average_traces_(run, matmul(X, X.mT), beta)
        else:
            run[0].add_inner_(X, beta, 1 - beta)


def _is_dense(matrix: StructuredMatrix | None) -> bool | None:
    """Return None for no matrix, else whether it may be multiplied together with others."""
    # subclasses may define products differently
    return None if matrix is None else type(matrix) is DenseMatrix


# cached, since this takes longer than the products of small matrices
@lru_cache(maxsize=1024)
def _runs(
    shape: Size, dense: tuple[bool | None, ...]
) -> list[tuple[list[int], tuple[int, int, int, int]]]:
    """Return lists of axes to multiply together, each with the shape `(b, before, n, after)`."""
    runs: list[list[int]] = []
    for axis in range(len(dense)):
        together = [*(runs[-1] if runs else []), axis]
        dims = [shape[i + 1] for i in together]
        short = all(dense[i] and dim <= _SHORT for i, dim in zip(together, dims, strict=True))
        if len(together) > 1 and short and prod(dims) <= _SHORT_TOGETHER:
            runs[-1] = together
        else:
            runs.append([axis])
    return [(run, _around(shape, run)) for run in runs if dense[run[0]] is not None]


def _around(shape: Size, run: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the shape `(b, before, n, after)` of a stack around neighbouring axes."""
    first, end = run[0] + 1, run[-1] + 2
    return shape[0], shape[1:first].numel(), shape[first:end].numel(), shape[end:].numel()


def _flatten(around: Tensor) -> Tensor:  # (b, before, n, after) to (b, n, before * after)
    """Return the matricizations: a view if nothing is before or after the axis."""
    if around.shape[-1] == 1:
        # `flatten` would give one transposed matrix a slow stride, see `matmul`
        return around.squeeze(-1).mT
    return around.transpose(1, 2).flatten(2)


def _chosen(
    matrices: Sequence[StructuredMatrix | None], axes: Sequence[int]
) -> list[StructuredMatrix]:
    return [matrix for axis in axes if (matrix := matrices[axis]) is not None]


def _kronecker(left: StructuredMatrix, right: StructuredMatrix) -> DenseMatrix:
    assert isinstance(left, DenseMatrix)
    assert isinstance(right, DenseMatrix)
    a, b = left.mat, right.mat
    n = a.shape[-1] * b.shape[-1]
    product = a[..., :, None, :, None] * b[..., None, :, None, :]
    return DenseMatrix(product.reshape(*a.shape[:-2], n, n))


def _average_traces_(run: Sequence[StructuredMatrix], inner: Tensor, beta: float) -> None:
    """Average the partial traces of the inner products of all axes of a run together."""
    dims = [matrix.shape[-1] for matrix in run]
    for i, matrix in enumerate(run):
        before, after = prod(dims[:i]), prod(dims[i + 1 :])
        split = inner.view(len(inner), before, dims[i], after, before, dims[i], after)
        trace = split.diagonal(dim1=3, dim2=6).diagonal(dim1=1, dim2=3).sum((-2, -1))
        wide = matrix.to(trace.dtype)
        wide.mul_(beta).add_(DenseMatrix(trace), alpha=1 - beta)
        if wide.dtype != matrix.dtype:
            matrix.copy_(wide)
