"""The policies of a param group: which strategy has which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from structprecond.core.policies import Policy
from structprecond.core.routing import Routing
from structprecond.core.strategy import Strategy, decay_of
from structprecond.core.strategy_names import name_of
from structprecond.errors import StructPrecondError

Policies: TypeAlias = Sequence[Policy] | Mapping[str, Sequence[Policy]]
"""The policies of the main strategy, or those of each strategy by its name."""


def as_policies(given: Any) -> tuple[Policy, ...] | dict[str, tuple[Policy, ...]] | None:
    """Return an argument `policies=` with tuples for all sequences.

    Raises:
        StructPrecondError: If it is none of what `Policies` says.
    """
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {name: _as_tuple(own) for name, own in given.items()}
    return _as_tuple(given)


def _as_tuple(given: Any) -> tuple[Policy, ...]:
    policies = (given,) if isinstance(given, Policy) else given
    if not isinstance(policies, Sequence) or not all(isinstance(one, Policy) for one in policies):
        raise StructPrecondError(
            "policies takes a sequence of policies, as in (MatchRMS(0.2), CautiousDecay()), or a "
            f"dict from names of strategies to such sequences, got {given!r}. Did you pass a class "
            "instead of an instance?"
        )
    names = [type(policy).__name__ for policy in policies]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise StructPrecondError(
            f"policies has {', '.join(twice)} more than once, got {given!r}. Give each one once."
        )
    return tuple(policies)


def policies_of(given: Any, strategy: Strategy[Any], routing: Routing) -> tuple[Policy, ...]:
    """Return the policies of a strategy.

    Args:
        given: The group's `policies`, from `as_policies`.
        strategy: The strategy.
        routing: The routing of the group.

    Raises:
        StructPrecondError: If a policy does not fit the strategy.
    """
    own: tuple[Policy, ...] = strategy.policies
    if isinstance(given, Mapping):
        own = given.get(name_of(strategy), own)
    elif given is not None and not routing.prefix(strategy):
        own = given
    for policy in own:
        if policy.needs_decoupled_decay and not decay_is_decoupled(strategy):
            raise StructPrecondError(
                f"{type(policy).__name__} changes decoupled weight decay, but that of "
                f"{type(strategy).__name__} is a part of its directions, or it has none. Leave the "
                "policy out, or give it to other strategies only, as in policies={'adamw': ...}."
            )
    return own


def decay_is_decoupled(strategy: Strategy[Any]) -> bool:
    """Return whether a strategy has weight decay that the core applies, apart from directions."""
    name = decay_of(strategy)
    if name is None:
        return False
    hp = {key: h.default for key, h in strategy.hyperparameters.items()} | {"lr": 0.5, name: 0.5}
    return strategy.decay_factors(hp) != (1.0, 1.0)


def check_policies(given: Any, routing: Routing) -> None:
    """Raise `StructPrecondError` if policies are given to a strategy that there is not."""
    if not isinstance(given, Mapping):
        return
    known = list(dict.fromkeys(map(name_of, routing.strategies)))
    if unknown := [name for name in given if name not in known]:
        raise StructPrecondError(
            f"policies has {', '.join(map(repr, unknown))}, expected names of the strategies in "
            f"use: {', '.join(map(repr, known))}."
        )


def inherited(given: Any, routing: Routing, usual: Routing) -> Any:
    """Return the optimizer's policies for a param group without policies of its own.

    Args:
        given: The optimizer's `policies`, from `as_policies`.
        routing: The routing of the group.
        usual: The routing of the optimizer. A sequence is for its main strategy, and not for that
            of a group with another one.
    """
    for_main = not isinstance(given, Mapping)
    return None if for_main and type(routing.main) is not type(usual.main) else given
