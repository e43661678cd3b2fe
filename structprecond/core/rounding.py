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


def round_stochastically(values: Tensor, dtype: torch.dtype) -> Tensor:
    r"""Round up or down at random, so that the expectation is the value itself.

    A value x between neighbours \(a < b\) of the dtype becomes b with probability
    \((x - a) / (b - a)\), else a. Updates far below the last digit then count on average; rounding
    to the nearest would lose all of them.

    Args:
        values: The values, in float32.
        dtype: The dtype to round to. Random numbers come from torch's global generator.

    Source: Gupta et al. 2015 (arXiv 1502.02551), section 3.

    Example:
        >>> rounded = round_stochastically(torch.full((10_000,), 1.001), torch.bfloat16)
        >>> bool((rounded.float().mean() - 1.001).abs() < 3e-4)
        True
    """
    nearest = values.to(dtype)
    error = values - nearest.to(values.dtype)
    towards = torch.full_like(nearest, math.inf).copysign_(error.to(dtype))
    neighbour = torch.nextafter(nearest, towards)
    gap = neighbour.to(values.dtype) - nearest.to(values.dtype)
    chance = torch.where(error == 0, 0.0, error / gap)
    return torch.where(torch.rand_like(values) < chance, neighbour, nearest)
