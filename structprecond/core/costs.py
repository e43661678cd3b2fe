"""What Kronecker factors cost."""

from __future__ import annotations

from functools import lru_cache

from structprecond.structures import StructuredMatrix


@lru_cache
def count_entries(structure: type[StructuredMatrix], dim: int) -> int:
    """Return how many numbers a matrix of a structure stores; allocates nothing.

    Example:
        >>> from structprecond import DenseMatrix
        >>> count_entries(DenseMatrix, 10**6)
        1000000000000
    """
    try:
        made = structure.zeros(dim, device="meta")
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        # a user's `from_dense` may look at values; at most, it keeps all of them
        return dim**2
    return sum(t.numel() for t in made.named_tensors().values())
