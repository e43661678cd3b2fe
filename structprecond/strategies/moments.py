"""Moving averages shared by several strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from structprecond.checks import as_number
from structprecond.core.strategy import Hyperparameter, StepContext


def fraction_or_default(default: float) -> Hyperparameter:
    """Return a hyperparameter for a number below 1; negative numbers mean `betas[1]`."""

    def check(value: Any) -> bool:
        return -math.inf < as_number(value) < 1

    return Hyperparameter(default, check, "a finite number below 1; negative for betas[1]")


def factor_decay(hp: Mapping[str, Any]) -> float:
    """Return the decay of the factors: `shampoo_beta`, or `betas[1]` if that is negative."""
    beta: float = hp["shampoo_beta"] if hp["shampoo_beta"] >= 0 else hp["betas"][1]
    return beta


def adam_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    betas: tuple[float, float],
    eps: float,
    ctx: StepContext | None,
    nesterov: bool = False,
) -> Tensor:
    r"""Update moments in place and return Adam's direction, by one call of torch's fused kernel.

    \[ m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
       v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
       \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}. \]

    Args:
        exp_avg: The first moment m `(b, *dims)`.
        exp_avg_sq: The second moment v `(b, *dims)`.
        grad: The gradient g `(b, *dims)`.
        betas: The decays of m and v.
        eps: Added to the root of the second moment.
        ctx: The context with the update t of each row; None for no bias correction.
        nesterov: Whether the numerator is \(\beta_1 m + (1 - \beta_1) g\), without bias correction.
            Default: False.

    Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.
    """
    direction = torch.zeros_like(exp_avg)
    stacks = [direction, grad.contiguous(), exp_avg, exp_avg_sq]
    # there is no bias after infinitely many updates
    t = torch.inf if ctx is None else ctx.t
    if isinstance(t, Tensor):
        times = t.to(grad.device, torch.float32)
        lists = [list(stack.unbind()) for stack in stacks]
    else:
        times = torch.full((1,), float(t), dtype=torch.float32, device=grad.device)
        lists = [[stack] for stack in stacks]
    params, grads, exp_avgs, exp_avg_sqs = lists
    torch._fused_adam_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        list(times.unbind()),
        lr=-1.0,  # the kernel subtracts from the parameter, which is zero
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    if nesterov:
        rest = (exp_avg_sq.sqrt() + eps).reciprocal_().mul_(grad)
        direction.lerp_(rest, 1 - betas[0])
    return direction
