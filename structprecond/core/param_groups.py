"""Completes and checks param groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from structprecond.core.naming import plain_name, unwrap
from structprecond.core.routing import Routing, as_routing
from structprecond.errors import GroupError, HyperparameterError, StructPrecondError
from structprecond.groups import PreconditionerGroup

CONFIGURATION = ("strategy", "structures", "preconditioner_dtypes", "combine_params")
"""The keys of a group's configuration."""

# keys of torch, of its schedulers, and of the user
_OTHERS = {"params", "param_names", "name", "initial_lr"}


def parameters_of(model: nn.Module | Iterable[Any], params: Any, optimizer: str) -> Any:
    """Return the parameters for torch's constructor: the selection `params`, or all.

    Raises:
        StructPrecondError: If `params` is not a selection, or if there is no model.
    """
    alone = isinstance(params, str | Tensor) or not isinstance(params, Iterable)
    if params is not None and alone:
        raise StructPrecondError(
            f"params= takes parameters of the model or group dicts, got {params!r}. Pass "
            f"hyperparameters by keyword, as in {optimizer}(model, lr=...)."
        )
    if isinstance(model, nn.Module):
        return unwrap(model).named_parameters() if params is None else params
    if params is not None:
        raise StructPrecondError(
            f"params= selects parameters of a model, but the first argument is a "
            f"{type(model).__name__}. Pass the model first, or the parameters alone."
        )
    return model


def with_names(model: nn.Module | None, param_group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a param group with the names of its parameters in the model.

    Raises:
        TypeError: If the group is not a mapping, as in torch.
        GroupError: If it has no parameters, or if one does not belong to the model.
    """
    if not isinstance(param_group, Mapping):
        raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
    group = dict(param_group)
    if model is None or isinstance(group.get("params"), set):
        return group
    names = {p: plain_name(name) for name, p in unwrap(model).named_parameters()}
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    params = [p[1] if isinstance(p, tuple) else p for p in params]
    if wrong := [p for p in params if not isinstance(p, Tensor)]:
        raise GroupError(
            f"params= takes parameters of the model or group dicts, got a "
            f"{type(wrong[0]).__name__}. Did you mean module.parameters()?"
        )
    if foreign := [tuple(p.shape) for p in params if p not in names]:
        raise GroupError(
            f"Parameters of shapes {foreign} do not belong to the model. Pass parameters of the "
            "model that you gave as the first argument."
        )
    group["params"] = [(names[p], p) for p in params]
    return group


def routing_of(group: dict[str, Any], usual: Routing) -> Routing:
    """Return the routing of a group: its own `strategy`, or the usual one."""
    if isinstance(group.get("strategy"), str):
        group["strategy"] = usual.only(group["strategy"])
    return as_routing(group.get("strategy", usual))


def complete(group: dict[str, Any], routing: Routing, defaults: Mapping[str, Any]) -> set[str]:
    """Add missing hyperparameters to a group; return the names of the given ones.

    Raises:
        HyperparameterError: If it has unknown keys.
        GroupError: If `combine_params` is not a tuple of groupings.
    """
    known = routing.hyperparameters
    given = set(group) & set(known)
    if unknown := set(group) - set(known) - set(CONFIGURATION) - _OTHERS:
        raise HyperparameterError(
            f"Unknown keys {sorted(unknown)} in a param group of {type(routing.main).__name__}. "
            f"Its hyperparameters are {', '.join(sorted(known))}."
        )
    usual = as_routing(defaults["strategy"])
    for name, hyperparameter in known.items():
        # another strategy may use the same name for something else, except for lr
        shared = name == "lr" or name not in routing.main.hyperparameters
        shared = (shared or type(routing.main) is type(usual.main)) and name in defaults
        group.setdefault(name, defaults[name] if shared else hyperparameter.default)
    rules = group.setdefault("combine_params", defaults["combine_params"])
    group["combine_params"] = _as_tuple(rules)
    return given


def drop_unread(group: dict[str, Any], routing: Routing) -> None:
    """Remove defaults that torch added to a group and its strategies do not use."""
    for name in set(group) - set(routing.hyperparameters) - set(CONFIGURATION) - _OTHERS:
        del group[name]


def _as_tuple(rules: Any) -> tuple[PreconditionerGroup, ...] | None:
    if rules is None:
        return None
    if isinstance(rules, PreconditionerGroup) or not isinstance(rules, Iterable):
        raise GroupError(
            f"combine_params takes a tuple of groupings, got {rules!r}. Put it into a tuple."
        )
    return tuple(rules)


def labels_of(group: Mapping[str, Any], number: int) -> dict[nn.Parameter, str]:
    """Return the names of a group's parameters, or their places in `param_groups`.

    Args:
        group: The group.
        number: Its place in `param_groups`.

    Raises:
        StructPrecondError: If the numbers of names and parameters differ.
    """
    params = group["params"]
    labels = group.get("param_names") or [
        f"param_groups[{number}]['params'][{i}]" for i in range(len(params))
    ]
    if len(labels) != len(params):
        raise StructPrecondError(
            f"A param group has {len(params)} parameters, but {len(labels)} param_names. Give one "
            "name per parameter."
        )
    return dict(zip(params, labels, strict=True))
