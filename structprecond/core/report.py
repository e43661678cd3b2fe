"""How an optimizer treats each parameter: `describe`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import nn
from torch.optim import Optimizer

from structprecond.core.bucket import Bucket, BucketKey, weight_decay_in
from structprecond.core.build import RoutedUnit, left_out_axes, roles_of
from structprecond.core.exchange import Exchange
from structprecond.core.naming import (
    describe_shape,
    enumerate_names,
    names_of_structures,
    unwrap,
)
from structprecond.core.owners import Owners
from structprecond.core.ownership import Loads, bytes_of_row
from structprecond.core.plain import describe_object
from structprecond.core.rounding import Rounding
from structprecond.core.strategy import Strategy
from structprecond.core.units import Unit
from structprecond.errors import StructPrecondError
from structprecond.roles import ROLES, Role
from structprecond.tables import human, lay_out


@dataclass(frozen=True)
class Row:
    """One stack of the optimizer.

    Args:
        group: The number of the user's param group.
        strategy: The name of the strategy.
        roles: The role of every unit's first parameter, as `infer_roles` finds it; empty if the
            model has parameters without a shape.
        reasons: Why each unit has its role.
        rules: The roles and name patterns that routed its units to the strategy.
        rule: The grouping.
        names: The names of the parameters of every unit, joined by ` + `.
        shape: The shape of one row.
        rows: The number of rows.
        structures: The structure of every axis.
        left_out: The axes without a factor because of their length.
        dtypes: The dtype of every factor.
        state_bytes: The bytes of the stack's state.
        live: Whether any of the parameters requires a gradient.
        weight_decay: The weight decay now; None if the strategy has none.
        decays: Whether `no_decay` leaves it alone.
        owners: The ranks that own some of its rows, counted among those that share the state;
            empty unless rows have owners.
        policies: What changes its directions, in this order.
    """

    group: int
    strategy: str
    roles: tuple[str, ...]
    reasons: tuple[str, ...]
    rules: tuple[str, ...]
    rule: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    rows: int
    structures: tuple[str, ...]
    left_out: tuple[int, ...]
    dtypes: tuple[str, ...]
    state_bytes: int
    live: bool
    weight_decay: float | None = None
    decays: bool = True
    owners: tuple[int, ...] = ()
    policies: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankShare:
    """What one rank does and keeps, where rows have owners.

    Args:
        work: Its share of the operations of a step.
        state: Its share of the bytes of all state.
        state_bytes: The bytes of its state.
    """

    work: float
    state: float
    state_bytes: int


@dataclass(frozen=True)
class Description:
    """How an optimizer treats each parameter; print it for a table.

    Where rows have owners, it is the same on every rank.

    Args:
        rows: One entry per stack.
        parameter_bytes: The bytes of all parameters.
        ranks: The share of each rank; empty unless rows have owners.
    """

    rows: tuple[Row, ...]
    parameter_bytes: int
    ranks: tuple[RankShare, ...] = ()

    @property
    def state_bytes(self) -> int:
        """The bytes of all state."""
        return sum(row.state_bytes for row in self.rows)

    def __str__(self) -> str:
        """Return a table with one line per stack, the totals, and the long axes without factor."""
        strategies = list(dict.fromkeys(row.strategy for row in self.rows))
        rules = [rule for row in self.rows for rule in row.rules]
        routed = any(rule != "default" for rule in rules)
        # a route by role is told by the role
        by_name = any(rule not in ("default", *ROLES) for rule in rules)
        exempt = not all(row.decays for row in self.rows)
        by_decay = exempt or len({row.weight_decay for row in self.rows}) > 1
        owned = any(row.owners for row in self.rows)
        policed = any(row.policies for row in self.rows)
        usual = ("role", "rule", "shape", "rows", "structures", "state", *("owners",) * owned)
        more_columns = ("strategy",) * routed + ("route",) * by_name + ("decay",) * by_decay
        more_columns += ("policies",) * policed
        table: list[tuple[str, ...]] = [("group", "parameters", *more_columns, *usual)]
        for row in self.rows:
            frozen = "" if row.live else " (frozen)"
            table.append(
                (
                    str(row.group),
                    _first_of(row) + frozen,
                    *(row.strategy,) * routed,
                    *(_shorten(", ".join(row.rules), 30),) * by_name,
                    *("-" if row.weight_decay is None else f"{row.weight_decay:g}",) * by_decay,
                    *(_shorten(", ".join(row.policies), 40),) * policed,
                    _shorten(", ".join(dict.fromkeys(row.roles)), 30),
                    _shorten(row.rule, 30),
                    describe_shape(row.shape),
                    str(row.rows),
                    " ".join(_compress(row.structures, row.dtypes)),
                    human(row.state_bytes),
                    *(_ranges(row.owners),) * owned,
                )
            )
        lines = lay_out(table)
        ratio = (
            f" = {self.state_bytes / self.parameter_bytes:.2f} x" if self.parameter_bytes else ""
        )
        total = (
            f"{', '.join(strategies)}: state {human(self.state_bytes)}{ratio} parameters "
            f"({human(self.parameter_bytes)})"
        )
        left_out = [
            f"axis {axis} of {_first_of(row)} ({describe_shape(row.shape)})"
            for row in self.rows
            for axis in row.left_out
        ]
        too_long = [f"No factor for long axes: {enumerate_names(left_out)}"] if left_out else []
        return "\n".join([*lines, lines[1], total, *self._shares(), *too_long])

    def _shares(self) -> list[str]:
        if not self.ranks:
            return []
        work, state = (max(getattr(rank, f) for rank in self.ranks) for f in ("work", "state"))
        largest = human(max(rank.state_bytes for rank in self.ranks))
        return [
            f"largest share of work {work:.2f} of {len(self.ranks)} ranks, of state {state:.2f} "
            f"({largest})"
        ]

    def by_parameter(self) -> str:
        """Return a table with one line per unit: its role, why it has it, and its strategy.

        Example:
            >>> from structprecond import Muon
            >>> print(describe(Muon(nn.Linear(3, 2, bias=False))).by_parameter())
            parameters  role  strategy       reason
            ----------------------------------------------------------------------------------------
            weight      head  AdamWStrategy  output layer: last linear layer outside repeated blocks
        """
        table = [("parameters", "role", "strategy", "reason")]
        for row in self.rows:
            for unit in zip_longest(row.names, row.roles, row.reasons, fillvalue=""):
                table.append((*unit[:2], row.strategy, unit[2]))
        return "\n".join(lay_out(table))


def describe(optimizer: Optimizer) -> Description:
    """Describe how an optimizer treats the parameters: stacks, structures and state bytes.

    Args:
        optimizer: An optimizer of this library, or a SAM around one.

    Returns:
        The description; `print` shows it as a table.

    Raises:
        StructPrecondError: If the optimizer is not from this library.

    Example:
        >>> from structprecond import SIRFShampoo
        >>> print(describe(SIRFShampoo(nn.Linear(3, 2), batch_size=1)))
        group  parameters  role  rule            shape  rows  structures   state
        ------------------------------------------------------------------------
        0      weight      head  PerParameter()  2x3    1     dense dense  170 B
        0      bias        bias  PerParameter()  2      1     diagonal     66 B
        ------------------------------------------------------------------------
        SIRFShampooStrategy: state 236 B = 7.38 x parameters (32 B)
    """
    own: Any = getattr(optimizer, "base_optimizer", optimizer)
    buckets: list[Bucket] | None = getattr(own, "buckets", None)
    if buckets is None:
        raise StructPrecondError(
            f"describe takes an optimizer of this library, got a {type(own).__name__}. Build "
            "one, such as SOAP(model)."
        )
    own._follow()
    team = own.team
    if isinstance(team, Owners):
        stacks = [_Stack.of_exchange(e, own.rounding) for e in team.exchanges]
        shares = _shares_of(team.loads)
    else:
        stacks, shares = [_Stack.of_bucket(bucket) for bucket in buckets], ()
    frozen: dict[Any, list[RoutedUnit]] = {}
    for routed in own.frozen_units:
        key = (id(routed.group), routed.route.strategy, routed.key())
        frozen.setdefault(key, []).append(routed)
    stacks += [
        _Stack(
            same[0].group,
            strategy,
            key,
            [r.unit for r in same],
            [r.route.rule for r in same],
            None,
        )
        for (_, strategy, key), same in frozen.items()
    ]
    numbers = {id(group): i for i, group in enumerate(own.param_groups)}
    roles = _roles(stacks, own.model)
    rows = tuple(stack.row(numbers[id(stack.group)], roles) for stack in stacks)
    parameters = (p for group in own.param_groups for p in group["params"])
    return Description(rows, sum(p.nbytes for p in parameters), shares)


def _shares_of(loads: Loads) -> tuple[RankShare, ...]:
    work, size = sum(loads.work) or 1.0, sum(loads.state_bytes) or 1
    return tuple(
        RankShare(own / work, state / size, state)
        for own, state in zip(loads.work, loads.state_bytes, strict=True)
    )


@dataclass(frozen=True)
class _Stack:
    """Units that are stacked, or will be when they are thawed."""

    group: dict[str, Any]
    strategy: Strategy[Any]
    key: BucketKey
    units: Sequence[Unit]
    rules: Sequence[str]
    weight_decay: float | None
    state_bytes: int = 0
    owners: tuple[int, ...] = ()

    @classmethod
    def of_bucket(cls, bucket: Bucket) -> _Stack:
        """Return a stack of this process."""
        size = sum(t.nbytes for t in bucket.named_tensors().values())
        kind = (bucket.group, bucket.strategy, bucket.key)
        return cls(*kind, bucket.units, bucket.rules, bucket.weight_decay, size)

    @classmethod
    def of_exchange(cls, exchange: Exchange, rounding: Rounding) -> _Stack:
        """Return a stack that several ranks own."""
        routed, key = [share.routed for share in exchange.shares], exchange.all_rows.key
        first = routed[0]
        group, strategy = first.group, first.route.strategy
        return cls(
            group,
            strategy,
            key,
            exchange.all_rows.units,
            [one.route.rule for one in routed],
            weight_decay_in(group, strategy, first.prefix, key.decays),
            exchange.all_rows.rows * bytes_of_row(first, key, rounding),
            tuple(sorted({owner for share in exchange.shares for owner in share.owners})),
        )

    def row(self, number: int, roles: Mapping[nn.Parameter, Role]) -> Row:
        """Return the row of the table, in the param group of a number."""
        known = [roles[unit.params[0]] for unit in self.units if unit.params[0] in roles]
        return Row(
            group=number,
            strategy=type(self.strategy).__name__,
            roles=tuple(role.role for role in known),
            reasons=tuple(role.reason for role in known),
            rules=tuple(dict.fromkeys(self.rules)),
            rule=describe_object(self.key.rule),
            names=tuple(unit.label for unit in self.units),
            shape=tuple(self.key.shape),
            rows=sum(unit.rows for unit in self.units),
            structures=names_of_structures(self.key.structures),
            left_out=left_out_axes(self.units[0], self.strategy, self.group, self.key.structures),
            dtypes=tuple(str(d).removeprefix("torch.") for d in self.key.dtypes),
            state_bytes=self.state_bytes,
            live=any(p.requires_grad for unit in self.units for p in unit.params),
            weight_decay=self.weight_decay,
            decays=self.key.decays,
            owners=self.owners,
            policies=tuple(map(describe_object, self.key.policies)),
        )


def _roles(stacks: Sequence[_Stack], model: nn.Module | None) -> dict[nn.Parameter, Role]:
    units = [unit for stack in stacks for unit in stack.units]
    names = {p: name for u in units for p, name in zip(u.params, u.names, strict=True)}
    try:
        return roles_of(None if model is None else unwrap(model), names)
    except StructPrecondError:  # some lazy layer, which the optimizer need not know
        return {}


def _compress(structures: tuple[str, ...], dtypes: tuple[str, ...]) -> list[str]:
    """Add the dtype of a factor to its structure if it is not the usual one."""
    return [
        s if d in ("float32", "float64") else f"{s}:{d}"
        for s, d in zip(structures, dtypes, strict=True)
    ]


def _first_of(row: Row) -> str:
    """Return the name of a stack's first unit and the number of the others."""
    more = f" (+{len(row.names) - 1})" if len(row.names) > 1 else ""
    return _shorten(row.names[0], 40) + more


def _ranges(ranks: Sequence[int]) -> str:
    """Return ranks as in "0-3 7"."""
    starts = [rank for rank in ranks if rank - 1 not in ranks]
    ends = [rank for rank in ranks if rank + 1 not in ranks]
    pairs = zip(starts, ends, strict=True)
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in pairs)


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
