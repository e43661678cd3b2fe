"""Moving averages and bias corrections that several strategies share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from structprecond.strategies.base import Hyperparameter


def pair_of_fractions(default: tuple[float, float]) -> Hyperparameter:
    """Return a hyperparameter for two numbers from 0 to below 1, such as Adam's betas."""

    def check(value: Any) -> bool:
        first, second = value
        return bool(0 <= first < 1 and 0 <= second < 1)

    return Hyperparameter(default, check, "a pair of numbers from 0 to below 1")


def fraction_or_default(default: float) -> Hyperparameter:
    """Return a hyperparameter for a number below 1, where a negative one stands for another."""
    return Hyperparameter(default, lambda v: v < 1, "a number below 1; negative for betas[1]")


def factor_decay(hp: Mapping[str, Any]) -> float:
    """Return the decay of the factors: `shampoo_beta`, or `betas[1]` if that is negative."""
    beta: float = hp["shampoo_beta"] if hp["shampoo_beta"] >= 0 else hp["betas"][1]
    return beta


def correction(beta: float, steps: Tensor, like: Tensor) -> float | Tensor:
    r"""Return \(1 - \beta^t\) for the update t of each row.

    Args:
        beta: The decay of the moving average.
        steps: The number of updates before this one, `(b,)`: t is one more.
        like: The stack `(b, *dims)` that the result is to be multiplied with.

    Returns:
        A number if all rows are at the same update, else one number per row, `(b, 1, ...)`.
    """
    first = int(steps[0])
    if bool((steps == first).all()):
        return float(1 - beta ** (first + 1))
    each = 1 - beta ** (steps + 1).double()
    return each.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def update_moments(
    exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, betas: tuple[float, float]
) -> None:
    r"""Average in place: \(m \leftarrow \beta_1 m + (1-\beta_1) g\), \(v\) alike with \(g^2\)."""
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])


def adam_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    betas: tuple[float, float],
    eps: float,
    steps: Tensor,
) -> Tensor:
    r"""Return Adam's direction \(\hat m / (\sqrt{\hat v} + \epsilon)\) with bias corrections.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.
    """
    first, second = (correction(beta, steps, exp_avg) for beta in betas)
    denominator = exp_avg_sq.sqrt().div_(second**0.5).add_(eps)
    return torch.div(exp_avg, denominator, out=denominator).div_(first)
