"""Turns a param group into buckets: groups parameters, routes the units and stacks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from structprecond.core.bucket import Bucket, BucketKey, compute_dtype
from structprecond.core.chosen_policies import policies_of
from structprecond.core.costs import count_entries, naming_units
from structprecond.core.decay import decays, undecayed
from structprecond.core.naming import BareParameters
from structprecond.core.policies import Policy
from structprecond.core.rounding import Rounding
from structprecond.core.routing import Route, Routing
from structprecond.core.strategy import Strategy
from structprecond.core.units import Unit, find_units
from structprecond.core.usable import problem_of
from structprecond.errors import GroupError, StructPrecondError, StructureError
from structprecond.groups import PreconditionerGroup, StackExperts
from structprecond.roles import ROLES, Role, infer_roles
from structprecond.structures.spec import AUTO, Structure, per_axis, resolve_structures

# 16 MB in float32
_MOST_ENTRIES = 2**22
# factors hold squares of gradients, which leave the range of float16 and of anything shorter
_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def route_units(
    model: nn.Module | None,
    group: dict[str, Any],
    routing: Routing,
    names: Mapping[nn.Parameter, str],
) -> list[RoutedUnit]:
    """Group the parameters of a param group into units, and route these.

    Args:
        model: The model; None if only parameters are known.
        group: The complete param group.
        routing: The routing from the group's `strategy`.
        names: The names of its parameters.

    Raises:
        StructPrecondError: If the group's settings do not fit its parameters.
    """
    for p, name in names.items():
        problem = problem_of(p)
        if problem is not None:
            raise GroupError(f"{name} {problem}")
    # "dense" too: a group with its own strategy inherits it from the optimizer
    nothing_asked = group["structures"] in (AUTO, "dense")
    if not nothing_asked and not any(s.structures for s in routing.strategies):
        raise StructureError(
            f"structures={group['structures']!r} is given, but "
            f"{type(routing.main).__name__} has no Kronecker factors. Leave it out."
        )
    without_decay: set[nn.Parameter] = set()
    if group["no_decay"]:
        by_role = any(rule in ROLES for rule in group["no_decay"])
        found = roles_of(model, names) if by_role else {}
        roles = {p: role.role for p, role in found.items()}
        without_decay = undecayed(group["no_decay"], names, roles)
    units = [
        RoutedUnit(
            group,
            unit,
            route,
            routing.prefix(route.strategy),
            decays(unit.params, without_decay, unit.label),
            policies_of(group["policies"], route.strategy, routing),
        )
        for unit, route in _find_routes(model, group, routing, names)
        if unit.shape.numel() and unit.rows
    ]
    for routed in units:
        routed.key()  # raises if the settings do not fit
    return units


@dataclass(frozen=True, eq=False)
class RoutedUnit:
    """A unit and its route, before it has any state.

    Args:
        group: Its param group.
        unit: The unit.
        route: Its strategy, and the role or pattern that decided.
        prefix: What precedes the names of the strategy's hyperparameters in the group.
        decays: Whether weight decay applies to it.
        policies: What changes its directions.
    """

    group: dict[str, Any]
    unit: Unit
    route: Route
    prefix: str
    decays: bool
    policies: tuple[Policy, ...]

    @property
    def frozen(self) -> bool:
        """Whether no parameter of the unit requires a gradient."""
        return not any(p.requires_grad for p in self.unit.params)

    def key(self) -> BucketKey:
        """Return what the unit shares with those it is stacked with, as its parameters are now."""
        key = _bucket_key(self.unit, self.group, self.route.strategy)
        return replace(key, decays=self.decays, policies=self.policies)


def make_buckets(units: Iterable[RoutedUnit], rounding: Rounding) -> list[Bucket]:
    """Stack units, which allocates their state.

    Args:
        units: The units.
        rounding: How low-precision parameters are rounded.
    """
    together: dict[tuple[int, Strategy[Any], BucketKey], list[RoutedUnit]] = {}
    for routed in units:
        alike = (id(routed.group), routed.route.strategy, routed.key())
        together.setdefault(alike, []).append(routed)
    buckets = []
    for (_, strategy, key), stack in together.items():
        for members in _split(key, stack):
            group, prefix = members[0].group, members[0].prefix
            own = [routed.unit for routed in members]
            rules = [routed.route.rule for routed in members]
            with naming_units("making the state", own, key):
                buckets.append(Bucket(group, strategy, prefix, key, own, rules, rounding))
    return buckets


def _split(key: BucketKey, stack: Sequence[RoutedUnit]) -> Iterator[list[RoutedUnit]]:
    """Split a long stack of units on the CPU, where it would gain nothing and leave the caches."""
    most = _MOST_ENTRIES // _largest(key) if key.device.type == "cpu" else None
    part: list[RoutedUnit] = []
    rows = 0
    for routed in stack:
        if part and most is not None and rows + routed.unit.rows > most:
            yield part
            part, rows = [], 0
        part.append(routed)
        rows += routed.unit.rows
    yield part


def _largest(key: BucketKey) -> int:
    """Return the number of entries of a tensor or of its largest Kronecker factor."""
    factors = [
        count_entries(structure, dim)
        for structure, dim in zip(key.structures, key.shape, strict=True)
        if structure is not None
    ]
    return max([key.shape.numel(), *factors])


def _find_routes(
    model: nn.Module | None,
    group: Mapping[str, Any],
    routing: Routing,
    names: Mapping[nn.Parameter, str],
) -> Iterable[tuple[Unit, Route]]:
    """Yield the units of a param group with their routes."""
    params, rules = list(names), group["combine_params"]
    if not routing.looks_at_roles:
        route = Route(routing.main, "default")
        rules = _usual_rules(model, routing.main) if rules is None else rules
        for unit in find_units(model, params, rules, names):
            yield unit, route
        return
    roles = {p: found.role for p, found in roles_of(model, names).items()}
    if rules is not None:
        for unit in find_units(model, params, rules, names):
            yield unit, routing.route(unit.names, roles[unit.params[0]])
        return
    # without groupings from the user, each strategy applies its own
    routes = {p: routing.route((names[p],), roles[p]) for p in params}
    for strategy in routing.strategies:
        own = [p for p in params if routes[p].strategy == strategy]
        for unit in find_units(model, own, _usual_rules(model, strategy, StackExperts()), names):
            yield unit, routes[unit.params[0]]


def _usual_rules(
    model: nn.Module | None, strategy: Strategy[Any], *first: PreconditionerGroup
) -> list[PreconditionerGroup]:
    """Return a strategy's default groupings; without a model, only those that need no modules."""
    rules = dict.fromkeys((*first, *strategy.combine_params))
    return [rule for rule in rules if model is not None or not rule.requires_modules]


