"""One plan per step and bucket: which units take part, and how they are updated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from structprecond.core.bucket import Bucket
from structprecond.core.costs import naming_units
from structprecond.core.move import prepare_move
from structprecond.core.results import usable
from structprecond.core.state import Rows, on_device_of, rows_of, select
from structprecond.core.strategy import StepContext


@dataclass(frozen=True)
class Recorded:
    """The inputs of a captured step, on the device.

    Args:
        t: The number of the update of each row, `(b,)`, float64.
        lr: The learning rate, 0-d.
        seeds: The seed of each row, `(b,)`, int64.
    """

    t: Tensor
    lr: Tensor
    seeds: Tensor


@dataclass
class Plan:
    """The plan of one step for one bucket.

    Args:
        bucket: The bucket.
        live: Whether each of its units takes part.
        every: The refresh interval in steps, or whether all rows are refreshed now.
        global_step: The number of steps that the optimizer has made before.
        batch_size: The number of samples behind the gradients, None if unknown.
        maximize: Whether to ascend.
        recorded: The inputs of a captured step, which leaves the rows' counters unchanged.
    """

    bucket: Bucket
    live: list[bool]
    every: int | bool
    global_step: int
    batch_size: int | None
    maximize: bool
    recorded: Recorded | None = None
    _grads: Tensor | None = field(default=None, repr=False)
    _failed: list[str] = field(default_factory=list, init=False, repr=False)
    _skipped: list[slice] = field(default_factory=list, init=False, repr=False)
    norms: list[float] | None = field(default=None, init=False, repr=False)
    """The norm of each row's gradient; None if not known yet."""

    # --- plan and exclude ------------------------------------------------------------------------

    @property
    def grads(self) -> Tensor:
        """The stacked gradients of the units that are live at the first read."""
        if self._grads is None:
            with naming_units("copying gradients", self.bucket.units, self.bucket.key):
                self._grads = self.bucket.gather_grads(self.live)
        return self._grads

    def exclude(self, units: Sequence[bool]) -> None:
        """Exclude some live units from the step, which counts that once it is made."""
        for i, excluded in enumerate(units):
            if excluded and self.live[i]:
                self.live[i] = False
                self._skipped.append(self.bucket.spans[i])

    def trial(self, units: Sequence[bool]) -> Plan:
        """Return the plan of the same step for some units of a copy of the bucket."""
        return replace(self, bucket=self.bucket.twin(), live=list(units), _grads=self.grads.clone())

    def due(self) -> Tensor:
        """Return the mask of live rows to refresh; rows that are not live stay overdue."""
        counters, live = self.bucket.counters, self.bucket.layout.live_rows(self.live)
        if isinstance(self.every, bool):
            if self.every:
                counters.overdue.fill_(True)
            return counters.overdue & live
        offsets = counters.phase_offset.clamp(min=0)  # some may be unassigned
        return self.bucket.strategy.due(counters.step, offsets, self.every) & live

    # --- apply -----------------------------------------------------------------------------------

    def apply(self) -> list[str]:
        """Update the live units' parameters and state; return the units with failed refreshes."""
        return self.prepare()()

    def prepare(self) -> Callable[[], list[str]]:
        """Update the state; return a function that writes the parameters.

        That function returns the units with failed refreshes, and calls no code of the strategy.
        Frees the gradients, so that the next bucket can use their memory.
        """
        with naming_units("making a step", self.bucket.units, self.bucket.key):
            return self._prepare()

    def _prepare(self) -> Callable[[], list[str]]:
        bucket = self.bucket
        for span in self._skipped:
            bucket.counters.skipped[span] += 1
        if not any(self.live):
            self.due()  # notes who becomes overdue
            self._grads = None
            return list
        due, live = self.due(), bucket.layout.live_rows(self.live)
        grads, self._grads = self.grads, None
        if self.maximize:
            grads.neg_()
        hp = bucket.hyperparameters
        if self.recorded is not None:
            hp["lr"] = self.recorded.lr
        if not bool(bucket.counters.initialized.all()):
            live &= ~self._wait(live, grads)
            live &= ~self._begin(live, grads, hp)
        rows, write = select(live), None
        if rows is not None:
            ctx = self._context(rows, select(due[rows]))
            with rows_of(bucket.state, rows) as state:
                grad = grads[rows]
                # a strategy may overwrite its gradients
                uses_grad = any(policy.uses_grad for policy in bucket.key.policies)
                given = grad.clone() if uses_grad else None
                name = f"{type(bucket.strategy).__name__}.update"
                direction = usable(bucket.strategy.update(state, grad, hp, ctx), grad, name)
            if ctx.due is not None:
                bucket.refresh_decomposes = ctx.decomposed
            self._note_failures(rows, ctx)
            if self.recorded is None:
                self.count(live)
            units = bucket.layout.live_units(live)
            write = prepare_move(bucket, direction, given, rows, units, hp, ctx)

        def finish() -> list[str]:
            if write is not None:
                write()
            return list(dict.fromkeys(self._failed))

        return finish

    def count(self, live: Tensor) -> None:
        """Count an update of the rows in a mask."""
        self.bucket.counters.step += live
        self.bucket.counters.overdue &= ~live

    def _note_failures(self, rows: Rows, ctx: StepContext) -> None:
        """Count the refreshes of rows that failed, and note their units."""
        if not bool(ctx.failed.any()):
            return
        counters = self.bucket.counters
        before = counters.failed.clone()
        counters.failed[rows] += ctx.failed
        failed = counters.failed != before
        spans = zip(self.bucket.units, self.bucket.spans, strict=True)
        self._failed += [unit.label for unit, span in spans if failed[span].any()]

    def _context(self, rows: Rows, due: Rows | None) -> StepContext:
        bucket, counters = self.bucket, self.bucket.counters
        steps = counters.step[rows]
        first, last = map(int, steps.aminmax())
        t: int | Tensor = first + 1
        seeds = counters.seed
        if self.recorded is not None:
            t, seeds = self.recorded.t[on_device_of(rows, self.recorded.t)], self.recorded.seeds
        elif first != last:
            t = (steps + 1).double()
        return StepContext(
            t,
            seeds=seeds[on_device_of(rows, seeds)],
            due=due,
            failed=torch.zeros_like(steps, dtype=torch.bool),
            global_step=self.global_step,
            batch_size=self.batch_size,
            params=partial(bucket.gather_params, rows),
            ndim=len(bucket.shape),
            dtype=bucket.dtype,
            device=bucket.device,
        )

    def _wait(self, live: Tensor, grads: Tensor) -> Tensor:
        """Return which live rows wait for a gradient that can initialize them."""
        fresh = live & ~self.bucket.counters.initialized
        waiting = torch.zeros_like(fresh)
        rows = select(fresh)
        if rows is not None:
            # the whole state, not a copy of these rows: some may wait for many steps
            able = self.bucket.strategy.can_begin(self.bucket.state, grads[rows])
            if able is not None:
                waiting[rows] = ~able.to(waiting.device)
        return waiting

    def _begin(self, live: Tensor, grads: Tensor, hp: Mapping[str, Any]) -> Tensor:
        """Initialize rows from their first gradients; return which rows sit this step out."""
        counters = self.bucket.counters
        fresh = live & ~counters.initialized
        rows = select(fresh)
        if rows is None:
            return fresh
        ctx = self._context(rows, None)
        with rows_of(self.bucket.state, rows) as state:
            waits = self.bucket.strategy.begin(state, grads[rows], hp, ctx)
        self._note_failures(rows, ctx)
        counters.initialized |= fresh
        counters.overdue &= ~fresh  # just initialized, so not overdue
        return fresh if waits else torch.zeros_like(fresh)
