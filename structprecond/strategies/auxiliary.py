"""Optimizers with one strategy for hidden matrices, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor, nn

from structprecond.checks import check_nonnegative
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import CommonOptions, FactorOptions
from structprecond.core.routing import Routing
from structprecond.core.strategy import Strategy
from structprecond.errors import HyperparameterError
from structprecond.roles import NOT_MATRICES
from structprecond.strategies.adamw import AdamWStrategy


class AuxiliaryOptions(CommonOptions, total=False):
    """The keywords of `WithAdamW`, which documents them."""

    adamw_lr: float | None
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_weight_decay: float | None


class FactoredAuxiliaryOptions(AuxiliaryOptions, FactorOptions, total=False):
    """The same with those of optimizers with Kronecker factors."""


class WithAdamW(StructuredOptimizer):
    """Base of optimizers for hidden matrices, with AdamW for all other parameters.

    Args:
        strategy: The strategy for hidden matrices.
        hyperparameters: Values of its hyperparameters. Default of each: the strategy's.
        adamw_lr: AdamW's learning rate, stored as a factor on `lr` (`adamw_lr_scale` in the param
            groups), so that schedules apply to both. Default: None, `lr`.
        adamw_betas: AdamW's decay of the moments. Default: (0.9, 0.95).
        adamw_eps: AdamW's epsilon. Default: 1e-8.
        adamw_weight_decay: AdamW's weight decay; None for `weight_decay`. Default: 0.01.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        strategy: Strategy[Any],
        hyperparameters: Mapping[str, Any],
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float | None = 0.01,
        **options: Unpack[FactorOptions],
    ) -> None:
        super().__init__(
            model,
            params,
            strategy=Routing(strategy, roles=dict.fromkeys(NOT_MATRICES, AdamWStrategy())),
            hyperparameters={
                **hyperparameters,
                "adamw_lr_scale": _scale_to(hyperparameters["lr"], adamw_lr),
                "adamw_betas": adamw_betas,
                "adamw_eps": adamw_eps,
                "adamw_weight_decay": adamw_weight_decay,
            },
            **options,
        )


def _scale_to(lr: float | Tensor, own_lr: float | None) -> float:
    """Return AdamW's learning rate as a factor on `lr`, or raise `HyperparameterError`."""
    if own_lr is None:
        return 1.0
    check_nonnegative(lr=lr, adamw_lr=own_lr)
    if float(lr) == 0:
        raise HyperparameterError(
            f"adamw_lr={own_lr!r} is stored as a factor on lr, which is impossible with lr=0. "
            "Start with an lr above 0, and let the schedule lower it."
        )
    return own_lr / float(lr)
