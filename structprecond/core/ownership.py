"""Assigns each row to the rank that keeps its state and computes its updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from structprecond.core.boxes import is_dtensor
from structprecond.core.bucket import Bucket, BucketKey
from structprecond.core.build import RoutedUnit
from structprecond.core.costs import refresh_operations, step_operations
from structprecond.core.rounding import Rounding
from structprecond.core.strategy import interval_of
from structprecond.core.units import Unit
from structprecond.core.windows import find_windows


@dataclass(frozen=True, eq=False)
class Item:
    """What has one owner: a unit, or one row of a stacked one.

    Args:
        unit: The unit.
        row: The number of the row; None for the whole unit.
        work: The operations of a step, refreshes included, up to a constant factor.
        state_bytes: The bytes of the state.
    """

    unit: Unit
    row: int | None
    work: float
    state_bytes: int


@dataclass
class Loads:
    """What the owners have to do and to keep, over all param groups.

    Args:
        work: The operations of a step of each rank.
        state_bytes: The bytes of the state of each rank.
    """

    work: list[float]
    state_bytes: list[int]

    @classmethod
    def none(cls, ranks: int) -> Loads:
        """Return the loads of ranks without any units."""
        return cls([0.0] * ranks, [0] * ranks)


def items_of(routed: RoutedUnit, key: BucketKey, row_bytes: int) -> list[Item]:
    """Return what can have an owner of its own: rows if they are ranges of the first axis.

    Args:
        routed: The unit.
        key: Its key.
        row_bytes: The bytes of the state of one row.
    """
    unit, work = routed.unit, _work(routed, key)
    if not splits(unit):
        return [Item(unit, None, unit.rows * work, unit.rows * row_bytes)]
    return [Item(unit, row, work, row_bytes) for row in range(unit.rows)]


def splits(unit: Unit) -> bool:
    """Return whether the rows of a unit are equal ranges of the first axis of its parameter."""
    if not unit.rule.stacked or unit.rows < 2 or len(unit.params) > 1:
        return False
    shape = unit.params[0].shape
    windows = None if shape[0] % unit.rows else find_windows(unit)
    return windows is not None and windows[0].stride == torch.empty(shape, device="meta").stride()


def _work(routed: RoutedUnit, key: BucketKey) -> float:
    strategy = routed.route.strategy
    every: Any = routed.group.get(f"{routed.prefix}{interval_of(strategy)}")
    refresh = refresh_operations(strategy, key)
    return step_operations(strategy, key) + refresh / (every if isinstance(every, int) else 1)


def bytes_of_row(routed: RoutedUnit, key: BucketKey, rounding: Rounding) -> int:
    """Return the bytes of the state of one row, the core's counters included; allocates nothing."""
    key = replace(key, device=torch.device("meta"))
    strategy, prefix = routed.route.strategy, routed.prefix
    bucket = Bucket(routed.group, strategy, prefix, key, [routed.unit], [], rounding)
    return sum(t.nbytes for t in bucket.named_tensors().values()) // bucket.rows


def assign(items: Sequence[Item], loads: Loads) -> list[int]:
    """Return the owner of each item: the costliest first, each to the rank with the least load.

    The load of a rank is its share of all work or of all state, whichever is larger. Equal loads go
    to the first rank, and equal costs by name, so that all ranks find the same.

    Args:
        items: The items.
        loads: The loads from other param groups, which get those of the items.

    Source: Graham 1969, longest processing time first.

    Example:
        >>> from structprecond.core.units import Unit
        >>> unit = Unit(None, (), ("weight",), torch.Size([1]), 1)
        >>> assign([Item(unit, None, work, 0) for work in (1.0, 4.0, 3.0)], Loads.none(2))
        [1, 0, 1]
    """
    total = sum(loads.work) + sum(item.work for item in items) or 1.0
    total_bytes = sum(loads.state_bytes) + sum(item.state_bytes for item in items) or 1

    def cost(i: int) -> tuple[Any, ...]:
        item = items[i]
        largest = max(item.work / total, item.state_bytes / total_bytes)
        return -largest, item.unit.label, item.row or 0

    # vectors over ranks, since a thousand ranks may share ten thousand items
    work = torch.tensor(loads.work, dtype=torch.float64, device="cpu")
    state = torch.tensor(loads.state_bytes, dtype=torch.float64, device="cpu")
    owners = [0] * len(items)
    for i in sorted(range(len(items)), key=cost):
        item = items[i]
        shares = (work + item.work) / total
        torch.maximum(shares, (state + item.state_bytes) / total_bytes, out=shares)
        owner = owners[i] = int(shares.argmin())
        work[owner] += item.work
        state[owner] += item.state_bytes
    loads.work[:] = work.tolist()
    loads.state_bytes[:] = map(int, state.tolist())
    return owners


@dataclass(frozen=True, eq=False)
class Share:
    """A unit, who owns it, and what this rank owns of it.

    Args:
        routed: The unit.
        owners: Its owner, or the owner of each of its rows.
        mine: What this rank owns; None for nothing.
    """

    routed: RoutedUnit
    owners: tuple[int, ...]
    mine: Unit | None

    @classmethod
    def of(cls, routed: RoutedUnit, owners: Sequence[int], me: int) -> Share:
        """Return the share of a rank.

        Args:
            routed: The unit.
            owners: Its owner, or the owner of each of its rows.
            me: The rank.
        """
        unit = routed.unit
        if len(owners) == 1:
            copied = any(map(is_dtensor, unit.params))
            copies = tuple(_placeholder(p, p.shape) for p in unit.params) if copied else None
            return cls(
                routed, tuple(owners), replace(unit, copies=copies) if me in owners else None
            )
        rows = tuple(row for row, owner in enumerate(owners) if owner == me)
        if not rows:
            return cls(routed, tuple(owners), None)
        copy = _placeholder(unit.params[0], torch.Size([len(rows), *unit.shape]))
        mine = replace(unit, rows=len(rows), copies=(copy,), row_numbers=rows)
        return cls(routed, tuple(owners), mine)

    def regrouped(self, groups: Mapping[int, dict[str, Any]]) -> Share:
        """Return the share with another param group, by the identity of the one before."""
        group = groups[id(self.routed.group)]
        return replace(self, routed=replace(self.routed, group=group))

    @property
    def by_rows(self) -> bool:
        """Whether each row has an owner of its own."""
        return len(self.owners) > 1

    @property
    def copied(self) -> bool:
        """Whether owners update copies, and not the parameters themselves."""
        return self.by_rows or any(map(is_dtensor, self.routed.unit.params))


def _placeholder(p: torch.Tensor, shape: torch.Size) -> torch.nn.Parameter:
    """Return a parameter whose memory is freed until a step needs it."""
    copy = torch.empty(shape, dtype=p.dtype, device=p.device)
    copy.untyped_storage().resize_(0)
    return torch.nn.Parameter(copy, requires_grad=False)
