"""Which rows are refreshed in which step, and what happens to those that cannot be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import torch

from structprecond.core.bucket import Bucket
from structprecond.core.state import Rows, rows_of, select
from structprecond.core.strategy import StepContext
from structprecond.errors import DecompositionError


def refresh_rows(
    refresh: Callable[[Any, Rows], None], state: Any, rows: Rows, ctx: StepContext
) -> None:
    """Refresh rows of a state; those with a matrix that cannot be decomposed stay as they are.

    Args:
        refresh: Is given the state of some rows, and which rows these are, and refreshes them all.
            Decomposes everything before it writes anything, so that it fails without a trace.
        state: The state of all rows.
        rows: The rows to refresh.
        ctx: The context of the step; its `failed` gets the rows that failed.
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


class RefreshSchedule:
    """The refresh intervals of all buckets, step by step.

    Args:
        staggered: Whether rows with the same interval are refreshed in different steps, which
            spreads the cost.
    """

    def __init__(self, staggered: bool) -> None:
        self.staggered = staggered
        self._staggered_for: list[tuple[int, int | bool]] = []

    def intervals(self, buckets: Sequence[Bucket], global_step: int) -> list[int | bool]:
        """Return the interval of every bucket, or whether all of its rows are refreshed now.

        A callable interval is asked once about a step, however many buckets share it.
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
            key = [(id(bucket), every) for bucket, every in zip(buckets, answers, strict=True)]
            if key != self._staggered_for:
                stagger(buckets, answers)
                self._staggered_for = key
        return answers


def stagger(buckets: Sequence[Bucket], intervals: Sequence[int | bool]) -> None:
    """Spread the refreshes of all rows over the steps of their interval, the costliest first.

    Args:
        buckets: The buckets, whose `counters.phase_offset` is set.
        intervals: The refresh interval of each bucket; a bool for one that has none.
    """
    waiting: dict[int, list[tuple[int, str, Bucket, int]]] = {}
    for bucket, every in zip(buckets, intervals, strict=True):
        if not isinstance(every, bool):
            # by name, so that offsets do not depend on the order of registration
            rows = (
                (-bucket.refresh_cost(), unit.label, bucket, row)
                for unit, span in zip(bucket.units, bucket.spans, strict=True)
                for row in range(span.start, span.stop)
            )
            waiting.setdefault(every, []).extend(rows)
    for every, rows_of_all in waiting.items():
        rows_of_all.sort(key=lambda entry: entry[:2])
        # the load of each step and the step; more steps than rows are not needed
        loads = [(0, step) for step in range(min(every, len(rows_of_all)))]
        for cost, _, bucket, row in rows_of_all:
            load, step = heappop(loads)
            bucket.counters.phase_offset[row] = step
            heappush(loads, (load - cost, step))
