"""Completes and checks param groups."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Set
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from structprecond.core.build import RoutedUnit
from structprecond.core.chosen_policies import as_policies, check_policies, inherited
from structprecond.core.decay import as_rules, check_patterns
from structprecond.core.naming import plain_name, unwrap
from structprecond.core.plain import plain_number
from structprecond.core.routing import Routing, as_routing, settle
from structprecond.core.strategy import Strategy, decay_of
from structprecond.core.strategy_names import known_strategies, name_of
from structprecond.errors import GroupError, HyperparameterError, StructPrecondError
from structprecond.groups import PreconditionerGroup
from structprecond.roles import ROLES

CONFIGURATION = (
    "strategy",
    "structures",
    "preconditioner_dtypes",
    "combine_params",
    "no_decay",
    "policies",
)
"""The keys of a group's configuration."""

# names that are as similar as this are taken for misspelt ones; lr_scale is not adamw_lr_scale
_ALIKE = 0.85

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


class NewGroup:
    """A param group that is about to be added, complete and with the names of its parameters.

    Args:
        model: The model without wrappers; None if only parameters are known.
        given: The group as the user gave it.
        defaults: The defaults of all groups.
        optimizer: The optimizer's class.

    Attributes:
        group: The complete group, a copy.
        misspelt: A warning about keys that look misspelt; None without any.

    Raises:
        TypeError: If the group is not a mapping, as in torch.
        StructPrecondError: If its parameters or its keys are wrong.
    """

    def __init__(
        self,
        model: nn.Module | None,
        given: Mapping[str, Any],
        defaults: Mapping[str, Any],
        optimizer: type,
    ) -> None:
        self.group = with_names(model, given)
        self._routing = routing_of(self.group, as_routing(defaults["strategy"]))
        self._own = set(self.group)
        self.misspelt = check_keys(self.group, self._routing, optimizer)
        self._given = complete(self.group, self._routing, defaults)
        self._kept = set(self.group)
        self._defaults, self._optimizer = defaults, optimizer.__name__

    def drop_unread(self) -> None:
        """Remove the defaults that torch added to the group and its strategies do not use."""
        for name in self._defaults.keys() - self._kept - set(CONFIGURATION):
            del self.group[name]

    def check(self, all_units: Iterable[RoutedUnit], names: Mapping[nn.Parameter, str]) -> None:
        """Check that what the group was given has an effect.

        Args:
            all_units: Its units, and those of other groups.
            names: The names of its parameters, and of others.

        Raises:
            StructPrecondError: If a hyperparameter, a route or a `no_decay` has none.
        """
        units = [routed for routed in all_units if routed.group is self.group]
        self._routing.check_read(self._given, [routed.route.strategy for routed in units])
        if "strategy" in self._own:
            self._routing.check_used({routed.route.rule for routed in units})
        if "no_decay" in self._own:
            check_patterns(self.group["no_decay"], [names[p] for p in self.group["params"]])

    def roles_in_doubt(self, all_units: Iterable[RoutedUnit]) -> str | None:
        """Return a warning if the roles of parameters without a model or names matter.

        Args:
            all_units: Its units, and those of other groups.
        """
        by_role = [
            routed.unit
            for routed in all_units
            if routed.group is self.group and routed.route.rule in ROLES and not routed.frozen
        ]
        uniform = self._routing.is_uniform
        matrices = 0 if uniform else sum(p.ndim > 1 for unit in by_role for p in unit.params)
        if self.group.get("param_names"):
            return None
        if matrices:
            what = f"{self._optimizer} routes parameters by their roles"
            whose = f"The roles of the {matrices} with two axes or more were"
            confused = "an embedding or a head from a hidden matrix"
        elif any(rule in ROLES for rule in self.group["no_decay"]):
            what, whose = "no_decay goes by roles", "Their roles were"
            confused = "a norm from a bias"
        else:
            return None
        return (
            f"{what}, but {self._optimizer} was given parameters without a model or names. "
            f"{whose} guessed from shapes, which cannot tell {confused}. Pass the model, as in "
            f"{self._optimizer}(model), or pairs of names and parameters, as in "
            f"{self._optimizer}(model.named_parameters())."
        )


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
    if "strategy" not in group:
        return usual
    own = group["strategy"]
    by_name = isinstance(own, str)
    group["strategy"] = usual.only(own) if by_name else settle(own, None, usual.strategies)
    return as_routing(group["strategy"])


