"""Routes units to strategies, and names the strategies' hyperparameters in param groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from structprecond.core.strategy import Hyperparameter, Strategy, decay_of, nonnegative
from structprecond.core.strategy_names import name_of, strategy_called
from structprecond.errors import GroupError, HyperparameterError, StructPrecondError
from structprecond.roles import NOT_MATRICES, ROLES, RoleName


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
        return named | {name: _or_none(named[name]) for name in self.followers}

    @property
    def followers(self) -> list[str]:
        """The hyperparameters that are None for the group's `weight_decay`."""
        others = [strategy for strategy in self.strategies if self.prefix(strategy)]
        decays = ((self.prefix(strategy), decay_of(strategy)) for strategy in others)
        return [f"{prefix}{decay}" for prefix, decay in decays if decay is not None]

    @property
    def decays(self) -> bool:
        """Whether a param group may name a `weight_decay`: whether any strategy has one."""
        return any(decay_of(strategy) is not None for strategy in self.strategies)

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

    @property
    def is_uniform(self) -> bool:
        """Whether all roles lead to the same strategy, so that a wrong one does no harm."""
        return not self.rules and len({self.roles.get(role, self.main) for role in ROLES}) == 1

    def only(self, name: str) -> Routing | Strategy[Any]:
        """Return what sends all units of a param group to the strategy with a name.

        Returns:
            A routing to one of these strategies, which keeps the names of the hyperparameters; or
            else a new strategy.

        Raises:
            StructPrecondError: If no strategy, or more than one, has the name.
        """
        found = strategy_called(name, self.strategies, "A param group's strategy is")
        if found not in self.strategies:
            return found
        return Routing(self.main, roles=dict.fromkeys(ROLES, found))

    def with_routes(self, routes: UserRoutes) -> Routing:
        """Return the routing with the user's routes on top.

        Args:
            routes: As for `StructuredOptimizer`.

        Raises:
            StructPrecondError: If it is none of what `UserRoutes` says.
        """
        if isinstance(routes, str | Strategy):
            others = self._strategy(routes, "routes is")
            return replace(self, roles={**self.roles, **dict.fromkeys(NOT_MATRICES, others)})
        if not isinstance(routes, Mapping) or not all(isinstance(rule, str) for rule in routes):
            raise StructPrecondError(
                "routes must be a dict from roles or name patterns to strategies, or one strategy "
                f"for everything except hidden matrices, got {routes!r}."
            )
        rules = {rule: self._strategy(s, f"routes sends {rule!r} to") for rule, s in routes.items()}
        return replace(self, rules={**self.rules, **rules})

    def _strategy(self, given: str | Strategy[Any], asked: str) -> Strategy[Any]:
        return strategy_called(given, self.strategies, asked) if isinstance(given, str) else given

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
        if any(decay_of(strategy) is not None for strategy in strategies):
            read.add("weight_decay")
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


Routes: TypeAlias = str | Strategy[Any] | Mapping[str, str | Strategy[Any]] | Routing
"""One strategy for all units; or one for each role or name pattern, and a "default"."""

Settled: TypeAlias = Strategy[Any] | Mapping[str, Strategy[Any]] | Routing
"""The same without names."""

UserRoutes: TypeAlias = str | Strategy[Any] | Mapping[str, str | Strategy[Any]]
"""Strategies by role or name pattern; or one for all that is no hidden matrix."""


def settle(given: Routes, routes: UserRoutes | None, own: Sequence[Strategy[Any]] = ()) -> Settled:
    """Return an argument `strategy=` with strategies for their names and with the user's routes.

    Args:
        given: The argument.
        routes: The user's routes, which go on top.
        own: The strategies whose names stand for them.

    Raises:
        StructPrecondError: If one of the two is wrong.
    """
    settled: Settled
    if isinstance(given, str):
        settled = strategy_called(given, own, "strategy= is")
    elif isinstance(given, Mapping):
        settled = {
            rule: strategy_called(strategy, own, f"strategy= sends {rule!r} to")
            if isinstance(strategy, str)
            else strategy
            for rule, strategy in given.items()
        }
    else:
        settled = given
    return settled if routes is None else as_routing(settled).with_routes(routes)


def as_routing(given: Settled) -> Routing:
    """Return the routing for an argument `strategy=` that `settle` returned.

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


def hyperparameters_of(
    strategy: Strategy[Any], group: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """Return a strategy's hyperparameters in a param group under their own names."""
    hp = {name: group[f"{prefix}{name}"] for name in strategy.hyperparameters if name != "lr"}
    decay = decay_of(strategy)
    if decay is not None and (hp[decay] is None or not prefix):
        hp[decay] = group.get("weight_decay", hp[decay])
        if hp[decay] is None:  # the main strategy has none
            hp[decay] = strategy.hyperparameters[decay].default
    hp["lr"] = group["lr"] * group[f"{prefix}lr_scale"] if prefix else group["lr"]
    return hp


def _or_none(hyperparameter: Hyperparameter) -> Hyperparameter:
    """Return a weight decay that may also be None, for that of the group."""
    return Hyperparameter(
        hyperparameter.default,
        lambda v: v is None or hyperparameter.check(v),
        f"{hyperparameter.requirement}, or None for the group's weight_decay",
    )


def _check_strategy(strategy: Any) -> None:
    if not isinstance(strategy, Strategy):
        raise StructPrecondError(
            f"strategy= takes an instance of Strategy, or a mapping to instances, got "
            f"{strategy!r}. Did you pass the class instead of an instance?"
        )


def with_defaults(routing: Routing, given: Any) -> dict[str, Any]:
    """Return given hyperparameters, and the defaults of the others.

    A given `weight_decay` is that of all strategies without one of their own.

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
    defaults = {name: h.default for name, h in known.items()}
    followers = dict.fromkeys(routing.followers if "weight_decay" in values else ())
    return defaults | followers | values
