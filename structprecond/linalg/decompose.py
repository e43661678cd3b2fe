"""Decompositions of stacks of matrices, retried in float64 where they fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from structprecond.errors import DecompositionError

Decomposition = Callable[..., tuple[Tensor, ...]]


def decompose(
    function: Decomposition,
    *stacks: Tensor,  # (*b, n, n), then any (*b, ...)
) -> tuple[Tensor, ...]:
    """Apply a decomposition to stacks of matrices, and retry matrices that fail in float64.

    If one matrix fails, LAPACK fails for the whole stack or returns NaN for that matrix. Then the
    rows (entries of the first dimension) are decomposed one by one, and in float64 if that fails.

    Args:
        function: The decomposition; non-finite results count as failure.
        stacks: Its arguments; the first holds the matrices.

    Returns:
        The results of the function, in the dtype of the first stack.

    Raises:
        DecompositionError: If rows fail in float64 too; names them.

    Example:
        >>> decompose(torch.linalg.eigh, torch.diag(torch.tensor([1.0, 3.0])))[0]
        tensor([1., 3.])
    """
    try:
        results = function(*stacks)
        if _succeeded(results):
            return results
    except LinAlgError:
        pass
    one_matrix = stacks[0].ndim == 2
    rows = [stacks] if one_matrix else list(zip(*(s.split(1) for s in stacks), strict=True))
    attempts = [_decompose_row(function, row) for row in rows]
    if failed := [i for i, attempt in enumerate(attempts) if not attempt]:
        raise DecompositionError(
            f"Could not decompose the matrices {failed} of a stack of shape "
            f"{tuple(stacks[0].shape)}, not even in float64. Check them for non-finite numbers, "
            "and damp singular matrices.",
            failed,
        )
    return attempts[0] if one_matrix else tuple(map(torch.cat, zip(*attempts, strict=True)))


def _decompose_row(function: Decomposition, row: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the results for one row, or () if it fails in float64 too."""
    dtype = row[0].dtype
    for precision in dict.fromkeys((dtype, torch.float64)):
        try:
            results = tuple(t.to(dtype) for t in function(*(t.to(precision) for t in row)))
        except LinAlgError:
            continue
        if _succeeded(results):
            return results
    return ()


def _succeeded(results: Sequence[Tensor]) -> bool:
    # a sum is finite only if all terms are, and takes a tenth of the time of isfinite().all()
    if bool(torch.stack([t.sum() for t in results]).isfinite().all()):
        return True
    # finite terms may have an infinite sum
    return all(bool(t.isfinite().all()) for t in results)
