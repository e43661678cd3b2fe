"""Schedules refreshes, and keeps rows whose decomposition fails as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from typing import Any

import torch

from structprecond.core.bucket import Bucket
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
        self._staggered_for: list[tuple[int, int | bool]] = []

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
            key = [(id(bucket), every) for bucket, every in zip(buckets, answers, strict=True)]
            if key != self._staggered_for:
                stagger(buckets, answers)
                self._staggered_for = key
        return answers


def stagger(buckets: Sequence[Bucket], intervals: Sequence[int | bool]) -> None:
    """Stagger the refreshes of all rows over their interval, the costliest rows first.

    Args:
        buckets: The buckets; sets their `counters.phase_offset`.
        intervals: The refresh interval of each bucket; a bool if it has none.
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
        # (load, step); no more steps than rows are needed
        loads = [(0, step) for step in range(min(every, len(rows_of_all)))]
        for cost, _, bucket, row in rows_of_all:
            load, step = heappop(loads)
            bucket.counters.phase_offset[row] = step
            heappush(loads, (load - cost, step))
