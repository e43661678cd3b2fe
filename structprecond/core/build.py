"""From a param group to buckets: what is treated jointly, by which strategy, in which stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from structprecond.core.bucket import Bucket, BucketKey, compute_dtype
from structprecond.core.naming import BareParameters, plain_name
from structprecond.core.rounding import Rounding
from structprecond.core.routing import Route, Routing
from structprecond.core.units import Unit, find_units
from structprecond.errors import GroupError, StructPrecondError, StructureError
from structprecond.groups import PreconditionerGroup, StackExperts
from structprecond.roles import RoleName, infer_roles
from structprecond.strategies.base import Strategy
from structprecond.structures import StructuredMatrix
from structprecond.structures.spec import per_axis, resolve_structures

# 16 MB in float32
_MOST_ENTRIES = 2**22
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# factors hold squares of gradients, which leave the range of float16 and of anything shorter
_FACTOR_DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def named_group(model: nn.Module | None, param_group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a param group with the model's names of its parameters.

    Raises:
        GroupError: If a parameter does not belong to the model.
    """
    group = dict(param_group)
    if model is None or isinstance(group.get("params"), set):
        return group
    names = {p: plain_name(name) for name, p in model.named_parameters()}
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    params = [p[1] if isinstance(p, tuple) else p for p in params]
    if wrong := [p for p in params if not isinstance(p, Tensor)]:
        raise GroupError(
            f"params= takes parameters of the model, or group dicts, got a "
            f"{type(wrong[0]).__name__}. Did you mean module.parameters()?"
        )
    if foreign := [tuple(p.shape) for p in params if p not in names]:
        raise GroupError(
            f"Parameters of shapes {foreign} do not belong to the model. Pass parameters of "
            "the model that is the first argument."
        )
    group["params"] = [(names[p], p) for p in params]
    return group


def check_rules(rules: Any) -> tuple[PreconditionerGroup, ...] | None:
    """Return grouping rules as a tuple.

    Raises:
        GroupError: If they are no rules, or a single one by itself.
    """
    if rules is None:
        return None
    if isinstance(rules, PreconditionerGroup) or not isinstance(rules, Iterable):
        raise GroupError(
            f"combine_params takes a tuple of rules, got {rules!r} alone. Put it into a tuple."
        )
    return tuple(rules)


def make_buckets(
    model: nn.Module | None,
    group: dict[str, Any],
    routing: Routing,
    names: Mapping[nn.Parameter, str],
    rounding: Rounding,
) -> list[Bucket]:
    """Distribute the parameters of a param group to units, strategies and stacks.

    Args:
        model: The model; None if only parameters are known.
        group: The param group, complete.
        routing: What the group's `strategy` says.
        names: The names of its parameters.
        rounding: How parameters of low precision are rounded.

    Raises:
        StructPrecondError: If something of the group cannot be applied to its parameters.
    """
    for p, name in names.items():
        if is_lazy(p):
            raise GroupError(
                f"{name} has no shape yet. Run one forward pass before building the optimizer."
            )
        if p.dtype not in _DTYPES or p.layout != torch.strided:
            raise GroupError(
                f"{name} is of {p.dtype} and of the layout {p.layout}; only dense real "
                "floating-point parameters of at least 16 bits work."
            )
    if group["structures"] != "dense" and not any(s.structures for s in routing.strategies):
        raise StructureError(
            f"structures={group['structures']!r} is given, but "
            f"{type(routing.main).__name__} has no Kronecker factors. Leave it out."
        )
    together: dict[tuple[Strategy[Any], BucketKey], list[tuple[Unit, str]]] = {}
    for unit, route in _find_routes(model, group, routing, names):
        if unit.shape.numel() and unit.rows:
            key = (route.strategy, _bucket_key(unit, group, route.strategy))
            together.setdefault(key, []).append((unit, route.rule))
    return [
        Bucket(
            group,
            strategy,
            routing.prefix(strategy),
            key,
            [unit for unit, _ in members],
            [rule for _, rule in members],
            rounding,
        )
        for (strategy, key), stack in together.items()
        for members in _split(key, stack)
    ]


def _split(key: BucketKey, stack: Sequence[tuple[Unit, str]]) -> Iterator[list[tuple[Unit, str]]]:
    """Yield parts of a stack of units, on the CPU none larger than pays.

    Large matrices gain nothing from long stacks, but these fall out of the caches.
    """
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
    """Return the entries of a tensor or of its largest Kronecker factor, whichever are more."""
    factors = [
        _entries(structure, dim)
        for structure, dim in zip(key.structures, key.shape, strict=True)
        if structure is not None
    ]
    return max([key.shape.numel(), *factors])


@lru_cache
def _entries(structure: type[StructuredMatrix], dim: int) -> int:
    """Return how many entries a matrix of a structure stores."""
    return sum(t.numel() for t in structure.zeros(dim, device="cpu").named_tensors().values())


def _find_routes(
    model: nn.Module | None,
    group: Mapping[str, Any],
    routing: Routing,
    names: Mapping[nn.Parameter, str],
) -> Iterable[tuple[Unit, Route]]:
    """Yield the units of a param group with the strategy that each gets."""
    params, rules = group["params"], group["combine_params"]
    if not routing.looks_at_roles:
        route = Route(routing.main, "default")
        rules = _usual_rules(model, routing.main) if rules is None else rules
        for unit in find_units(model, params, rules, names):
            yield unit, route
        return
    roles = _roles(model, names)
    if rules is not None:
        for unit in find_units(model, params, rules, names):
            yield unit, routing.route(unit.names, roles[unit.params[0]])
        return
    # without rules of the user, each strategy treats its parameters as it likes best
    routes = {p: routing.route((names[p],), roles[p]) for p in params}
    for strategy in routing.strategies:
        own = [p for p in params if routes[p].strategy == strategy]
        for unit in find_units(model, own, _usual_rules(model, strategy, StackExperts()), names):
            yield unit, routes[unit.params[0]]


def _usual_rules(
    model: nn.Module | None, strategy: Strategy[Any], *first: PreconditionerGroup
) -> list[PreconditionerGroup]:
    """Return the rules that suit a strategy; those that look at modules only if there are some."""
    rules = dict.fromkeys((*first, *strategy.combine_params))
    return [rule for rule in rules if model is not None or not rule.requires_modules]


def _roles(
    model: nn.Module | None, names: Mapping[nn.Parameter, str]
) -> dict[nn.Parameter, RoleName]:
    """Return the role of each parameter; by name and shape alone if there is no model."""
    seen = BareParameters(names) if model is None else model
    roles = infer_roles(seen)
    return {p: roles[name].role for name, p in seen.named_parameters()}


def _bucket_key(unit: Unit, group: Mapping[str, Any], strategy: Strategy[Any]) -> BucketKey:
    label = f"{unit.label} (grouped shape {tuple(unit.shape)})"
    order, dtype, device = len(unit.shape), unit.params[0].dtype, unit.params[0].device
    own = compute_dtype(dtype)
    if not strategy.structures:
        return BucketKey(unit.rule, unit.shape, (None,) * order, (own,) * order, dtype, device)
    structures = strategy.adapt_structures(
        resolve_structures(group["structures"], order, label),
        unit.shape,
        max(p.ndim for p in unit.params),
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
