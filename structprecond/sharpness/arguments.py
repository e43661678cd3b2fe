"""The arguments of SAM, checked and split into its own settings and those of its base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from structprecond.core.optimizer import StructuredOptimizer
from structprecond.errors import HyperparameterError, StructPrecondError

SETTINGS = ("rho", "adaptive")
"""The keys of SAM's own in a param group."""


def checked_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `rho` and `adaptive` of a param group, if it has them.

    Raises:
        HyperparameterError: If a value is invalid.
    """
    settings = {name: group[name] for name in SETTINGS if name in group}
    if "rho" in settings:
        rho = settings["rho"]
        if isinstance(rho, bool) or not isinstance(rho, Real) or not 0 <= float(rho) < math.inf:
            raise HyperparameterError(f"rho must be a finite number of at least 0, got {rho!r}.")
        settings["rho"] = float(rho)  # checkpoints hold no numpy numbers
    if "adaptive" in settings and not isinstance(settings["adaptive"], bool):
        raise HyperparameterError(f"adaptive must be True or False, got {settings['adaptive']!r}.")
    return settings


def without_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param group without SAM's own keys, as the base takes it."""
    return {name: value for name, value in group.items() if name not in SETTINGS}


def split_params(
    params: nn.Module | Iterable[Any] | None, base: type[Optimizer]
) -> tuple[Any, list[dict[str, Any]]]:
    """Return the arguments for an optimizer class, and the settings of every param group."""
    if params is None:
        raise StructPrecondError(
            f"params is None, but the base optimizer is a class. Pass parameters, or an instance "
            f"of {base.__name__}."
        )
    if isinstance(params, nn.Module):
        return params if issubclass(base, StructuredOptimizer) else params.parameters(), [{}]
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise StructPrecondError(
            f"params takes parameters, named parameters, group dicts or a model, got a "
            f"{type(params).__name__}. Put a single parameter into a list."
        )
    given = list(params)
    if not any(isinstance(group, dict) for group in given):
        return given, [{}]
    settings = [checked_settings(group) if isinstance(group, dict) else {} for group in given]
    return [without_settings(g) if isinstance(g, dict) else g for g in given], settings


def check_instance(base: Optimizer, params: Any, base_kwargs: Mapping[str, Any]) -> None:
    """Raise `StructPrecondError` if arguments are given that an instance has already."""
    name = type(base).__name__
    if params is not None:
        raise StructPrecondError(
            f"base_optimizer is an instance of {name} with its own parameters, but params is a "
            f"{type(params).__name__}. Pass SAM(None, optimizer), or the class {name}."
        )
    if base_kwargs:
        raise StructPrecondError(
            f"base_optimizer is an instance of {name}, which cannot take the arguments "
            f"{sorted(base_kwargs)}. Give them to {name}, or pass the class."
        )
