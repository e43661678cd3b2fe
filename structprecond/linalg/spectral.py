"""Bounds of spectral norms."""

from __future__ import annotations

import torch
from torch import Tensor


def spectral_norm_bound(
    matrix: Tensor,  # (*b, n, n)
    iterations: int = 2,
) -> Tensor:  # (*b,)
    r"""Return a cheap lower bound of the spectral norm of symmetric or skew-symmetric matrices.

    Power iterations from the longest row: \(v \leftarrow A v / \|A v\|\), and the bound is
    \(\|A v\|\) for the last v of unit length.

    Args:
        matrix: The matrices A.
        iterations: The number of products before the last one. Default: 2.

    Example:
        >>> spectral_norm_bound(torch.diag(torch.tensor([1.0, 3.0])))
        tensor(3.)
    """
    tiny = torch.finfo(matrix.dtype).tiny
    # scaled, so that no square overflows or underflows
    largest = matrix.abs().amax((-2, -1), keepdim=True).clamp_(min=tiny)
    A = matrix / largest
    longest = torch.linalg.vector_norm(A, dim=-1).argmax(-1, keepdim=True)
    v = A.take_along_dim(longest.unsqueeze(-1), -2).mT
    for _ in range(iterations + 1):
        v = A @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_(min=tiny))
    bound: Tensor = torch.linalg.vector_norm(v, dim=-2, keepdim=True) * largest
    return bound[..., 0, 0]
