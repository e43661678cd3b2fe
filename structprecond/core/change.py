"""What other code has changed in the param groups and in the model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from structprecond.core.boxes import is_dtensor
from structprecond.core.followed import Followed
from structprecond.core.naming import enumerate_names
from structprecond.core.places import Places
from structprecond.core.usable import problem_of
from structprecond.errors import GroupError


@dataclass
class Match:
    """A group, what the optimizer uses of it, and its parameters: as known, and as they are now."""

    group: dict[str, Any]
    followed: Followed
    known: list[nn.Parameter]
    now: list[nn.Parameter]


@dataclass
class Change:
    """What has changed in the param groups and in the model, all of which can be followed.

    Args:
        places: Where the model holds its parameters; None if only parameters are known.
        matches: The groups.
    """

    places: Places | None
    matches: list[Match]

    @cached_property
    def new(self) -> dict[nn.Parameter, nn.Parameter]:
        """The parameters that stay, and for each the one that is updated from now on."""
        return {p: q for m in self.matches for p, q in zip(m.known, m.now, strict=True)}

    @cached_property
    def groups(self) -> dict[int, dict[str, Any]]:
        """By the identity of a group that was used, the one that is used from now on."""
        return {id(match.followed.group): match.group for match in self.matches}

    def named(
        self, names: Mapping[nn.Parameter, str]
    ) -> list[tuple[dict[str, Any], dict[nn.Parameter, str]]]:
        """Return each group with the names of its parameters.

        Args:
            names: The names of what is known.
        """
        return [
            (m.group, {q: names[p] for p, q in zip(m.known, m.now, strict=True)})
            for m in self.matches
        ]

    def describe(self, names: Mapping[nn.Parameter, str]) -> str:
        """Return what happened to parameters, for messages.

        Args:
            names: The names of what is known.
        """
        gone = [name for p, name in names.items() if p not in self.new]
        others = {p: q for p, q in self.new.items() if p is not q}
        texts = [f"{enumerate_names(gone)} left param_groups"] if gone else []
        if others:
            kinds = sorted({type(q).__name__ for q in others.values()})
            texts.append(
                f"{enumerate_names([names[p] for p in others])} was replaced in the model by "
                f"another {' or '.join(kinds)}"
            )
        return " and ".join(texts) or "parameters were converted, moved or sharded"


def listed(group: Any, number: int) -> list[Any]:
    """Return the parameters of a group.

    Args:
        group: The group, which may be anything.
        number: Its place in `param_groups`.

    Raises:
        GroupError: If it is no group.
    """
    params = group.get("params") if isinstance(group, dict) else None
    if not isinstance(params, list | tuple) or not all(isinstance(p, Tensor) for p in params):
        raise GroupError(
            f"param_groups[{number}] must be a dict with a list of parameters in 'params', got "
            f"{type(group if params is None else params).__name__}. Put the list back."
        )
    return list(params)


def why_not(p: Tensor, knows_model: bool) -> str:
    """Return why the optimizer cannot follow a parameter in its groups, and what to do."""
    problem = problem_of(p)
    if problem is not None:
        return f", and it {problem}"
    if is_dtensor(p) and not knows_model:
        return (
            ". It is a DTensor; an optimizer of parameters without a model cannot tell which one "
            "was sharded into it. Pass the model as the first argument, or build the optimizer "
            "after the model was sharded."
        )
    return ". Put the old one back, and use add_param_group for new ones."
