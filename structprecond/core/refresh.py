"""Schedules refreshes, and keeps rows whose decomposition fails as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

import torch

from structprecond.core.bucket import Bucket
from structprecond.core.counters import UNASSIGNED
from structprecond.core.naming import enumerate_names
from structprecond.core.state import Rows, rows_of, select
from structprecond.core.strategy import StepContext
from structprecond.errors import DecompositionError


def refresh_rows(
    refresh: Callable[[Any, Rows], None], state: Any, rows: Rows, ctx: StepContext
) -> None:
    """Refresh rows of a state; rows whose decomposition fails stay as they are.

    Args:
        refresh: Refreshes some rows, given their state and their indices. It must decompose all
            matrices before it writes any, so that a failure changes nothing.
        state: The state of all rows.
        rows: The rows to refresh.
        ctx: The context of the step; `ctx.failed` receives the failed rows.
    """
    ctx.decomposed = True
    remaining = torch.zeros_like(ctx.failed)
    remaining[rows] = True
    while (chosen := select(remaining)) is not None:
        try:
            with rows_of(state, chosen) as part:
                refresh(part, chosen)
            return
        except DecompositionError as error:
            failed = remaining.nonzero().squeeze(1)[error.rows]
            remaining[failed] = False
            ctx.failed[failed] = True


def warning_of_failures(units: Sequence[str], step: int) -> str | None:
    """Return the warning about units whose refresh failed in a step; None if there are none."""
    if not units:
        return None
    return (
        f"Matrices of {enumerate_names(units)} could not be decomposed at step {step}. They keep "
        "their last basis or inverse root until the next refresh; optimizer.failed counts further "
        "failures without a warning."
    )


class RefreshSchedule:
    """Returns the refresh intervals of all buckets for each step.

    Args:
        staggered: Whether to spread rows with the same interval over its steps.
    """

    def __init__(self, staggered: bool) -> None:
        self.staggered = staggered

    def intervals(self, buckets: Sequence[Bucket], global_step: int) -> list[int | bool]:
        """Return each bucket's interval or, if it is a callable, whether to refresh all rows now.

        A callable that several buckets share is called once per step.
        """
        asked: dict[int, bool] = {}
        answers: list[int | bool] = []
        for bucket in buckets:
            every = bucket.interval
            if callable(every):
                if id(every) not in asked:
                    asked[id(every)] = bool(every(global_step))
                every = asked[id(every)]
            answers.append(every)
        if self.staggered:
            moved = [
                bucket
                for bucket, every in zip(buckets, answers, strict=True)
                if bucket.staggered_over != every and not isinstance(every, bool)
            ]
            if moved:
                stagger(buckets, answers, moved)
        return answers

    def adopt(self, buckets: Sequence[Bucket]) -> None:
        """Keep the phase offsets from a checkpoint, whatever the interval was before."""
        for bucket in buckets:
            bucket.staggered_over = None


def stagger(
    buckets: Sequence[Bucket], intervals: Sequence[int | bool], moved: Sequence[Bucket]
) -> None:
    """Stagger the refreshes of rows over their interval, the costliest rows first.

    Rows that have a turn keep it. The others get the turns with the least work.

    Args:
        buckets: The buckets; sets their `counters.phase_offset`.
        intervals: The refresh interval of each bucket; a bool if it has none.
        moved: The buckets that were not staggered over their interval yet. Where the interval is
            not a new one but the bucket is, such as after a checkpoint was loaded, only rows
            without a phase offset get one.
    """
    loads: dict[int, Counter[int]] = {}
    waiting: dict[int, list[tuple[int, str, Bucket, int]]] = {}
    rows = Counter[int]()
    for bucket, every in zip(buckets, intervals, strict=True):
        if isinstance(every, bool):
            continue
        offsets, cost = bucket.counters.phase_offset, bucket.refresh_cost()
        if any(bucket is other for other in moved):
            if bucket.staggered_over is not None:
                offsets.fill_(UNASSIGNED)
            bucket.staggered_over = every
        rows[every] += bucket.rows
        # rows are at different updates, so offsets alone do not tell their turns
        assigned = (offsets >= 0).tolist()
        turns = ((offsets + bucket.counters.step) % every).tolist()
        taken, open_rows = loads.setdefault(every, Counter()), waiting.setdefault(every, [])
        # by name, so that offsets do not depend on the order of registration
        for unit, span in zip(bucket.units, bucket.spans, strict=True):
            for row in range(span.start, span.stop):
                if assigned[row]:
                    taken[turns[row]] += cost
                else:
                    open_rows.append((-cost, unit.label, bucket, row))
    for every, open_rows in waiting.items():
        open_rows.sort(key=lambda entry: entry[:2])
        # (load, turn); no more turns than rows are needed
        heap = [(loads[every][turn], turn) for turn in range(min(every, rows[every]))]
        heapify(heap)
        for cost, _, bucket, row in open_rows:
            load, turn = heappop(heap)
            bucket.counters.phase_offset[row] = (turn - int(bucket.counters.step[row])) % every
            heappush(heap, (load - cost, turn))
