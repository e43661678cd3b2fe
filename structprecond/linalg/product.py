"""Products of stacks of matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul(
    A: Tensor,  # (*b, n, k)
    B: Tensor,  # (*b, k, m)
) -> Tensor:  # (*b, n, m)
    r"""Return \(A B\), as `A @ B` does.

    For a stack of one transposed matrix, `@` sets the batch stride to that of a row, which makes
    oneDNN much slower.

    Example:
        >>> matmul(torch.eye(2).expand(1, 2, 2).mT, torch.ones(1, 2, 1)).shape
        torch.Size([1, 2, 1])
    """
    if A.ndim == B.ndim == 3 and len(A) == len(B):
        return torch.bmm(A, B)
    return A @ B


def as_stack(
    X: Tensor,  # (*b, n, m)
) -> Tensor:  # (prod(b), n, m)
    """Flatten the batch dimensions; stacks keep their strides, which `reshape` changes as `@` does.

    Example:
        >>> as_stack(torch.ones(2, 3, 4, 5)).shape
        torch.Size([6, 4, 5])
    """
    return X if X.ndim == 3 else X.reshape(X.shape[:-2].numel(), *X.shape[-2:])
