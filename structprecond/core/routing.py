"""Routes units to strategies, and names the strategies' hyperparameters in param groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from structprecond.core.strategy import Hyperparameter, Strategy, nonnegative
from structprecond.errors import GroupError, HyperparameterError, StructPrecondError
from structprecond.roles import ROLES, RoleName


@dataclass(frozen=True)
class Routing:
    """Routes from roles and name patterns to strategies.

    A unit's route is looked up by the name of its first parameter, then by that parameter's role:
    first in `rules`, then in `roles`. Without a match, the unit goes to `main`.

    Args:
        main: The strategy whose hyperparameters have their own names in the param group. The names
            of the others are prefixed, as in `adamw_betas`; instead of a learning rate they have
            `adamw_lr_scale`, a factor on the group's lr.
        rules: Strategies by role or by pattern of parameter names, with shell wildcards. Each entry
            must match a parameter, and no two patterns may match the same one.
        roles: Strategies by role; roles may be absent from the model.

    Raises:
        StructPrecondError: If a value is not a strategy, or two classes have the same name.

    Example:
        >>> from structprecond import AdamWStrategy, MuonStrategy
        >>> muon, adamw = MuonStrategy(), AdamWStrategy()
        >>> routing = Routing(muon, {"*.gate.weight": adamw}, {"embedding": adamw})
        >>> routing.route(("moe.gate.weight",), "matrix")
        Route(strategy=AdamWStrategy(), rule='*.gate.weight')
        >>> sorted(routing.hyperparameters)[:3]
        ['adamw_betas', 'adamw_eps', 'adamw_lr_scale']
    """

    main: Strategy[Any]
    rules: Mapping[str, Strategy[Any]] = field(default_factory=dict)
    roles: Mapping[RoleName, Strategy[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that all values are strategies with different names, and that keys are texts."""
        # before `strategies`, which hashes them
        for strategy in (self.main, *self.rules.values(), *self.roles.values()):
            _check_strategy(strategy)
        if wrong := [rule for rule in (*self.rules, *self.roles) if not isinstance(rule, str)]:
            raise StructPrecondError(
                f"Routes are given by roles and name patterns, which are texts, got {wrong}. Call "
                "infer_roles(model) to see names and roles."
            )
        classes: dict[str, type] = {}
        for strategy in self.strategies:
            name = name_of(strategy)
            known = classes.setdefault(name, type(strategy))
            if known is not type(strategy):
                raise StructPrecondError(
                    f"Two strategies are called {name!r}, {known} and {type(strategy)}, so their "
                    "hyperparameters would have the same names. Rename one of the classes."
                )

    @property
    def strategies(self) -> list[Strategy[Any]]:
        """All strategies, `main` first."""
        return list(dict.fromkeys([self.main, *self.rules.values(), *self.roles.values()]))

    @property
    def looks_at_roles(self) -> bool:
        """Whether the routes depend on roles or names."""
        return bool(self.rules or self.roles)

    @property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """The hyperparameters of a param group, by their names there."""
        named = dict(self.main.hyperparameters)
        for strategy in self.strategies:
            if prefix := self.prefix(strategy):
                named[f"{prefix}lr_scale"] = nonnegative(1.0)
                own = strategy.hyperparameters
                named |= {f"{prefix}{name}": h for name, h in own.items() if name != "lr"}
        return named

    def prefix(self, strategy: Strategy[Any]) -> str:
        """Return the prefix of a strategy's hyperparameters in the param group."""
        return "" if type(strategy) is type(self.main) else f"{name_of(strategy)}_"

    def route(self, names: Sequence[str], role: RoleName) -> Route:
        """Return the route of a unit.

        Args:
            names: The names of its parameters; the first one decides.
            role: The role of the first parameter.

        Raises:
            GroupError: If several patterns match the first parameter, or if a pattern matches only
                another one.
        """
        fitting = {
            pattern: name
            for pattern in self.rules
            if pattern not in ROLES
            for name in reversed(names)
            if fnmatchcase(name, pattern)
        }
        first = [pattern for pattern, name in fitting.items() if name == names[0]]
        if len(first) > 1:
            raise GroupError(
                f"Several routes match {names[0]}: {', '.join(map(repr, first))}. Make the "
                "patterns exclusive."
            )
        if elsewhere := fitting.keys() - set(first):
            raise GroupError(
                f"The route {min(elsewhere)!r} matches a parameter of {' + '.join(names)}, a unit "
                f"that follows the route of its first parameter. Give a route for {names[0]}."
            )
        if first:
            return Route(self.rules[first[0]], first[0])
        if role in self.rules:
            return Route(self.rules[role], role)
        return Route(self.roles.get(role, self.main), role)

    def only(self, name: str) -> Routing:
        """Return the routing of all units to the strategy with a name.

        Raises:
            StructPrecondError: If no strategy, or more than one, has the name.
        """
        named = [strategy for strategy in self.strategies if name_of(strategy) == name]
        if len(named) != 1:
            known = ", ".join(repr(name_of(strategy)) for strategy in self.strategies)
            raise StructPrecondError(
                f"A param group's strategy is {name!r}, expected one of {known}. Give one of these "
                "names or a strategy object."
            )
        return Routing(self.main, roles=dict.fromkeys(ROLES, named[0]))

    def check_read(self, given: set[str], strategies: Sequence[Strategy[Any]]) -> None:
        """Raise `HyperparameterError` if none of the strategies has a given hyperparameter.

        Args:
            given: The names of a param group's given hyperparameters.
            strategies: The strategies that its units go to.
        """
        read = {
            f"{self.prefix(strategy)}{name}"
            for strategy in strategies
            for name in (*strategy.hyperparameters, "lr_scale")
        }
        if strategies and (unread := sorted(given - read - {"lr"})):
            names = " and ".join(dict.fromkeys(type(s).__name__ for s in strategies))
            raise HyperparameterError(
                f"A param group was given {', '.join(unread)}, but its parameters go to {names}, "
                f"whose hyperparameters are {', '.join(sorted(read & set(self.hyperparameters)))}."
            )

    def check_used(self, used: set[str]) -> None:
        """Raise `GroupError` if a route matches no parameter."""
        if ignored := [rule for rule in self.rules if rule not in used]:
            raise GroupError(
                f"The routes {', '.join(map(repr, ignored))} match no parameter. A route's key is "
                f"a role ({', '.join(ROLES)}) or a pattern of parameter names, such as "
                "'*.qkv.weight'; patterns take precedence. Call infer_roles(model) to see names "
                "and roles."
            )


