"""What to do where the state of ranks differs much."""

from __future__ import annotations

from collections.abc import Sequence

from structprecond.core.ownership import Item, Loads, assign
from structprecond.plan.forecast import UnitCost
from structprecond.plan.mesh import SHARD, MeshSpec

UNEVEN = 1.5
"""The largest state of a rank over the ideal from which on units are too few for the ranks."""


def advise(items: Sequence[Item], units: Sequence[UnitCost], spec: MeshSpec) -> tuple[str, ...]:
    """Return what to do if units are too few for the ranks that own them.

    Args:
        items: All that has one owner.
        units: The units, the largest first.
        spec: The mesh.
    """
    owners = spec.owners
    uneven = unevenness(items, owners)
    if uneven <= UNEVEN:
        return ()
    fewer = next(
        n for n in range(owners - 1, 0, -1) if owners % n == 0 and unevenness(items, n) <= UNEVEN
    )
    groups = spec.world // fewer
    if SHARD in spec.names:
        how = (
            f"shard over {fewer:,} ranks and replicate over {groups:,}, as in "
            f"--mesh replicate={groups},shard={fewer}"
        )
    else:
        how = f"give mesh= a group of {fewer:,} ranks; plan it with --world {fewer}"
    largest = units[0]
    return (
        f"The largest state is {uneven:.1f} times the ideal: {len(items):,} units and rows are too "
        f"few, or too different, for {owners:,} ranks. The largest unit is {largest}.",
        f"Owners beyond {fewer:,} save little memory: {how}. Then the optimizer sends nothing "
        f"outside groups of {fewer:,}.",
        "Smaller units spread further: block structures, such as "
        'structures={2: "block1024diagonal"}, have less state, and SplitHeads gives each head an '
        "owner.",
    )


def unevenness(items: Sequence[Item], ranks: int) -> float:
    """Return the largest state of a rank over the ideal."""
    loads = Loads.none(ranks)
    assign(items, loads)
    return max(loads.state_bytes) * ranks / sum(loads.state_bytes)
