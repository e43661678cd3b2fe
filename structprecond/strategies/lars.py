"""LARS: momentum with a separate learning rate for every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from structprecond.checks import as_number, check_flags
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import CommonOptions, from_keywords
from structprecond.core.state import State
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    Strategy,
    flag,
    fraction,
    nonnegative,
)
from structprecond.errors import HyperparameterError
from structprecond.structures.spec import Structure

_SMALLEST_RMS = 1e-3
"""With `always_scale`, the lower bound of a parameter's root mean square."""


@dataclass
class LARSState(State):
    """State of LARS for a stack `(b, *dims)`.

    Args:
        momentum_buffer: The moving sum of the scaled gradients `(b, *dims)`.
    """

    momentum_buffer: Tensor


@dataclass(frozen=True)
class LARSStrategy(Strategy[LARSState]):
    r"""The LARS rule, for each row of a stack.

    With the trust coefficient \(\tau\), the weight decay \(\lambda\), and momentum \(\mu\),

    \[ d = r \, (g + \lambda p), \quad
       r = \frac{\tau \|p\|}{\|g\| + \lambda \|p\| + \epsilon}, \quad
       b \leftarrow \mu b + (1 - \text{dampening}) d, \quad
       p \leftarrow p - \eta b. \]

    The first d is not dampened. With Nesterov momentum, the step is \(d + \mu b\). As published,
    \(d = g\), neither scaled nor decayed, if \(\lambda\), p or g is zero.

    Args:
        always_scale: Whether to scale d even then. So that zero parameters move, \(\|p\|\) counts
            as at least 1e-3 times the root of the number of entries. Default: False.

    Source: You et al. 2017 (arXiv 1708.03888), algorithm 1; the lower bound of the norm is that of
        Shazeer and Stern 2018 (arXiv 1804.04235), section 8.
    """

    always_scale: bool = False

    def __post_init__(self) -> None:
        check_flags(always_scale=self.always_scale)

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(None),
        "momentum": fraction(0.0),
        "dampening": Hyperparameter(0.0, lambda v: 0 <= as_number(v) <= 1, "a number from 0 to 1"),
        "weight_decay": nonnegative(0.0),
        "nesterov": flag(False),
        "trust_coefficient": nonnegative(1e-3),
        "eps": nonnegative(1e-8),
    }
    structures = ()

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> LARSState:
        """Return a zero buffer."""
        return LARSState(torch.zeros_like(like))

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Leave all weight decay to `update`."""
        return 1.0, 1.0

    def update(
        self, state: LARSState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        """Update the buffer and return the directions."""
        direction = self._scale(grad, hp, ctx)
        momentum = hp["momentum"]
        if momentum == 0:
            return direction
        # in the first step, the buffer is zero, and the gradient is not dampened
        later, damped = ctx.reached(2), 1.0 - hp["dampening"]
        weight = damped if later is True else 1.0
        if isinstance(later, Tensor):
            weight = torch.where(later, damped, 1.0).to(grad.dtype)
        buffer = state.momentum_buffer.mul_(momentum).add_(direction * weight)
        return direction.add_(buffer, alpha=momentum) if hp["nesterov"] else buffer

    def _scale(self, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> Tensor:
        decay = hp["weight_decay"]
        if decay == 0 and not self.always_scale:
            return grad
        params = ctx.params()
        norm, grad_norm = (torch.linalg.vector_norm(t.flatten(1), dim=1) for t in (params, grad))
        scaled = (norm > 0) & (grad_norm > 0) | self.always_scale
        if self.always_scale:
            norm.clamp_(min=_SMALLEST_RMS * grad[0].numel() ** 0.5)
        ratio = hp["trust_coefficient"] * norm / (grad_norm + decay * norm + hp["eps"])
        grad.mul_(_per_row(torch.where(scaled, ratio, 1.0), grad))
        return grad.addcmul_(params, _per_row(torch.where(scaled, ratio * decay, 0.0), grad))


def _per_row(values: Tensor, stack: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (stack.ndim - 1))


class LARS(StructuredOptimizer):
    """LARS, layer-wise adaptive rate scaling (You et al. 2017, arXiv 1708.03888).

    The update rule is documented at `LARSStrategy`. Each unit has its own trust ratio.

    Args:
        lr: Learning rate; required.
        momentum: Decay of the moving sum. Default: 0.0.
        dampening: Dampening of the momentum. Default: 0.0.
        weight_decay: Weight decay, scaled like the gradient. Default: 0.0, which also turns the
            scaling off unless `always_scale`.
        nesterov: Whether to use Nesterov momentum. Default: False.
        trust_coefficient: The size of an update relative to its parameter. Default: 1e-3.
        eps: Added to the denominator of the trust ratio. Default: 1e-8.
        always_scale: Whether to scale even if decay, parameter or gradient is 0. Default: False.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = LARS(model, lr=1.0, momentum=0.9, weight_decay=1e-4)
        >>> model(torch.ones(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        always_scale: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        strategy, hp = from_keywords(LARSStrategy, locals())
        if nesterov and (momentum == 0 or dampening != 0):
            raise HyperparameterError(
                "nesterov=True needs a momentum above 0 and no dampening, got "
                f"momentum={momentum!r} and dampening={dampening!r}."
            )
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)