@dataclass(frozen=True)
class Route:
    """The route of a unit.

    Args:
        strategy: The strategy.
        rule: The pattern or role that matched.
    """

    strategy: Strategy[Any]
    rule: str


Routes: TypeAlias = Strategy[Any] | Mapping[str, Strategy[Any]] | Routing
"""One strategy for all units; or one for each role or name pattern, and a "default"."""


def as_routing(given: Routes) -> Routing:
    """Return the routing for an argument `strategy=`.

    Raises:
        StructPrecondError: If it is neither a strategy nor a mapping with a "default".
    """
    if isinstance(given, Routing):
        return given
    if not isinstance(given, Mapping):
        return Routing(given)
    if "default" not in given or not all(isinstance(rule, str) for rule in given):
        raise StructPrecondError(
            "strategy= takes a strategy, or a mapping from roles, name patterns and 'default' to "
            f"strategies, got {given!r}. Add a 'default', and use strings as keys."
        )
    rules = {rule: strategy for rule, strategy in given.items() if rule != "default"}
    return Routing(given["default"], rules)


def name_of(strategy: Strategy[Any]) -> str:
    """Return the short name of a strategy's class: `adamw` for `AdamWStrategy`."""
    return type(strategy).__name__.removesuffix("Strategy").lower()


def hyperparameters_of(
    strategy: Strategy[Any], group: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """Return a strategy's hyperparameters in a param group under their own names."""
    hp = {name: group[f"{prefix}{name}"] for name in strategy.hyperparameters if name != "lr"}
    hp["lr"] = group["lr"] * group[f"{prefix}lr_scale"] if prefix else group["lr"]
    return hp


def _check_strategy(strategy: Any) -> None:
    if not isinstance(strategy, Strategy):
        raise StructPrecondError(
            f"strategy= takes an instance of Strategy, or a mapping to instances, got "
            f"{strategy!r}. Did you pass the class instead of an instance?"
        )


def check_names(routing: Routing, given: Any) -> dict[str, Any]:
    """Return given hyperparameters as a dict.

    Raises:
        StructPrecondError: If they are not a mapping.
        HyperparameterError: If a name is unknown.
    """
    try:
        values = dict(given or {})
    except (TypeError, ValueError):
        raise StructPrecondError(
            f"hyperparameters= takes a dict from names to values, got {given!r}."
        ) from None
    known = routing.hyperparameters
    if unknown := set(values) - set(known):
        names = " and ".join(dict.fromkeys(type(s).__name__ for s in routing.strategies))
        raise HyperparameterError(
            f"Unknown hyperparameters {sorted(unknown)} of {names}. Known are "
            f"{', '.join(sorted(known))}."
        )
    return values
