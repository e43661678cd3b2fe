"""AdamW, for parameters that other strategies leave out, and as a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import CommonOptions, from_keywords
from structprecond.core.state import State
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    Strategy,
    nonnegative,
    pair_of_fractions,
)
from structprecond.strategies.moments import adam_direction
from structprecond.structures.spec import Structure


@dataclass
class AdamWState(State):
    """State of AdamW for a stack `(b, *dims)`.

    Args:
        exp_avg: The first moment `(b, *dims)`.
        exp_avg_sq: The second moment `(b, *dims)`.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class AdamWStrategy(Strategy[AdamWState]):
    r"""The AdamW rule, as in `torch.optim.AdamW`.

    \[ p \leftarrow p - \eta \lambda p, \quad
       m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad
       v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
       p \leftarrow p - \eta \frac{m / (1 - \beta_1^t)}
                               {\sqrt{v / (1 - \beta_2^t)} + \epsilon}. \]

    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
    """

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(1e-3),
        "betas": pair_of_fractions((0.9, 0.999)),
        "eps": nonnegative(1e-8),
        "weight_decay": nonnegative(1e-2),
    }
    structures = ()

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> AdamWState:
        """Return zero moments."""
        return AdamWState(torch.zeros_like(like), torch.zeros_like(like))

    def update(
        self, state: AdamWState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        """Update the moments and return the directions."""
        return adam_direction(state.exp_avg, state.exp_avg_sq, grad, hp["betas"], hp["eps"], ctx)


class AdamW(StructuredOptimizer):
    """AdamW with this library's checkpoints, skipped steps and groupings.

    The update rule is documented at `AdamWStrategy`.

    Args:
        lr: Learning rate. Default: 1e-3.
        betas: Decay of the first and the second moment. Default: (0.9, 0.999).
        eps: Added to the root of the second moment. Default: 1e-8.
        weight_decay: Decoupled weight decay. Default: 0.01.

    Example:
        >>> model = nn.Linear(4, 1)
        >>> optimizer = AdamW(model, lr=0.01)
        >>> model(torch.ones(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[CommonOptions],
    ) -> None:
        strategy, hp = from_keywords(AdamWStrategy, locals())
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)
