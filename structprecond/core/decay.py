"""Weight decay of a param group: whose it is, and which parameters `no_decay` leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from structprecond.errors import GroupError, StructPrecondError
from structprecond.roles import ROLES, RoleName


def as_rules(given: Any) -> tuple[str, ...]:
    """Return an argument `no_decay=` as a tuple of roles and name patterns.

    Raises:
        StructPrecondError: If it is none.
    """
    rules = (given,) if isinstance(given, str) else given
    if not isinstance(rules, Sequence) or not all(isinstance(rule, str) for rule in rules):
        raise StructPrecondError(
            f"no_decay takes roles and patterns of parameter names, as in ('norm', 'bias'), got "
            f"{given!r}."
        )
    return tuple(rules)


def undecayed(
    rules: Sequence[str],
    names: Mapping[nn.Parameter, str],
    roles: Mapping[nn.Parameter, RoleName],
) -> set[nn.Parameter]:
    """Return the parameters that have one of the roles, or a name that fits one of the patterns."""
    return {
        p
        for p, name in names.items()
        if roles.get(p) in rules or any(fnmatchcase(name, rule) for rule in _patterns(rules))
    }


def check_patterns(rules: Sequence[str], names: Iterable[str]) -> None:
    """Raise `GroupError` if a name pattern matches no parameter; roles may be absent.

    Args:
        rules: Roles and name patterns.
        names: The names of the parameters.
    """
    names = list(names)
    unused = [r for r in _patterns(rules) if not any(fnmatchcase(name, r) for name in names)]
    if unused:
        raise GroupError(
            f"no_decay has {', '.join(map(repr, unused))}, which match no parameter. Its entries "
            f"are roles ({', '.join(ROLES)}) and patterns of parameter names, such as '*.bias'. "
            "Call infer_roles(model) to see names and roles."
        )


def decays(params: Sequence[nn.Parameter], without: Collection[nn.Parameter], label: str) -> bool:
    """Return whether a unit decays.

    Args:
        params: The parameters of the unit.
        without: The parameters that do not decay.
        label: The names of the parameters.

    Raises:
        GroupError: If only some of its parameters decay.
    """
    left_out = [p in without for p in params]
    if any(left_out) and not all(left_out):
        raise GroupError(
            f"no_decay leaves out a part of {label}, which is one unit and decays as a whole. "
            "Leave out all of it or nothing, or change combine_params."
        )
    return not any(left_out)


def _patterns(rules: Sequence[str]) -> list[str]:
    return [rule for rule in rules if rule not in ROLES]
