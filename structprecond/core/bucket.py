"""A stack of units that share everything but their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn

from structprecond.core.routing import view
from structprecond.core.state import Rows, State, rows_of, select
from structprecond.core.units import Unit
from structprecond.core.windows import Window, find_windows
from structprecond.strategies.base import StepContext, Strategy
from structprecond.structures.spec import Structure


@dataclass(frozen=True)
class BucketKey:
    """What units must have in common to be stacked."""

    rule: Any
    shape: Size
    structures: tuple[Structure, ...]
    dtypes: tuple[torch.dtype, ...]
    param_dtype: torch.dtype
    device: torch.device


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of stacks and states: float32, or float64 for float64 parameters."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Bucket:
    """A stack of units of one user param group, and the truth about their state.

    Args:
        group: The user's param group, read at every step.
        strategy: The strategy.
        prefix: What stands before the names of its hyperparameters in the param group.
        key: What the units have in common.
        units: The units; unit i owns the rows `spans[i]` of every stacked tensor.
        rules: For each unit, the role or pattern that sent it to the strategy.

    Attributes:
        state: The strategy's state, stacked along dimension 0.
        steps: The number of updates that each row has had, `(b,)`, int64 on the CPU.
        turns: How many steps earlier than the first one each row is refreshed, like `steps`.
        skipped: How often each row was skipped for a gradient that is not finite, or that would
            make its state or parameters so, like `steps`.
        failed: How often each row kept an old basis or root because a decomposition failed, alike.
        begun: Whether the strategy has seen the first gradient of each row, like `overdue`.
        overdue: Rows that missed a refresh because they were not live, `(b,)`, bool on the CPU.
    """

    def __init__(
        self,
        group: dict[str, Any],
        strategy: Strategy[Any],
        prefix: str,
        key: BucketKey,
        units: Sequence[Unit],
        rules: Sequence[str],
    ) -> None:
        self.group, self.strategy, self.prefix, self.key = group, strategy, prefix, key
        self.units, self.rules = list(units), list(rules)
        self.params: list[nn.Parameter] = [p for unit in units for p in unit.params]
        self.spans: list[slice] = []
        self.windows: list[Window] | None = []
        row_numel = key.shape.numel()
        start = 0
        for unit in units:
            self.spans.append(slice(start, start + unit.rows))
            windows = find_windows(unit)
            if windows is None:
                self.windows = None
            elif self.windows is not None:
                shift = start * row_numel
                self.windows += [replace(w, offset=w.offset + shift) for w in windows]
            start += unit.rows
        self.rows = start
        self.device = key.device
        self.state: State = strategy.init(self._empty(), key.structures, key.dtypes)
        self.steps = torch.zeros(start, dtype=torch.int64, device="cpu")
        self.turns = torch.zeros(start, dtype=torch.int64, device="cpu")
        self.skipped = torch.zeros(start, dtype=torch.int64, device="cpu")
        self.failed = torch.zeros(start, dtype=torch.int64, device="cpu")
        self.begun = torch.zeros(start, dtype=torch.bool, device="cpu")
        self.overdue = torch.zeros(start, dtype=torch.bool, device="cpu")

    @property
    def shape(self) -> Size:
        """The shape `(b, *dims)` of the stack."""
        return Size([self.rows, *self.key.shape])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stack."""
        return compute_dtype(self.key.param_dtype)

    @property
    def hyperparameters(self) -> Mapping[str, Any]:
        """The strategy's hyperparameters as the param group has them now, under their own names."""
        hp = view(self.group, self.strategy, self.prefix)
        if isinstance(hp["lr"], Tensor):
            # a tensor stays on its device: reading it would stall an accelerator
            return {**hp, "lr": hp["lr"].to(self.device).reshape(())}
        return hp

    @property
    def interval(self) -> Any:
        """The interval of refreshes that the param group has now; False if there are none."""
        name = self.strategy.refresh_interval
        return False if name is None else self.group[f"{self.prefix}{name}"]

    def _empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)

    def named_tensors(self) -> dict[str, Tensor]:
        """Return all state by name, stacked, the counters included."""
        counters = {"step": self.steps, "skipped": self.skipped, "failed": self.failed}
        flags = {"begun": self.begun, "overdue": self.overdue}
        return counters | flags | self.state.named_tensors()

    def unit_tensors(self, unit: int) -> dict[str, Tensor]:
        """Return views of one unit's rows by name, without the row dimension if it has one row."""
        span = self.spans[unit]
        rows = span if self.units[unit].rule.stacked else span.start
        return {name: tensor[rows] for name, tensor in self.named_tensors().items()}

    def refresh_cost(self) -> int:
        """Return the operations that refreshing one row takes, up to a constant factor."""
        axes = zip(self.key.structures, self.key.shape, strict=True)
        return sum(s.refresh_cost(dim) for s, dim in axes if s is not None)

    def move(self, device: torch.device) -> None:
        """Move the state to another device; all views of it become stale."""
        self.state = self.state.map(lambda t: t.to(device))
        self.device = device

    # --- one step --------------------------------------------------------------------------------

    def step(
        self,
        live: Sequence[bool],
        scratch: Tensor,
        every: int | bool,
        global_step: int,
        batch_size: int | None,
        maximize: bool,
    ) -> None:
        """Update the live units' parameters and state.

        Args:
            live: Whether each unit takes part.
            scratch: A contiguous tensor of the stack's shape, to be overwritten.
            every: The steps between two refreshes of a row, or whether all are refreshed now.
            global_step: The number of steps that the optimizer has made before.
            batch_size: The number of samples behind the gradients.
            maximize: Whether to ascend.
        """
        mask = torch.tensor(
            [on for on, unit in zip(live, self.units, strict=True) for _ in range(unit.rows)],
            device="cpu",
        )
        due = self._due(mask, every)
        if not mask.any():
            return
        grads = [p.grad for p in self._live_params(live) if p.grad is not None]
        self._gather(grads, live, scratch)
        if maximize:
            scratch.neg_()
        hp = self.hyperparameters

        def context(rows: Rows, due: Rows | None) -> StepContext:
            steps = self.steps[rows]
            failed = torch.zeros_like(steps, dtype=torch.bool)
            params = partial(self._stacked_params, rows)
            return StepContext(steps, due, failed, global_step, batch_size, params)

        mask &= ~self._begin(mask, scratch, hp, context)
        rows = select(mask)
        if rows is None:
            return
        ctx = context(rows, select(due[rows]))
        with rows_of(self.state, rows) as state:
            direction = self.strategy.update(state, scratch[rows], hp, ctx)
        self.steps[rows] += 1
        self._count_failures(rows, ctx)
        self.overdue[rows] = False
        moved = [bool(mask[span.start]) for span in self.spans]
        params: list[Tensor] = list(self._live_params(moved))
        self._apply(params, self._scatter(direction, rows, moved), hp)
        constraint = self.strategy.constraint()
        if constraint is not None:
            values = constraint(self._stacked_params(rows))
            torch._foreach_copy_(params, self._scatter(values, rows, moved))

    def _begin(
        self,
        live: Tensor,
        grad: Tensor,
        hp: Mapping[str, Any],
        context: Callable[[Rows, Rows | None], StepContext],
    ) -> Tensor:
        """Show the strategy the first gradients of rows; return which rows sit this step out."""
        fresh = live & ~self.begun
        rows = select(fresh)
        if rows is not None:
            ctx = context(rows, None)
            with rows_of(self.state, rows) as state:
                self.strategy.begin(state, grad[rows], hp, ctx)
            self._count_failures(rows, ctx)
            self.begun |= fresh
            self.overdue &= ~fresh  # what was made from this gradient needs no refresh
        skipped = self.strategy.skips_first(self.key.structures)
        return fresh if skipped else torch.zeros_like(fresh)

    def _count_failures(self, rows: Rows, ctx: StepContext) -> None:
        if ctx.failed.any():
            self.failed[rows] += ctx.failed

    def _per_param(self, live: Sequence[bool]) -> list[bool]:
        return [on for on, unit in zip(live, self.units, strict=True) for _ in unit.params]

    def _live_params(self, live: Sequence[bool]) -> list[nn.Parameter]:
        return [p for p, on in zip(self.params, self._per_param(live), strict=True) if on]

    def _due(self, live: Tensor, every: int | bool) -> Tensor:
        """Return the mask of live rows to refresh; rows that are not live stay overdue."""
        if isinstance(every, bool):
            self.overdue |= every
            return self.overdue & live
        return self.strategy.due(self.steps, self.turns, every) & live

    def _views(self, stack: Tensor, live: Sequence[bool]) -> list[Tensor]:
        assert self.windows is not None
        return [
            window.of(stack)
            for window, on in zip(self.windows, self._per_param(live), strict=True)
            if on
        ]

    def _gather(self, tensors: Sequence[Tensor], live: Sequence[bool], into: Tensor) -> None:
        """Copy one tensor per live parameter into the rows of a stack."""
        if self.windows is not None:
            torch._foreach_copy_(self._views(into, live), list(tensors))
            return
        rest = iter(tensors)
        for unit, span, on in zip(self.units, self.spans, live, strict=True):
            if on:
                members = [next(rest) for _ in unit.params]
                into[span].view(self._grouped_shape(unit)).copy_(unit.rule.group(members))

    def _scatter(self, stack: Tensor, rows: Rows, live: Sequence[bool]) -> list[Tensor]:
        """Return one tensor per live parameter, out of the given rows of a stack."""
        if isinstance(rows, Tensor):
            whole = stack.new_zeros(self.shape)
            stack = whole.index_copy_(0, rows.to(self.device), stack)
        stack = stack.contiguous()
        if self.windows is not None:
            return self._views(stack, live)
        tensors = []
        for unit, span, on in zip(self.units, self.spans, live, strict=True):
            if on:
                grouped = stack[span].view(self._grouped_shape(unit))
                tensors += unit.rule.ungroup(grouped, unit.shapes)
        return tensors

    def _grouped_shape(self, unit: Unit) -> tuple[int, ...]:
        return (unit.rows, *unit.shape) if unit.rule.stacked else tuple(unit.shape)

    def _stacked_params(self, rows: Rows) -> Tensor:
        stack = self._empty()
        self._gather(self.params, [True] * len(self.units), stack)
        return stack[rows]

    def _apply(self, params: list[Tensor], directions: list[Tensor], hp: Mapping[str, Any]) -> None:
        """Subtract lr times the directions from the parameters, and decay them."""
        lr: float | Tensor = hp["lr"]
        rate = 1.0
        if isinstance(lr, Tensor):
            directions = list(torch._foreach_mul(directions, lr))
        else:
            rate = lr
        decays = self.strategy.decay != "inside" and hp["weight_decay"] != 0
        if decays and self.strategy.decay == "before":
            torch._foreach_mul_(params, self.strategy.decay_factor(hp))
        torch._foreach_add_(params, directions, alpha=-rate)
        if decays and self.strategy.decay == "after":
            torch._foreach_mul_(params, self.strategy.decay_factor(hp))
