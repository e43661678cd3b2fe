"""Products that are known to be symmetric: only half of each is computed."""

from __future__ import annotations

import torch
from torch import Tensor

# Measured on 2 cores, float32: from this size on, saved operations outweigh copying a triangle.
_SMALLEST_HALVED = 768
_STRIPS = 4


def baddgram(
    summand: Tensor,  # (b, n, n) symmetric
    X: Tensor,  # (b, n, m)
    *,
    beta: float,
    alpha: float,
    out: Tensor,  # (b, n, n)
) -> Tensor:  # (b, n, n)
    """Write `beta * summand + alpha * X @ X.mT` to `out` and return it.

    `summand` may be `out`, and is not read if `beta` is 0. `X` shares no memory with `out`.

    Example:
        >>> X, out = torch.tensor([[[1.0, 2.0], [0.0, 1.0]]]), torch.empty(1, 2, 2)
        >>> baddgram(out, X, beta=0, alpha=1, out=out)
        tensor([[[5., 2.],
                 [2., 1.]]])
    """
    if _is_halved(out, alpha):
        return _lower_half(summand, X, X, beta, alpha, out)
    return _baddbmm(summand, X, X.mT, beta, alpha, out)


def baddbmm_commuting(
    summand: Tensor,  # (b, n, n) symmetric
    A: Tensor,  # (b, n, n) symmetric
    B: Tensor,  # (b, n, n) symmetric
    *,
    beta: float,
    alpha: float,
    out: Tensor,  # (b, n, n)
) -> Tensor:  # (b, n, n)
    """Write `beta * summand + alpha * A @ B` to `out` and return it.

    A and B must commute, as polynomials of one matrix do, and share no memory with `out`.
    `summand` may be `out`, and is not read if `beta` is 0.

    Example:
        >>> A, out = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), torch.empty(1, 2, 2)
        >>> baddbmm_commuting(A, A, A, beta=-4, alpha=1, out=out)
        tensor([[[-3.,  0.],
                 [ 0., -3.]]])
    """
    if _is_halved(out, alpha):
        return _lower_half(summand, A, B, beta, alpha, out)
    return _baddbmm(summand, A, B, beta, alpha, out)


def _is_halved(out: Tensor, alpha: float) -> bool:
    return out.shape[-1] >= _SMALLEST_HALVED and out.device.type == "cpu" and alpha != 0


def _baddbmm(
    summand: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float, out: Tensor
) -> Tensor:
    if beta == 0 and alpha == 1:
        return torch.bmm(A, B, out=out)
    if alpha == 0:
        # oneDNN would return the summand without its factor
        return out.zero_() if beta == 0 else torch.mul(summand, beta, out=out)
    return torch.baddbmm(summand, A, B, beta=beta, alpha=alpha, out=out)


def _lower_half(
    summand: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float, out: Tensor
) -> Tensor:
    r"""Compute the lower half of \(\beta S + \alpha A B^\top\) in strips, and mirror it."""
    n = out.shape[-1]
    size = -(-n // _STRIPS)
    # one by one: torch transposes single matrices faster than stacks of them
    for S, a, b, one in zip(summand.unbind(), A.unbind(), B.unbind(), out.unbind(), strict=True):
        for start in range(0, n, size):
            rows, stop = slice(start, start + size), min(start + size, n)
            strip = one[rows, :stop]
            torch.addmm(S[rows, :stop], a[rows], b[:stop].mT, beta=beta, alpha=alpha, out=strip)
            one[:start, rows] = strip[:, :start].mT
    return out
