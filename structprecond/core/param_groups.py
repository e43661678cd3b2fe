"""Param groups: what they may hold, completed and checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from structprecond.core.naming import plain_name, unwrap
from structprecond.core.routing import Routing, as_routing
from structprecond.errors import GroupError, HyperparameterError, StructPrecondError
from structprecond.groups import PreconditionerGroup

CONFIGURATION = ("strategy", "structures", "preconditioner_dtypes", "combine_params")
"""Keys that say how the parameters of a group are treated."""

# keys of torch's own, of its schedulers, and names that users give
_OTHERS = {"params", "param_names", "name", "initial_lr"}


def parameters_of(model: nn.Module | Iterable[Any], params: Any, optimizer: str) -> Any:
    """Return what torch's constructor gets: the selection `params`, or everything.

    Raises:
        StructPrecondError: If `params` is no selection, or selects from no model.
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
    """Return a copy of a param group with the model's names of its parameters.

    Raises:
        GroupError: If a parameter does not belong to the model.
    """
    group = dict(param_group)
    if model is None or isinstance(group.get("params"), set):
        return group
    names = {p: plain_name(name) for name, p in unwrap(model).named_parameters()}
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    params = [p[1] if isinstance(p, tuple) else p for p in params]
    if wrong := [p for p in params if not isinstance(p, Tensor)]:
        raise GroupError(
            f"params= takes parameters of the model, or group dicts, got a "
            f"{type(wrong[0]).__name__}. Did you mean module.parameters()?"
        )
    if foreign := [tuple(p.shape) for p in params if p not in names]:
        raise GroupError(
            f"Parameters of shapes {foreign} do not belong to the model. Pass parameters of "
            "the model that is the first argument."
        )
    group["params"] = [(names[p], p) for p in params]
    return group


def routing_of(group: dict[str, Any], usual: Routing) -> Routing:
    """Return where the parameters of a group go, by its own `strategy` if it has one."""
    if isinstance(group.get("strategy"), str):
        group["strategy"] = usual.only(group["strategy"])
    return as_routing(group.get("strategy", usual))


def complete(group: dict[str, Any], routing: Routing, defaults: Mapping[str, Any]) -> set[str]:
    """Give a group the hyperparameters that it lacks; return the names of those it has.

    Raises:
        HyperparameterError: If it has unknown keys.
        GroupError: If its grouping rules are no tuple of rules.
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
        # those of another strategy may share a name but not a meaning, except for lr
        shared = name == "lr" or name not in routing.main.hyperparameters
        shared = (shared or type(routing.main) is type(usual.main)) and name in defaults
        group.setdefault(name, defaults[name] if shared else hyperparameter.default)
    rules = group.setdefault("combine_params", defaults["combine_params"])
    group["combine_params"] = _as_tuple(rules)
    return given


def drop_unread(group: dict[str, Any], routing: Routing) -> None:
    """Remove what torch put into a group from the defaults, and its strategy does not read."""
    for name in set(group) - set(routing.hyperparameters) - set(CONFIGURATION) - _OTHERS:
        del group[name]


def _as_tuple(rules: Any) -> tuple[PreconditionerGroup, ...] | None:
    if rules is None:
        return None
    if isinstance(rules, PreconditionerGroup) or not isinstance(rules, Iterable):
        raise GroupError(
            f"combine_params takes a tuple of rules, got {rules!r} alone. Put it into a tuple."
        )
    return tuple(rules)


def labels_of(group: Mapping[str, Any], number: int) -> dict[nn.Parameter, str]:
    """Return the names of a group's parameters, or else their places in `param_groups`.

    Args:
        group: The group.
        number: Its place in `param_groups`.

    Raises:
        StructPrecondError: If there are more or fewer names than parameters.
    """
    params = group["params"]
    labels = group.get("param_names") or [
        f"param_groups[{number}]['params'][{i}]" for i in range(len(params))
    ]
    if len(labels) != len(params):
        raise StructPrecondError(
            f"A param group has {len(params)} parameters, but {len(labels)} param_names."
        )
    return dict(zip(params, labels, strict=True))