def roles_of(
    model: nn.Module | None, names: Mapping[nn.Parameter, str]
) -> dict[nn.Parameter, Role]:
    """Return the role of each parameter; without a model, from name and shape alone."""
    seen = BareParameters(names) if model is None else model
    roles = infer_roles(seen)
    return {p: roles[name] for name, p in seen.named_parameters()}


def left_out_axes(
    unit: Unit,
    strategy: Strategy[Any],
    group: Mapping[str, Any],
    structures: Sequence[Structure],
) -> tuple[int, ...]:
    """Return the axes that have no factor because of their length: shorter ones would have one."""
    order = len(unit.shape)
    if not strategy.structures:
        return ()
    try:
        asked = resolve_structures(group["structures"], order, unit.label)
        short = strategy.adapt_structures(asked, (1,) * order, _axes_of(unit), unit.label)
    except StructureError:  # with more factors there may be no root
        return ()
    both = zip(short, structures, strict=True)
    return tuple(axis for axis, (s, own) in enumerate(both) if s is not None and own is None)


def _axes_of(unit: Unit) -> int:
    """Return the largest number of axes of the ungrouped parameters."""
    return max(p.ndim for p in unit.params)


def _bucket_key(unit: Unit, group: Mapping[str, Any], strategy: Strategy[Any]) -> BucketKey:
    label = f"{unit.label} (grouped shape {tuple(unit.shape)})"
    order, dtype, device = len(unit.shape), unit.params[0].dtype, unit.params[0].device
    own = compute_dtype(dtype)
    if not strategy.structures:
        return BucketKey(unit.rule, unit.shape, (None,) * order, (own,) * order, dtype, device)
    structures = strategy.adapt_structures(
        resolve_structures(group["structures"], order, label, strategy.auto_structures(unit.shape)),
        unit.shape,
        _axes_of(unit),
        label,
    )
    given = per_axis(group["preconditioner_dtypes"], order, "preconditioner_dtypes", label)
    for entry in given:
        if entry is not None and not (isinstance(entry, torch.dtype) and entry.is_floating_point):
            raise StructPrecondError(
                f"preconditioner_dtypes takes floating-point dtypes and None, got {entry!r}."
            )
        if entry not in (None, *_FACTOR_DTYPES):
            raise StructPrecondError(
                f"preconditioner_dtypes holds {entry} for {label}, whose range squares of "
                "gradients leave. Use torch.bfloat16, torch.float32 or torch.float64."
            )
    dtypes = tuple(own if entry is None else entry for entry in given)
    return BucketKey(unit.rule, unit.shape, structures, dtypes, dtype, device)
