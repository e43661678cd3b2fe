"""Schedules refreshes, and keeps rows whose decomposition fails as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from typing import Any, TypeAlias

import torch

from structprecond.core.all_rows import AllRows
from structprecond.core.bucket import Bucket
from structprecond.core.counters import UNASSIGNED
from structprecond.core.naming import enumerate_names
from structprecond.core.state import Rows, rows_of, select
from structprecond.core.strategy import StepContext
from structprecond.errors import DecompositionError

Stack: TypeAlias = Bucket | AllRows
"""Rows over which refreshes are staggered."""


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

    def intervals(self, stacks: Sequence[Stack], global_step: int) -> list[int | bool]:
        """Return each stack's interval or, if it is a callable, whether to refresh all rows now.

        A callable that several stacks share is called once per step.
        """
        asked: dict[int, bool] = {}
        answers: list[int | bool] = []
        for stack in stacks:
            every = stack.interval
            if callable(every):
                if id(every) not in asked:
                    asked[id(every)] = bool(every(global_step))
                every = asked[id(every)]
            answers.append(every)
        return answers

    def moved(self, stacks: Sequence[Stack], intervals: Sequence[int | bool]) -> list[Stack]:
        """Return the stacks that are not staggered over their interval yet, but should be."""
        return [
            stack
            for stack, every in zip(stacks, intervals, strict=True)
            if self.staggered and stack.staggered_over != every and not isinstance(every, bool)
        ]

    def stagger(self, stacks: Sequence[Stack], intervals: Sequence[int | bool]) -> None:
        """Assign phase offsets where rows are not staggered over their interval yet."""
        moved = self.moved(stacks, intervals)
        if moved:
            assign_offsets(stacks, intervals, moved)

    def adopt(self, stacks: Sequence[Stack]) -> None:
        """Keep the phase offsets from a checkpoint, whatever the interval was before."""
        for stack in stacks:
            stack.staggered_over = None


def assign_offsets(
    stacks: Sequence[Stack], intervals: Sequence[int | bool], moved: Sequence[Stack]
) -> None:
    """Stagger the refreshes of rows over their interval, the costliest rows first.

    Rows that have a turn keep it. The others get the turns with the least work.

    Args:
        stacks: The stacks; sets their `counters.phase_offset`.
        intervals: The refresh interval of each stack; a bool if it has none.
        moved: The stacks that were not staggered over their interval yet. Where the interval is
            not a new one but the stack is, such as after a checkpoint was loaded, only rows
            without a phase offset get one.
    """
    loads: dict[int, Counter[int]] = {}
    waiting: dict[int, list[tuple[int, str, Stack, int]]] = {}
    rows = Counter[int]()
    for stack, every in zip(stacks, intervals, strict=True):
        if isinstance(every, bool):
            continue
        offsets, cost = stack.counters.phase_offset, stack.key.refresh_cost()
        if any(stack is other for other in moved):
            if stack.staggered_over is not None:
                offsets.fill_(UNASSIGNED)
            stack.staggered_over = every
        rows[every] += stack.rows
        # rows are at different updates, so offsets alone do not tell their turns
        assigned = (offsets >= 0).tolist()
        turns = ((offsets + stack.counters.step) % every).tolist()
        taken, open_rows = loads.setdefault(every, Counter()), waiting.setdefault(every, [])
        # by name, so that offsets do not depend on the order of registration
        for unit, span in zip(stack.units, stack.spans, strict=True):
            for row in range(span.start, span.stop):
                if assigned[row]:
                    taken[turns[row]] += cost
                else:
                    open_rows.append((-cost, unit.label, stack, row))
    for every, open_rows in waiting.items():
        open_rows.sort(key=lambda entry: entry[:2])
        # (load, turn); no more turns than rows are needed
        heap = [(loads[every][turn], turn) for turn in range(min(every, rows[every]))]
        heapify(heap)
        for cost, _, stack, row in open_rows:
            load, turn = heappop(heap)
            stack.counters.phase_offset[row] = (turn - int(stack.counters.step[row])) % every
            heappush(heap, (load - cost, turn))
