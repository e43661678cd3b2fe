"""Turns a param group into buckets: groups parameters, routes the units and stacks them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from structprecond.core.bucket import Bucket, BucketKey, compute_dtype
from structprecond.core.costs import count_entries, naming_units
from structprecond.core.naming import BareParameters
from structprecond.core.rounding import Rounding
from structprecond.core.routing import Route, Routing
from structprecond.core.strategy import Strategy
from structprecond.core.units import Unit, find_units
from structprecond.errors import GroupError, StructPrecondError, StructureError
from structprecond.groups import PreconditionerGroup, StackExperts
from structprecond.roles import Role, infer_roles
from structprecond.structures.spec import AUTO, per_axis, resolve_structures

# 16 MB in float32
_MOST_ENTRIES = 2**22
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# factors hold squares of gradients, which leave the range of float16 and of anything shorter
_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def make_buckets(
    model: nn.Module | None,
    group: dict[str, Any],
    routing: Routing,
    names: Mapping[nn.Parameter, str],
    rounding: Rounding,
) -> list[Bucket]:
    """Group the parameters of a param group, route the units and stack them.

    Args:
        model: The model; None if only parameters are known.
        group: The complete param group.
        routing: The routing from the group's `strategy`.
        names: The names of its parameters.
        rounding: How low-precision parameters are rounded.

    Raises:
        StructPrecondError: If the group's settings do not fit its parameters.
    """
    for p, name in names.items():
        if is_lazy(p):
            raise GroupError(
                f"{name} has no shape yet. Run one forward pass before building the optimizer."
            )
        if p.dtype not in _DTYPES or p.layout != torch.strided:
            raise GroupError(
                f"{name} has {p.dtype} and the layout {p.layout}, expected a dense real "
                "floating-point parameter of at least 16 bits. Convert it or leave it out."
            )
    # "dense" too: a group with a strategy of its own inherits it from the optimizer
    nothing_asked = group["structures"] in (AUTO, "dense")
    if not nothing_asked and not any(s.structures for s in routing.strategies):
        raise StructureError(
            f"structures={group['structures']!r} is given, but "
            f"{type(routing.main).__name__} has no Kronecker factors. Leave it out."
        )
    together: dict[tuple[Strategy[Any], BucketKey], list[tuple[Unit, str]]] = {}
    for unit, route in _find_routes(model, group, routing, names):
        if unit.shape.numel() and unit.rows:
            own = (route.strategy, _bucket_key(unit, group, route.strategy))
            together.setdefault(own, []).append((unit, route.rule))
    buckets = []
    for (strategy, key), stack in together.items():
        for members in _split(key, stack):
            units, rules = map(list, zip(*members, strict=True))
            with naming_units("making the state", units, key):
                prefix = routing.prefix(strategy)
                buckets.append(Bucket(group, strategy, prefix, key, units, rules, rounding))
    return buckets


def _split(key: BucketKey, stack: Sequence[tuple[Unit, str]]) -> Iterator[list[tuple[Unit, str]]]:
    """Split a long stack of units on the CPU, where it would gain nothing and leave the caches."""
    most = _MOST_ENTRIES // _largest(key) if key.device.type == "cpu" else None
    part: list[tuple[Unit, str]] = []
    rows = 0
    for unit, rule in stack:
        if part and most is not None and rows + unit.rows > most:
            yield part
            part, rows = [], 0
        part.append((unit, rule))
        rows += unit.rows
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
    params, rules = group["params"], group["combine_params"]
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


def left_out_axes(bucket: Bucket) -> tuple[int, ...]:
    """Return the axes that have no factor because of their length: shorter ones would have one."""
    unit, strategy = bucket.units[0], bucket.strategy
    order = len(unit.shape)
    if not strategy.structures:
        return ()
    try:
        asked = resolve_structures(bucket.group["structures"], order, unit.label)
        short = strategy.adapt_structures(asked, (1,) * order, _axes_of(unit), unit.label)
    except StructureError:  # with more factors there may be no root
        return ()
    both = zip(short, bucket.key.structures, strict=True)
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
