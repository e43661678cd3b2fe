"""Makes plans: builds the optimizer of one rank, whose team knows what all ranks do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from structprecond.core.costs import refresh_operations, step_operations
from structprecond.core.exchange import Exchange
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.owners import Owners
from structprecond.core.ownership import Item, bytes_of_row, items_of
from structprecond.core.refresh import RefreshSchedule
from structprecond.core.rounding import Rounding
from structprecond.core.units import Unit
from structprecond.errors import StructPrecondError
from structprecond.plan.advice import advise
from structprecond.plan.forecast import Forecast, RankCost, UnitCost
from structprecond.plan.mesh import SHARD, MeshSpec
from structprecond.plan.pretend import place, pretend


def plan(
    build: Callable[[], nn.Module],
    optimizer: Callable[..., StructuredOptimizer],
    *,
    world: int,
    mesh: str = "fsdp",
) -> Forecast:
    """Tell what an optimizer costs on each of many ranks; needs one process and little memory.

    The optimizer of the first rank is built on the meta device, with a process group whose other
    ranks do not exist. Counts and bytes are those of a real run; operations are estimates, see
    `structprecond.core.costs`.

    Args:
        build: Returns the model; called under `torch.device("meta")`.
        optimizer: Returns the optimizer: a class of this library, or a callable that takes the
            model and the keyword `mesh=` and passes both on, such as `partial(SOAP, lr=0.01)`.
        world: The number of ranks.
        mesh: How parameters are placed: "fsdp" shards them over all ranks, as `fully_shard` does;
            "hsdp:16x4" shards them over 16 ranks and replicates these 4 times, as does
            "replicate=4,shard=16"; "ddp" gives each rank whole parameters, and all ranks to
            `mesh=`. Tensor parallelism is not planned. Default: "fsdp".

    Returns:
        The costs; `print` shows them as a table.

    Raises:
        StructPrecondError: If the mesh does not fit the world, if `build` returns no model, or if
            `optimizer` returns no optimizer of this library or ignores `mesh`.

    Example:
        >>> from structprecond import SOAP
        >>> def build():
        ...     return nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
        >>> print(plan(build, SOAP, world=4))
        per rank                        largest   ideal     largest / ideal
        -------------------------------------------------------------------
        state                           12.0 MiB  12.0 MiB  1.00
        operations of a step            3.23e+09  3.23e+09  1.00
        operations of a refresh         5.37e+09  5.37e+09  1.00
        operations of the slowest step  8.6e+09   8.6e+09   1.00
        sent to owners                  3.0 MiB   3.0 MiB   1.00
        received by owners              3.0 MiB   3.0 MiB   1.00
        sent by owners                  1.5 MiB   1.5 MiB   1.00
        received from owners            1.5 MiB   1.5 MiB   1.00
        -------------------------------------------------------------------
        shard=4: 4 ranks own 8 units
        0 ranks own nothing, 3 collectives a step
        state 48.0 MiB in all, parameters 8.0 MiB
        largest units: 0.weight (512x512, 6.0 MiB), 1.weight (512x512, 6.0 MiB), ...
    """
    spec = MeshSpec.parse(mesh, world)
    with pretend(world):
        with torch.device("meta"):
            model = build()
        if not isinstance(model, nn.Module):
            raise StructPrecondError(
                f"build returned {model!r}, expected the model, an nn.Module. Pass what makes the "
                "optimizer as a second argument."
            )
        place(model, spec)
        made = optimizer(model, mesh=None if SHARD in spec.names else dist.group.WORLD)
        if not isinstance(made, StructuredOptimizer):
            raise StructPrecondError(
                f"optimizer returned {made!r}, expected an optimizer of this library, such as "
                "SOAP(model)."
            )
        team = made.team
        if not isinstance(team, Owners) or not team.exchanges:
            raise StructPrecondError(
                "The optimizer has no rows with owners. Let `optimizer` pass the model and mesh= "
                "on to it, and let some parameters require gradients."
            )
        return _forecast(made, team, spec)


@dataclass(frozen=True)
class _Part:
    """What has one owner, and what it costs.

    Args:
        item: The unit or row.
        owner: Its owner.
        step: The operations of a step without refreshes.
        refreshes: The operations of refreshes, by interval and turn in the interval.
    """

    item: Item
    owner: int
    step: int
    refreshes: Counter[tuple[int, int]]


def _forecast(optimizer: StructuredOptimizer, team: Owners, spec: MeshSpec) -> Forecast:
    schedule, stacks = (
        RefreshSchedule(optimizer.refresh == "staggered"),
        team.stacks(optimizer.buckets),
    )
    intervals = schedule.intervals(stacks, 0)
    schedule.stagger(stacks, intervals)
    parts = [
        part
        for exchange, every in zip(team.exchanges, intervals, strict=True)
        for part in _parts(exchange, every, optimizer.rounding)
    ]
    own: list[list[_Part]] = [[] for _ in range(team.ranks.size)]
    for part in parts:
        own[part.owner].append(part)
    crossing = [t.crosses for e in team.exchanges for t in (e.inward, e.outward)]
    # ranks decide about the inputs, and about the updates if these may fail
    may_fail = optimizer.nonfinite == "raise" or any(e.runs_other_code for e in team.exchanges)
    units = _units(parts)
    return Forecast(
        mesh=str(spec),
        world=spec.world,
        ranks=tuple(_rank(rank, some, team.exchanges) for rank, some in enumerate(own)),
        units=units,
        parameter_bytes=sum(p.nbytes for group in optimizer.param_groups for p in group["params"]),
        collectives=sum(crossing) + 1 + may_fail,
        advice=advise([part.item for part in parts], spec),
    )


def _parts(exchange: Exchange, every: int | bool, rounding: Rounding) -> Iterator[_Part]:
    """Yield what has owners in an exchange."""
    all_rows, first = exchange.all_rows, exchange.shares[0].routed
    key, strategy = all_rows.key, first.route.strategy
    step, refresh = step_operations(strategy, key), refresh_operations(strategy, key)
    row_bytes = bytes_of_row(first, key, rounding)
    offsets = all_rows.counters.phase_offset.clamp(min=0).tolist()  # 0 unless staggered
    for share, span in zip(exchange.shares, all_rows.spans, strict=True):
        items = items_of(share.routed, key, row_bytes)
        for item, owner in zip(items, share.owners, strict=True):
            rows = offsets[span] if item.row is None else [offsets[span.start + item.row]]
            refreshes = Counter[tuple[int, int]]()
            for turn in rows:
                refreshes[every, turn] += refresh
            yield _Part(item, owner, len(rows) * step, refreshes)


def _rank(rank: int, parts: Sequence[_Part], exchanges: Sequence[Exchange]) -> RankCost:
    """Return the costs of a rank."""
    step, refreshes = sum(part.step for part in parts), Counter[tuple[int, int]]()
    slowest: dict[int, int] = {}
    for part in parts:
        refreshes.update(part.refreshes)
    for (every, _), operations in refreshes.items():
        slowest[every] = max(slowest.get(every, 0), operations)
    return RankCost(
        owned=len(parts),
        state_bytes=sum(part.item.state_bytes for part in parts),
        step_operations=step,
        refresh_operations=sum(refreshes.values()),
        slowest_operations=step + sum(slowest.values()),
        collect_sent=sum(e.inward.sent[rank] * e.entry_bytes for e in exchanges),
        collect_received=sum(e.inward.received[rank] * e.entry_bytes for e in exchanges),
        spread_sent=sum(e.outward.sent[rank] * e.entry_bytes for e in exchanges),
        spread_received=sum(e.outward.received[rank] * e.entry_bytes for e in exchanges),
    )


def _units(parts: Sequence[_Part]) -> tuple[UnitCost, ...]:
    """Return the units, the largest state first."""
    items: dict[Unit, list[Item]] = {}
    for part in parts:
        items.setdefault(part.item.unit, []).append(part.item)
    units = (
        UnitCost(unit.label, tuple(unit.shape), len(some), sum(item.state_bytes for item in some))
        for unit, some in items.items()
    )
    return tuple(sorted(units, key=lambda unit: (-unit.state_bytes, unit.name)))
