"""Rounds low-precision parameters."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "stochastic", "kahan"]
"""See `StructuredOptimizer`."""


def is_low_precision(dtype: torch.dtype) -> bool:
    """Return whether a dtype is smaller than float32, in which updates are computed."""
    return dtype.itemsize < torch.float32.itemsize


def round_stochastically(
    values: Tensor,  # (b, *dims)
    dtype: torch.dtype,
    keys: Tensor,  # (b,)
) -> Tensor:  # (b, *dims)
    r"""Round up or down at random, so that the expectation is the value itself.

    A value x between neighbours \(a < b\) of the dtype becomes b with probability
    \((x - a) / (b - a)\), else a. Updates far below the last digit then count on average; rounding
    to the nearest would lose all of them.

    Args:
        values: The values, in float32.
        dtype: The dtype to round to.
        keys: What the random numbers of each row depend on, see `row_keys`.

    Source: Gupta et al. 2015 (arXiv 1502.02551), section 3.

    Example:
        >>> keys = row_keys(torch.tensor([7]), 1)
        >>> rounded = round_stochastically(torch.full((1, 10_000), 1.001), torch.bfloat16, keys)
        >>> bool((rounded.float().mean() - 1.001).abs() < 3e-4)
        True
    """
    nearest = values.to(dtype)
    error = values - nearest.to(values.dtype)
    towards = torch.full_like(nearest, math.inf).copysign_(error.to(dtype))
    neighbour = torch.nextafter(nearest, towards)
    gap = neighbour.to(values.dtype) - nearest.to(values.dtype)
    chance = torch.where(error == 0, 0.0, error / gap)
    drawn = uniform(keys.to(values.device), values.shape[1:])
    return torch.where(drawn < chance, neighbour, nearest)


def row_keys(
    seeds: Tensor,  # (b,), int64
    t: int | Tensor,  # (b,)
) -> Tensor:  # (b,), int32
    """Return what the random numbers of each row depend on: its seed and its update.

    Checkpoints hold both. So a resumed run repeats the bits, and ranks with the same rows agree,
    however these are stacked.

    Args:
        seeds: The seed of each row.
        t: The number of the update, or that of each row.
    """
    low, high = seeds.contiguous().view(torch.int32).view(-1, 2).unbind(1)
    if isinstance(t, Tensor):
        t = t.to(torch.int32)
    return _mix(_mix(_mix(low.clone()) ^ high) ^ t)


def uniform(keys: Tensor, dims: torch.Size) -> Tensor:  # (b, *dims), float32
    r"""Return random multiples of \(2^{-24}\) from \([0, 1)\), given keys and places in a row.

    Args:
        keys: The keys `(b,)`, int32.
        dims: The shape of a row.
    """
    places = torch.arange(dims.numel(), dtype=torch.int32, device=keys.device)
    # places are mixed first, so that rows are not shifted copies of each other
    bits = _mix(_mix(places) ^ keys[:, None])
    return _shifted(bits, 8).to(torch.float32).mul_(2.0**-24).view(-1, *dims)


def _mix(x: Tensor) -> Tensor:
    """Mix the bits of 32-bit integers in place, one to one.

    Source: Wellons 2018, "Prospecting for hash functions", the function lowbias32.
    """
    x ^= _shifted(x, 16)
    x *= 0x7FEB352D
    x ^= _shifted(x, 15)
    x *= 0x846CA68B - 2**32  # the same bits as a signed number
    x ^= _shifted(x, 16)
    return x


def _shifted(x: Tensor, by: int) -> Tensor:
    """Shift bits to the right, and fill up with zeros."""
    return (x >> by).bitwise_and_(2 ** (32 - by) - 1)
