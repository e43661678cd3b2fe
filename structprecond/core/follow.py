"""Follows what other code does to `param_groups` and to the model's parameters, or refuses it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from structprecond.core.bucket import Bucket
from structprecond.core.build import RoutedUnit
from structprecond.core.change import Change, Match, listed, why_not
from structprecond.core.entry import Entries
from structprecond.core.followed import Followed
from structprecond.core.naming import enumerate_names
from structprecond.core.places import Places
from structprecond.core.units import Unit
from structprecond.core.usable import problem_of
from structprecond.errors import DistributedError, GroupError, StructPrecondError

_MOST_IDLE_STEPS = 10


class Follower:
    """Compares the param groups and the model with what the optimizer uses.

    A group that was replaced by a copy, removed parameters and groups, another order, and model
    parameters that were replaced by others of the same name and shape are followed. Anything else
    is refused before anything changes.

    Args:
        buckets: The buckets of all groups, changed in place.
        frozen: The units without state of all groups, changed in place.
        names: The names of all parameters, changed in place.

    Attributes:
        refusal: Why the last change was refused; None if it was followed.
    """

    def __init__(
        self, buckets: list[Bucket], frozen: list[RoutedUnit], names: dict[nn.Parameter, str]
    ) -> None:
        self._buckets, self._frozen, self._names = buckets, frozen, names
        self._groups: list[Followed] = []
        # the names of each parameter in the model; several if modules share it
        self._known_as: dict[nn.Parameter, list[str]] = {}
        # parameters that left the model, but still have gradients
        self._outside: list[nn.Parameter] = []
        self._places: Places | None = None
        self._watches = False
        self.refusal: StructPrecondError | None = None
        self._idle_steps = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the places, which belong to one model."""
        return {**self.__dict__, "_places": None, "_watches": False, "refusal": None}

    def add(self, model: nn.Module | None, group: dict[str, Any]) -> None:
        """Follow a new group.

        Raises:
            StructPrecondError: If one of its parameters is in use, because a change that removes it
                from another group was refused.
        """
        params = list(group["params"])
        used = {p for followed in self._groups for p in followed.params}
        if self.refusal is not None and any(p in used for p in params):
            raise self.refusal
        self._groups.append(Followed.of(group))
        if model is not None:
            if self._places is None or not all(map(self._places.names_of, params)):
                self._places = Places(model)
            self._known_as |= {p: self._places.names_of(p) for p in params}
            self._watches = False

    def used_groups(self, check: bool = False) -> list[dict[str, Any]]:
        """Return the groups with the configuration and the names that are used, for checkpoints.

        Args:
            check: Whether to raise as `check_groups`. Default: False.
        """
        if check:
            self.check_groups()
        return [followed.used(self._names) for followed in self._groups]

    def check_groups(self) -> None:
        """Raise `StructPrecondError` if the configuration of a group was changed."""
        for number, followed in enumerate(self._groups):
            followed.check_configuration(number)

    def idle(self, live: Sequence[Sequence[bool]]) -> str | None:
        """Count steps in a row without any gradient; warn about many if there is no model to ask.

        Args:
            live: Whether each unit of each bucket takes part in the step.

        Raises:
            GroupError: Instead of the warning if there are several processes, which may have
                sharded the model: nothing would ever move.
        """
        if any(map(any, live)):
            self._idle_steps = 0
            return None
        params = [p for followed in self._groups for p in followed.params if p.requires_grad]
        if not params or any(p.grad is not None for p in params):
            self._idle_steps = 0
            return None
        self._idle_steps += 1
        self._places = None  # look at the whole model in the next step
        if self._known_as or self._idle_steps < _MOST_IDLE_STEPS:
            return None
        text = (
            f"None of the {len(params)} parameters had a gradient in {self._idle_steps} steps in a "
            "row, which moved nothing. If the model's parameters were replaced after the optimizer "
            "was built, build a new one, or pass the model itself: then they are followed."
        )
        if dist.is_available() and dist.is_initialized():
            raise GroupError(text)
        return text

    # --- changes ---------------------------------------------------------------------------------

    def find(
        self, model: nn.Module | None, param_groups: Sequence[dict[str, Any]], always: bool
    ) -> Change | None:
        """Return what has changed since the last call; None for nothing.

        Args:
            model: The model; None if only parameters are known.
            param_groups: The param groups.
            always: Whether to return a change even if groups and model hold the same as before.

        Raises:
            StructPrecondError: If a change cannot be followed.
        """
        if self._is_current(model, param_groups) and not always:
            return None
        places = None if model is None else Places(model)
        fates = {p: self._fate_of(p, places) for p in self._known_as} if places else {}
        return Change(places, self._match(param_groups, fates))

    @contextmanager
    def refusing(self, quiet: bool) -> Iterator[None]:
        """Note whether a change is refused.

        Args:
            quiet: Whether to leave it to a later call to raise.
        """
        try:
            yield
        except DistributedError:
            raise
        except StructPrecondError as error:
            self.refusal = error
            if not quiet:
                raise
        else:
            self.refusal = None

    def follow(self, change: Change, entries: Entries, state: MutableMapping[Any, Any]) -> None:
        """Go on with the state of what stays.

        Args:
            change: The change; lists of parameters get the model's new ones.
            entries: The entries of the state.
            state: The optimizer's state.

        Raises:
            StructPrecondError: If the state cannot stay as it is; nothing is changed.
        """
        new, groups = change.new, change.groups
        kept = [_kept_units(bucket, new, self._names) for bucket in self._buckets]
        frozen = [r for r in self._frozen if _stays(r.unit, new, self._names)]
        entries.adopt(state)
        # nothing below can fail
        changed = []
        for bucket, units in zip(self._buckets, kept, strict=True):
            params = [p for unit in bucket.units for p in unit.params]
            if not all(units) or any(new[p] is not p for p in params):
                bucket.keep(units, new)
                changed.append(bucket)
            # none if the group was popped
            bucket.group = groups.get(id(bucket.group), bucket.group)
        self._buckets[:] = [bucket for bucket in self._buckets if bucket.units]
        self._frozen[:] = [
            replace(r, group=groups[id(r.group)], unit=r.unit.renewed(new)) for r in frozen
        ]
        entries.renew(new, state)
        entries.show([bucket for bucket in changed if bucket.units], state)
        names = {q: self._names[p] for p, q in new.items()}
        self._names.clear()
        self._names.update(names)
        self.note(change)

    def note(self, change: Change) -> None:
        """Note what is used from now on, and write it into the groups."""
        known_as, places = {}, change.places
        for match in change.matches:
            group, now = match.group, match.now
            if not isinstance(group["params"], list):
                group["params"] = list(now)
            elif any(p is not q for p, q in zip(group["params"], now, strict=True)):
                group["params"][:] = now
            labels = [self._names[p] for p in now]
            if group.get("param_names", labels) != labels:
                group["param_names"] = labels
            match.followed.group, match.followed.params = group, list(now)
            if places is not None:
                for p, q in zip(match.known, now, strict=True):
                    known_as[q] = places.names_of(q) or self._known_as[p]
        self._groups = [match.followed for match in change.matches]
        self._known_as, self._places, self._watches = known_as, places, False
        self._outside = [p for p in known_as if places is not None and not places.names_of(p)]

    def _is_current(self, model: nn.Module | None, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Return whether groups and model are as the last call left them."""
        if len(param_groups) != len(self._groups) or not all(
            map(Followed.is_in, self._groups, param_groups)
        ):
            return False
        if model is None:
            return True
        if any(p.requires_grad and p.grad is None for p in self._outside):
            return False
        if self._places is None or self._places.model is not model:
            return False
        if not self._watches:
            self._places.watch({p for followed in self._groups for p in followed.params})
            self._watches = True
        return self._places.unchanged()

    def _fate_of(self, p: nn.Parameter, places: Places) -> nn.Parameter | str | None:
        """Return which parameter of the model replaced another one, None if it still is in use.

        A string says why it cannot be followed, and what to do.
        """
        names, here = self._known_as[p], places.names_of(p)
        if len(here) >= len(names):
            return None  # perhaps under other names
        others = {places.held[n]: n for n in names if places.held.get(n, p) is not p}
        if here or len(others) > 1:
            new = {q: n for q, n in others.items() if q.requires_grad and q not in self._known_as}
            if here and not new:
                return None
            return (
                f"was shared by {', '.join(names)}, but the model now holds another parameter in "
                f"{', '.join((new or others).values())}. Tie them again, or build a new optimizer."
            )
        if not others:
            if not p.requires_grad or p.grad is not None:
                return None
            return (
                "is no longer a parameter of the model and has no gradient. Remove it from "
                "param_groups if it has no further use; otherwise build a new optimizer."
            )
        ((q, name),) = others.items()
        if q in self._known_as:
            return (
                f"was replaced in the model by a parameter that the optimizer has already: {name} "
                "is tied now. Remove the old one from param_groups, or build a new optimizer."
            )
        problem = problem_of(q)
        if problem is None and q.shape != p.shape:
            problem = (
                f"has the shape {tuple(q.shape)}, expected {tuple(p.shape)}. Build a new optimizer."
            )
        if problem is not None:
            return f"was replaced in the model by another parameter, which {problem}"
        return q

    def _match(
        self,
        param_groups: Sequence[dict[str, Any]],
        fates: Mapping[nn.Parameter, nn.Parameter | str | None],
    ) -> list[Match]:
        """Return what each group holds of what was known.

        Raises:
            GroupError: If a group holds anything else, or parameters of another group.
        """
        owners = {p: i for i, known in enumerate(self._groups) for p in known.params}
        origins: dict[Tensor, nn.Parameter] = {}
        for p, q in fates.items():
            if isinstance(q, Tensor) and origins.setdefault(q, p) is not p:
                raise GroupError(
                    f"The model now holds one parameter in place of {self._names[origins[q]]} and "
                    f"{self._names[p]}, whose states differ. Build a new optimizer."
                )
        matches: dict[int, Match] = {}
        for number, group in enumerate(param_groups):
            params = listed(group, number)
            known = [origins.get(p, p) for p in params]
            for i, p in enumerate(known):
                if p not in owners:
                    raise GroupError(
                        f"param_groups[{number}]['params'][{i}], of shape {tuple(p.shape)}, was "
                        f"not given to the optimizer{why_not(p, bool(self._known_as))}"
                    )
                fate = fates.get(p)
                if isinstance(fate, str):
                    raise GroupError(f"{self._names[p]} {fate}")
            own = {owners[p] for p in known} or {self._place_of(group, number)}
            if len(own) > 1 or own & matches.keys() or len(set(known)) < len(known):
                raise GroupError(
                    f"param_groups[{number}] holds parameters of another group, or one twice: "
                    f"{enumerate_names([self._names[p] for p in known])}. The state of parameters "
                    "belongs to their group: put them back, or build a new optimizer."
                )
            now = [fate if isinstance(fate := fates.get(p), Tensor) else p for p in known]
            (place,) = own
            matches[place] = Match(group, self._groups[place], known, now)
        return list(matches.values())

    def _place_of(self, group: dict[str, Any], number: int) -> int:
        """Return which of the known groups was emptied."""
        for i, followed in enumerate(self._groups):
            if followed.group is group:
                return i
        if number < len(self._groups):
            return number
        raise GroupError(
            f"param_groups[{number}] was not given to the optimizer. Use add_param_group."
        )


def _kept_units(
    bucket: Bucket, new: Mapping[nn.Parameter, nn.Parameter], names: Mapping[nn.Parameter, str]
) -> list[bool]:
    """Return which units of a bucket stay.

    Raises:
        StructPrecondError: If a part of a unit was removed, or if a shape has changed.
    """
    kept = [_stays(unit, new, names) for unit in bucket.units]
    for p, shape in zip(bucket.params, bucket.layout.shapes, strict=True):
        if p in new and p.shape != shape:
            raise StructPrecondError(
                f"{names[p]} has the shape {tuple(p.shape)}, expected {tuple(shape)}. Build a new "
                "optimizer."
            )
    return kept


def _stays(unit: Unit, new: Container[nn.Parameter], names: Mapping[nn.Parameter, str]) -> bool:
    """Return whether the parameters of a unit stay.

    Raises:
        GroupError: If only some of them were removed.
    """
    lost = [names[p] for p in unit.params if p not in new]
    if lost and len(lost) < len(unit.params):
        raise GroupError(
            f"{enumerate_names(lost)} was removed from param_groups, but is in one unit with "
            f"others: {unit.label}. Remove the whole unit, or build a new optimizer."
        )
    return not lost
