"""What the optimizer uses of a param group, to notice when other code changes the group."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from operator import is_, itemgetter
from typing import Any

from torch import nn

from structprecond.core.param_groups import CONFIGURATION
from structprecond.core.plain import describe_object
from structprecond.errors import StructPrecondError

_values_of = itemgetter(*CONFIGURATION)


@dataclass
class Followed:
    """What the optimizer uses of a param group.

    Args:
        group: The group, whose hyperparameters every step reads.
        params: A copy of its list of parameters.
        configuration: The values of `CONFIGURATION` that its buckets were built with.
    """

    group: dict[str, Any]
    params: list[nn.Parameter]
    configuration: tuple[Any, ...]

    @classmethod
    def of(cls, group: dict[str, Any]) -> Followed:
        """Return what a new group has."""
        return cls(group, list(group["params"]), tuple(map(_frozen, _values_of(group))))

    def is_in(self, group: Any) -> bool:
        """Return whether a group is this one, with the same parameters."""
        params = group.get("params") if group is self.group else None
        # identities, compared in C: about 25 ns per parameter
        return (
            isinstance(params, list)
            and len(params) == len(self.params)
            and all(map(is_, params, self.params))
        )

    def used(self, names: Mapping[nn.Parameter, str]) -> dict[str, Any]:
        """Return the group with the configuration and the names that are used."""
        used = {**self.group, **dict(zip(CONFIGURATION, self.configuration, strict=True))}
        if "param_names" in used:
            used["param_names"] = [names[p] for p in self.params]
        return used

    def check_configuration(self, number: int) -> None:
        """Raise `StructPrecondError` if the group's configuration was changed.

        Args:
            number: The place of the group in `param_groups`.
        """
        if self._is_configured_as(self.group):
            return
        used = dict(zip(CONFIGURATION, self.configuration, strict=True))
        changes = [
            f"{key} from {describe_object(value)} to "
            + (describe_object(self.group[key]) if key in self.group else "nothing")
            for key, value in used.items()
            if not self._is_configured_as({**used, key: self.group.get(key, used)})
        ]
        raise StructPrecondError(
            f"The configuration of param group {number} was changed: {', '.join(changes)}. The "
            "state was built for the former value, which checkpoints save. Set it back, or build "
            "a new optimizer."
        )

    def _is_configured_as(self, group: Mapping[str, Any]) -> bool:
        with suppress(KeyError, TypeError, ValueError, RuntimeError):  # of comparing anything
            return bool(_values_of(group) == self.configuration)
        return False


def _frozen(value: Any) -> Any:
    """Return a copy of dicts and lists, so that changes in them are noticed."""
    if isinstance(value, Mapping):
        return {key: _frozen(entry) for key, entry in value.items()}
    return [*map(_frozen, value)] if isinstance(value, list) else value
