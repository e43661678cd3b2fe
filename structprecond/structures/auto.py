"""What `structures="auto"` stands for: dense factors where any model can afford them."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from structprecond.structures.dense import DenseMatrix
from structprecond.structures.spec import Structure

LONG = 1024
"""Axes up to this length always get a factor: its refresh takes a fraction of a second."""

THIN = 8
"""A longer axis gets a factor if it is at most this many times as long as the others together."""


def auto_structures(dims: Sequence[int]) -> tuple[Structure, ...]:
    r"""Return `dense` for every axis that can afford it, and None for the others.

    Axis k of a tensor of shape \(d_1 \times \dots \times d_N\) gets no factor if

    \[ d_k > 1024 \quad \text{and} \quad d_k > 8 \prod_{j \ne k} d_j. \]

    The gradient of such an axis has a rank below \(d_k / 8\), so at least 7 of 8 directions of the
    factor are a null space, while the factor has more than 8 times as many numbers as the tensor
    and a refresh takes \(O(d_k^3)\) operations. `docs/measurements.md` has the losses behind 1024
    and 8.

    Args:
        dims: The sizes of the axes.

    Example:
        >>> auto_structures((128, 9216)), auto_structures((256, 2048))
        ((<class '...DenseMatrix'>, None), (<class '...DenseMatrix'>, <class '...DenseMatrix'>))
    """
    return tuple(
        None if dim > LONG and dim > THIN * others else DenseMatrix
        for dim, others in zip(dims, sizes_of_others(dims), strict=True)
    )


def sizes_of_others(dims: Sequence[int]) -> list[int]:
    """Return for each axis the product of the lengths of the other axes.

    Example:
        >>> sizes_of_others((2, 3, 5))
        [15, 10, 6]
    """
    return [prod(d for j, d in enumerate(dims) if j != axis) for axis in range(len(dims))]