def complete(group: dict[str, Any], routing: Routing, defaults: Mapping[str, Any]) -> set[str]:
    """Add missing hyperparameters to a group, as plain numbers; return the names of given ones.

    A `weight_decay` that the group names is that of all its strategies without one of their own.

    Raises:
        HyperparameterError: If it names two weight decays of the main strategy.
        GroupError: If `combine_params` is not a tuple of groupings.
    """
    known = routing.hyperparameters
    given = set(group) & {*known, "weight_decay"}
    if "weight_decay" in given:
        _check_one_decay(given, routing.main)
        group |= {name: None for name in routing.followers if name not in group}
    usual = as_routing(defaults["strategy"])
    for name, hyperparameter in known.items():
        # another strategy may use the same name for something else, except for lr
        shared = name == "lr" or name not in routing.main.hyperparameters
        shared = (shared or type(routing.main) is type(usual.main)) and name in defaults
        group.setdefault(name, defaults[name] if shared else hyperparameter.default)
        group[name] = plain_number(group[name])
    rules = group.setdefault("combine_params", defaults["combine_params"])
    group["combine_params"] = _as_tuple(rules)
    group["no_decay"] = as_rules(group.get("no_decay", defaults["no_decay"]))
    if "policies" in group:
        group["policies"] = as_policies(group["policies"])
        check_policies(group["policies"], routing)
    else:
        group["policies"] = inherited(defaults["policies"], routing, usual)
    return given


def check_rules(defaults: Mapping[str, Any], used: set[str], names: Mapping[Any, str]) -> None:
    """Raise `StructPrecondError` if a route, `no_decay` or policy of the optimizer has no effect.

    Args:
        defaults: The defaults of all groups.
        used: The roles and patterns that routed a unit.
        names: The names of all parameters.
    """
    routing = as_routing(defaults["strategy"])
    routing.check_used(used)
    check_policies(defaults["policies"], routing)
    check_patterns(defaults["no_decay"], names.values())


def _check_one_decay(given: Set[str], main: Strategy[Any]) -> None:
    own = decay_of(main)
    if own in given and own != "weight_decay":
        raise HyperparameterError(
            f"A param group was given {own} and weight_decay, which are the same for "
            f"{type(main).__name__}. Give one of them."
        )


def check_keys(group: Mapping[str, Any], routing: Routing, optimizer: type) -> str | None:
    """Check the keys of a group that mean nothing to its strategies.

    They may be another tool's, and then stay in the group unread.

    Args:
        group: The group.
        routing: Its routing.
        optimizer: The optimizer's class.

    Returns:
        A warning if they look like misspelt ones, else None.

    Raises:
        HyperparameterError: If they mean something elsewhere: to another strategy, to the
            optimizer's constructor, or by the prefix of a strategy.
    """
    known = {*routing.hyperparameters, *CONFIGURATION, *_OTHERS}
    if routing.decays:
        known.add("weight_decay")
    if not (unknown := sorted(map(str, group.keys() - known))):
        return None
    elsewhere = _words_of_strategies() | set(inspect.signature(optimizer).parameters)
    prefixes = tuple(f"{name_of(strategy)}_" for strategy in routing.strategies)
    if wrong := [key for key in unknown if key in elsewhere or key.startswith(prefixes)]:
        raise HyperparameterError(
            f"Unknown keys {wrong} in a param group of {type(routing.main).__name__}. "
            f"Its hyperparameters are {', '.join(sorted(routing.hyperparameters))}."
        )
    meant = {key: get_close_matches(key.lower(), known, 1, _ALIKE) for key in unknown}
    if not any(meant.values()):
        return None
    pairs = ", ".join(f"{key!r} (for {close[0]!r}?)" for key, close in meant.items() if close)
    return (
        f"{optimizer.__name__} does not read the keys {pairs} of a param group, which look "
        "misspelt. They stay there without effect."
    )


def _words_of_strategies() -> set[str]:
    """Return the hyperparameters of all strategies, with and without their prefixes."""
    return {
        word
        for name, classes in known_strategies().items()
        for cls in classes
        for own in cls.hyperparameters
        for word in (own, f"{name}_{own}")
    }


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
