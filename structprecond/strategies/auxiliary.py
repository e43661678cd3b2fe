"""Optimizers with one strategy for hidden matrices, and AdamW for all other parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from structprecond.checks import check_nonnegative
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import CommonOptions
from structprecond.core.routing import Routing, name_of
from structprecond.core.strategy import Strategy
from structprecond.errors import HyperparameterError, StructPrecondError
from structprecond.strategies.adamw import AdamWStrategy
from structprecond.strategies.orthogonalized import NOT_MATRICES


class AuxiliaryOptions(CommonOptions, total=False):
    """The keywords of `WithAdamW`, which documents them."""

    routes: Mapping[str, str | Strategy[Any]] | None
    adamw_lr: float | None
    adamw_betas: tuple[float, float]
    adamw_eps: float
    adamw_weight_decay: float


class WithAdamW(StructuredOptimizer):
    """Base of optimizers for hidden matrices, with AdamW for all other parameters.

    Args:
        strategy: The strategy for hidden matrices.
        hyperparameters: Values of its hyperparameters. Default of each: the strategy's.
        routes: A dict from roles or name patterns to a strategy, or to the name of this strategy or
            "adamw": `{"head": "muon", "*.lora_A.*": "adamw"}`. Default: None.
        adamw_lr: AdamW's learning rate, stored as a factor on `lr` (`adamw_lr_scale` in the param
            groups), so that schedules apply to both. Default: None, `lr`.
        adamw_betas: AdamW's decay of the moments. Default: (0.9, 0.95).
        adamw_eps: AdamW's epsilon. Default: 1e-8.
        adamw_weight_decay: AdamW's weight decay. Default: 0.01.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        strategy: Strategy[Any],
        hyperparameters: Mapping[str, Any],
        routes: Mapping[str, str | Strategy[Any]] | None = None,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
        **options: Unpack[CommonOptions],
    ) -> None:
        super().__init__(
            model,
            params,
            strategy=_routing(strategy, AdamWStrategy(), routes),
            hyperparameters={
                **hyperparameters,
                "adamw_lr_scale": _scale_to(hyperparameters["lr"], adamw_lr),
                "adamw_betas": adamw_betas,
                "adamw_eps": adamw_eps,
                "adamw_weight_decay": adamw_weight_decay,
            },
            **options,
        )


def _routing(
    matrices: Strategy[Any],
    others: Strategy[Any],
    routes: Mapping[str, str | Strategy[Any]] | None,
) -> Routing:
    """Route hidden matrices to one strategy and the rest to another; the user's routes go first."""
    if routes is not None and not isinstance(routes, Mapping):
        raise StructPrecondError(
            f"routes must be a dict from roles or name patterns to strategies, got {routes!r}."
        )
    known = {name_of(strategy): strategy for strategy in (matrices, others)}
    rules: dict[str, Strategy[Any]] = {}
    for rule, chosen in (routes or {}).items():
        if isinstance(chosen, str) and chosen not in known:
            raise StructPrecondError(
                f"routes sends {rule!r} to {chosen!r}. Give a strategy, or one of "
                f"{', '.join(map(repr, known))}."
            )
        rules[rule] = known[chosen] if isinstance(chosen, str) else chosen
    return Routing(matrices, rules, dict.fromkeys(NOT_MATRICES, others))


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
