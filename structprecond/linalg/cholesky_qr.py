"""Orthogonal factors from products and Cholesky decompositions alone, for accelerators."""

from __future__ import annotations

import torch
from torch import Tensor

# largest distance of X'X from the identity after the first round; the second round squares it
_LARGEST_ERROR = 0.1


def cholesky_qr2(
    matrix: Tensor,  # (b, n, n)
) -> tuple[Tensor, Tensor]:  # (b, n, n), (b,)
    r"""Return Q of \(A = Q R\), with a positive diagonal of R, for well-conditioned A.

    \[ X \leftarrow A D^{-1}, \quad \text{twice: } X \leftarrow X L^{-\top}
       \text{ with } L L^\top = X^\top X, \]

    where D holds the lengths of the columns of A, which do not affect Q. The first round loses
    orthogonality with the square of the condition number of \(A D^{-1}\), the second restores it.
    Nothing goes column by column or needs a host-device sync.

    Returns:
        The factors, and which of them are usable, a mask `(b,)` on the device of A.

    Source: Yamamoto et al. 2015, "Roundoff error analysis of the CholeskyQR2 algorithm" (ETNA 44).

    Example:
        >>> Q, reliable = cholesky_qr2(torch.tensor([[[0.0, 2.0], [1.0, 0.0]], [[1.0, 1.0]] * 2]))
        >>> reliable
        tensor([ True, False])
        >>> Q[0]
        tensor([[0., 1.],
                [1., 0.]])
    """
    X = matrix / torch.linalg.vector_norm(matrix, dim=-2, keepdim=True)
    X, decomposed = _round(X, X.mT @ X)
    gram = X.mT @ X
    error = gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # a comparison with NaN is False
    close = torch.linalg.vector_norm(error, dim=(-2, -1)) < _LARGEST_ERROR
    X, decomposed_again = _round(X, gram)
    return X, close & decomposed & decomposed_again


def _round(X: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    L, info = torch.linalg.cholesky_ex(gram)
    return torch.linalg.solve_triangular(L.mT, X, upper=True, left=False), info == 0
