"""What to do where the state of ranks differs much."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from structprecond.core.bucket import compute_dtype
from structprecond.core.costs import quote
from structprecond.core.naming import describe_shape
from structprecond.core.ownership import Item, Loads, assign
from structprecond.plan.mesh import SHARD, MeshSpec
from structprecond.tables import human

UNEVEN = 1.5
"""The largest state of a rank over the ideal from which on units are too few for the ranks."""
_LARGE_FACTORS = 4
"""How many times the numbers of a unit its state has if factors are most of it, not moments."""


def advise(items: Sequence[Item], spec: MeshSpec) -> tuple[str, ...]:
    """Return what to do if units are too few, or too different, for the ranks that own them.

    Args:
        items: All that has one owner.
        spec: The mesh.
    """
    uneven = unevenness(items, spec.owners)
    if uneven <= UNEVEN:
        return ()
    largest = max(items, key=lambda item: item.state_bytes)
    ideal = sum(item.state_bytes for item in items) / spec.owners
    size = f"{describe_shape(largest.unit.shape)}, {human(largest.state_bytes)}"
    return (
        f"The largest state is {uneven:.1f} times the ideal: {len(items):,} units and rows are too "
        f"few, or too different, for {spec.owners:,} ranks. The largest is {largest.unit.label} "
        f"({size}), the ideal {human(ideal)}.",
        _make_smaller(largest, ideal, {len(item.unit.shape) for item in items}),
        _own_in_groups(items, spec),
    )


def unevenness(items: Sequence[Item], ranks: int) -> float:
    """Return the largest state of a rank over the ideal."""
    loads = Loads.none(ranks)
    assign(items, loads)
    return max(loads.state_bytes) * ranks / sum(loads.state_bytes)


def _make_smaller(item: Item, ideal: float, orders: set[int]) -> str:
    """Return how to make the largest unit smaller, among units of some numbers of axes."""
    unit = item.unit
    numbers = item.state_bytes / compute_dtype(unit.params[0].dtype).itemsize
    if numbers > _LARGE_FACTORS * unit.shape.numel():
        spec = dict.fromkeys(sorted(orders), "auto") | {len(unit.shape): "block1024diagonal"}
        return (
            "Most of its state is Kronecker factors. Smaller ones take less memory and time, such "
            f"as structures={quote(spec)}. SplitHeads makes rows that have an owner each."
        )
    least, rows = ceil(item.state_bytes / ideal), unit.shape[0]
    parts = next((n for n in range(least, rows + 1) if rows % n == 0), 1)
    if unit.rule.stacked or len(unit.params) > 1 or parts == 1:
        return "Most of its state is moments, and it cannot be split by SplitHeads."
    return (
        f"Most of its state is moments. SplitHeads({unit.label!r}, heads={parts}) in "
        "combine_params= makes rows of it that have an owner each. This changes nothing for "
        "AdamW; other strategies treat the rows as matrices of their own."
    )


def _own_in_groups(items: Sequence[Item], spec: MeshSpec) -> str:
    """Return how many ranks are enough to share the state as it is."""
    owners = spec.owners
    fewer = next(
        n for n in range(owners - 1, 0, -1) if owners % n == 0 and unevenness(items, n) <= UNEVEN
    )
    if SHARD in spec.names:
        how = f"--mesh replicate={spec.world // fewer},shard={fewer}"
    else:
        how = f"mesh= with groups of {fewer} ranks, planned by --world {fewer}"
    return (
        f"More than {fewer:,} owners save little state as it is. Within groups of {fewer:,} ranks "
        f"the optimizer sends nothing to others: {how}."
    )
