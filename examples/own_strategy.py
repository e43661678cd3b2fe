"""A strategy of your own: Lion (Chen et al. 2023, arXiv 2302.06675), with an optimizer for it.

Usage: python examples/own_strategy.py [--steps 200]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from structprecond import State, StepContext, Strategy, StructuredOptimizer, describe
from structprecond.core.options import CommonOptions, from_keywords
from structprecond.core.strategy import nonnegative, pair_of_fractions


@dataclass
class LionState(State):
    """The momentum of a stack `(b, *dims)`."""

    exp_avg: Tensor


@dataclass(frozen=True)
class LionStrategy(Strategy[LionState]):
    r"""The Lion rule, \(p \leftarrow p - \eta \, \mathrm{sign}(\beta_1 m + (1 - \beta_1) g)\)."""

    hyperparameters = {  # noqa: RUF012
        "lr": nonnegative(1e-4),
        "betas": pair_of_fractions((0.9, 0.99)),
        "weight_decay": nonnegative(0.0),
    }
    structures = ()

    def init(self, like: Tensor, structures: Any, dtypes: Any) -> LionState:
        """Return a zero momentum."""
        return LionState(torch.zeros_like(like))

    def update(
        self, state: LionState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        """Update the momentum and return the directions."""
        direction = state.exp_avg.lerp(grad, 1 - hp["betas"][0]).sign_()
        state.exp_avg.lerp_(grad, 1 - hp["betas"][1])
        return direction


class Lion(StructuredOptimizer):
    """Lion, whose updates all have the same size: use a tenth of AdamW's learning rate.

    Args:
        lr: Learning rate. Default: 1e-4.
        betas: Weight of the momentum in the update, and its decay. Default: (0.9, 0.99).
        weight_decay: Decoupled weight decay. Default: 0.0.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        strategy, hp = from_keywords(LionStrategy, locals())
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)


# --- train with it -------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> list[float]:
    """Train a small network and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(argv).steps

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = Lion(model, lr=3e-3)
    print(describe(optimizer))
    losses = []
    for step in range(steps):
        x = torch.randn(64, 16)
        loss = nn.functional.mse_loss(model(x), x[:, :1] * x[:, 1:2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
