"""Which strategy each unit gets, and where its hyperparameters stand in the param group."""

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
    """A strategy for each role.

    A rule is looked up by the name of a unit's first parameter, then by its role; what no rule
    applies to goes where `roles` sends it, and else to `main`.

    Args:
        main: The strategy whose hyperparameters stand in the param group under their own names. The
            others' have the strategy's name in front, as in `adamw_betas`; instead of a learning
            rate they have `adamw_lr_scale`, a factor to the group's lr.
        rules: From a role, or a pattern of parameter names with shell wildcards, to a strategy.
            Each rule has to apply to some parameter, and no two patterns to the same one.
        roles: From roles to strategies; roles that do not occur are no mistake here.

    Raises:
        StructPrecondError: If something is no strategy, or two classes have the same name.

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
        """Check that there are strategies only, with names of their own."""
        classes: dict[str, type] = {}
        for strategy in self.strategies:
            _check_strategy(strategy)
            name = name_of(strategy)
            known = classes.setdefault(name, type(strategy))
            if known is not type(strategy):
                raise StructPrecondError(
                    f"Two strategies are called {name!r}, {known} and {type(strategy)}: "
                    "their hyperparameters would have the same names. Rename one of the classes."
                )

    @property
    def strategies(self) -> list[Strategy[Any]]:
        """All strategies, the main one first."""
        return list(dict.fromkeys([self.main, *self.rules.values(), *self.roles.values()]))

    @property
    def looks_at_roles(self) -> bool:
        """Whether roles matter, so that they have to be inferred."""
        return bool(self.rules or self.roles)

    @property
    def hyperparameters(self) -> dict[str, Hyperparameter]:
        """The hyperparameters of a param group, by the names that they have there."""
        named = dict(self.main.hyperparameters)
        for strategy in self.strategies:
            if prefix := self.prefix(strategy):
                named[f"{prefix}lr_scale"] = nonnegative(1.0)
                own = strategy.hyperparameters
                named |= {f"{prefix}{name}": h for name, h in own.items() if name != "lr"}
        return named

    def prefix(self, strategy: Strategy[Any]) -> str:
        """Return what stands before the names of a strategy's hyperparameters."""
        return "" if type(strategy) is type(self.main) else f"{name_of(strategy)}_"

    def route(self, names: Sequence[str], role: RoleName) -> Route:
        """Return the strategy of a unit, and the rule that decided.

        Args:
            names: The names of its parameters, the one that decides first.
            role: The role of the first parameter.

        Raises:
            GroupError: If several patterns apply, or one that applies to another parameter than the
                first would send the unit elsewhere.
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
                f"Several rules apply to {names[0]}: {', '.join(map(repr, first))}. Make the "
                "patterns exclude each other."
            )
        if elsewhere := fitting.keys() - set(first):
            raise GroupError(
                f"The rule {min(elsewhere)!r} applies to a parameter of {' + '.join(names)}, which "
                f"are treated jointly and go where the first of them goes. Give a rule for "
                f"{names[0]}."
            )
        if first:
            return Route(self.rules[first[0]], first[0])
        if role in self.rules:
            return Route(self.rules[role], role)
        return Route(self.roles.get(role, self.main), role)

    def only(self, name: str) -> Routing:
        """Return the routing that sends everything to the strategy of a name.

        Raises:
            StructPrecondError: If there is no such strategy, or several.
        """
        named = [strategy for strategy in self.strategies if name_of(strategy) == name]
        if len(named) != 1:
            known = ", ".join(repr(name_of(strategy)) for strategy in self.strategies)
            raise StructPrecondError(
                f"A param group's strategy is {name!r}, which is not the name of one of the "
                f"strategies here, {known}. Give a strategy object."
            )
        return Routing(self.main, roles=dict.fromkeys(ROLES, named[0]))

    def check_read(self, given: set[str], strategies: Sequence[Strategy[Any]]) -> None:
        """Raise `HyperparameterError` if a given hyperparameter belongs to none of some strategies.

        Args:
            given: Names of hyperparameters that a param group was given.
            strategies: The strategies that its parameters go to.
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
        """Raise `GroupError` if there is a rule that applies to nothing."""
        if ignored := [rule for rule in self.rules if rule not in used]:
            raise GroupError(
                f"The rules {', '.join(map(repr, ignored))} apply to no parameter. A rule is a "
                f"role ({', '.join(ROLES)}) or a pattern of parameter names, such as "
                "'*.qkv.weight'; patterns go before roles. infer_roles(model) shows names and "
                "roles."
            )


@dataclass(frozen=True)
class Route:
    """Where a unit goes.

    Args:
        strategy: The strategy.
        rule: The pattern or role that decided.
    """

    strategy: Strategy[Any]
    rule: str


Routes: TypeAlias = Strategy[Any] | Mapping[str, Strategy[Any]] | Routing
"""One strategy for all; or one for each role or name pattern, and a "default" one."""


def as_routing(given: Routes) -> Routing:
    """Return what `strategy=` says as a routing.

    Raises:
        StructPrecondError: If it is no strategy and no mapping of strategies with a "default".
    """
    if isinstance(given, Routing):
        return given
    if not isinstance(given, Mapping):
        return Routing(given)
    if "default" not in given or not all(isinstance(rule, str) for rule in given):
        raise StructPrecondError(
            "A strategy= that is a mapping goes from roles, name patterns and 'default' to "
            f"strategies, got {given!r}."
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
            f"strategy takes an instance of Strategy, or a mapping from roles to such, got "
            f"{strategy!r}. Did you pass the class instead of an instance?"
        )


def check_names(routing: Routing, given: Any) -> dict[str, Any]:
    """Return given hyperparameters as a dict.

    Raises:
        StructPrecondError: If they are no mapping.
        HyperparameterError: If there are names that are no hyperparameters.
    """
    try:
        values = dict(given or {})
    except (TypeError, ValueError):
        raise StructPrecondError(
            f"hyperparameters is a dict from names to values, got {given!r}."
        ) from None
    known = routing.hyperparameters
    if unknown := set(values) - set(known):
        names = " and ".join(dict.fromkeys(type(s).__name__ for s in routing.strategies))
        raise HyperparameterError(
            f"Unknown hyperparameters {sorted(unknown)} of {names}. Known are "
            f"{', '.join(sorted(known))}."
        )
    return values
