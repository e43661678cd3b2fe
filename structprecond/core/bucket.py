"""A stack of units that share everything but their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn

from structprecond.core.layout import Layout
from structprecond.core.rounding import Rounding, is_low_precision, round_stochastically
from structprecond.core.routing import view
from structprecond.core.state import Rows, State, on_device_of, rows_of, select
from structprecond.core.units import Unit
from structprecond.errors import StructPrecondError
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


@dataclass(frozen=True)
class Inputs:
    """What a recorded step reads on the device, because it differs from replay to replay.

    Args:
        steps: The number of updates that each row has had, `(b,)`, float64.
        lr: The learning rate, of no dimension.
    """

    steps: Tensor
    lr: Tensor


class Bucket:
    """A stack of units of one user param group, and the truth about their state.

    Args:
        group: The user's param group, read at every step.
        strategy: The strategy.
        prefix: What stands before the names of its hyperparameters in the param group.
        key: What the units have in common.
        units: The units; unit i owns the rows `spans[i]` of every stacked tensor.
        rules: For each unit, the role or pattern that sent it to the strategy.
        rounding: How parameters of low precision are rounded.

    Attributes:
        layout: Where the units' parameters stand in the stack.
        state: The strategy's state, stacked along dimension 0.
        lost: What rounding took from the parameters `(b, *dims)`, in their dtype; None unless they
            are of low precision and rounding is "kahan".
        steps: The number of updates that each row has had, `(b,)`, int64 on the CPU.
        turns: How many steps earlier than the first one each row is refreshed, like `steps`.
        skipped: How often each row was skipped for a gradient that is not finite, or that would
            make its state or parameters so, like `steps`.
        failed: How often each row kept an old basis or root because a decomposition failed, alike.
        begun: Whether the strategy has seen the first gradient of each row, like `overdue`.
        overdue: Rows that missed a refresh because they were not live, `(b,)`, bool on the CPU.
        inputs: What stands for steps and learning rate while a step is recorded, else None.
    """

    def __init__(
        self,
        group: dict[str, Any],
        strategy: Strategy[Any],
        prefix: str,
        key: BucketKey,
        units: Sequence[Unit],
        rules: Sequence[str],
        rounding: Rounding,
    ) -> None:
        self.group, self.strategy, self.prefix, self.key = group, strategy, prefix, key
        self.layout, self.rules, self.rounding = Layout(units), list(rules), rounding
        self.rows = self.layout.rows
        self.device = key.device
        self.state: State = strategy.init(self._empty(), key.structures, key.dtypes)
        self._check_names()
        self.lost: Tensor | None = None
        if rounding == "kahan" and is_low_precision(key.param_dtype):
            self.lost = torch.zeros(self.shape, dtype=key.param_dtype, device=key.device)
        self.steps = torch.zeros(self.rows, dtype=torch.int64, device="cpu")
        self.turns = torch.zeros(self.rows, dtype=torch.int64, device="cpu")
        self.skipped = torch.zeros(self.rows, dtype=torch.int64, device="cpu")
        self.failed = torch.zeros(self.rows, dtype=torch.int64, device="cpu")
        self.begun = torch.zeros(self.rows, dtype=torch.bool, device="cpu")
        self.overdue = torch.zeros(self.rows, dtype=torch.bool, device="cpu")
        self.inputs: Inputs | None = None

    def _check_names(self) -> None:
        clash = {"step", "skipped", "failed", "begun", "overdue", "lost"}
        if shadowing := sorted(clash & set(self.state.named_tensors())):
            raise StructPrecondError(
                f"The state of {type(self.strategy).__name__} has fields called "
                f"{', '.join(shadowing)}, which are names of the core's own. Rename them."
            )

    @property
    def units(self) -> list[Unit]:
        """The units."""
        return self.layout.units

    @property
    def params(self) -> list[nn.Parameter]:
        """The parameters of all units."""
        return self.layout.params

    @property
    def spans(self) -> list[slice]:
        """The rows of each unit."""
        return self.layout.spans

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
        if self.inputs is not None:
            return {**hp, "lr": self.inputs.lr}
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
        lost = {} if self.lost is None else {"lost": self.lost}
        return counters | flags | lost | self.state.named_tensors()

    def unit_tensors(self) -> list[dict[str, Tensor]]:
        """Return views of each unit's rows by name, without the row dimension if it has one row."""
        stacked = self.named_tensors()
        rows = (
            span if unit.rule.stacked else span.start
            for unit, span in zip(self.units, self.spans, strict=True)
        )
        return [{name: tensor[own] for name, tensor in stacked.items()} for own in rows]

    def refresh_cost(self) -> int:
        """Return the operations that refreshing one row takes, up to a constant factor."""
        axes = zip(self.key.structures, self.key.shape, strict=True)
        return sum(s.refresh_cost(dim) for s, dim in axes if s is not None)

    def move(self, device: torch.device) -> None:
        """Move the state to another device; all views of it become stale."""
        self.state = self.state.map(lambda t: t.to(device))
        self.lost = None if self.lost is None else self.lost.to(device)
        self.device = device

    # --- one step --------------------------------------------------------------------------------

    def gather(self, live: Sequence[bool]) -> Tensor:
        """Return the gradients of the live units, stacked; the other rows are undefined.

        If no unit is live, the stack has no rows.
        """
        if not any(live):
            return torch.empty((0, *self.key.shape), dtype=self.dtype, device=self.device)
        stack = self._empty()
        grads = [p.grad for p in self.layout.live_params(live) if p.grad is not None]
        self.layout.gather(grads, live, stack)
        return stack

    def step(
        self,
        live: Sequence[bool],
        grad: Tensor,
        every: int | bool,
        global_step: int,
        batch_size: int | None,
        maximize: bool,
    ) -> None:
        """Update the live units' parameters and state.

        Args:
            live: Whether each unit takes part.
            grad: What `gather` returned, for these units or more; is overwritten.
            every: The steps between two refreshes of a row, or whether all are refreshed now.
            global_step: The number of steps that the optimizer has made before.
            batch_size: The number of samples behind the gradients.
            maximize: Whether to ascend.
        """
        mask = self.layout.live_rows(live)
        due = self.due(mask, every)
        if not mask.any():
            return
        if maximize:
            grad.neg_()
        hp = self.hyperparameters

        def context(rows: Rows, due: Rows | None) -> StepContext:
            steps = self.steps[rows]
            failed = torch.zeros_like(steps, dtype=torch.bool)
            if self.inputs is not None:
                steps = self.inputs.steps
            params = partial(self._stacked_params, rows)
            return StepContext(steps, due, failed, global_step, batch_size, params)

        mask &= ~self._begin(mask, grad, hp, context)
        rows = select(mask)
        if rows is None:
            return
        ctx = context(rows, select(due[rows]))
        with rows_of(self.state, rows) as state:
            direction = self.strategy.update(state, grad[rows], hp, ctx)
        if self.inputs is None:
            self.count(rows)
        self._count_failures(rows, ctx)
        moved = self.layout.live_units(mask)
        # the model may have been converted after construction
        if is_low_precision(self.params[0].dtype):
            self._apply_in_float32(direction, rows, moved, hp)
        else:
            self._apply(direction, rows, moved, hp)

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

    def count(self, rows: Rows) -> None:
        """Count an update of rows."""
        self.steps[rows] += 1
        self.overdue[rows] = False

    def _count_failures(self, rows: Rows, ctx: StepContext) -> None:
        if ctx.failed.any():
            self.failed[rows] += ctx.failed

    def due(self, live: Tensor, every: int | bool) -> Tensor:
        """Return the mask of live rows to refresh; rows that are not live stay overdue."""
        if isinstance(every, bool):
            self.overdue |= every
            return self.overdue & live
        return self.strategy.due(self.steps, self.turns, every) & live

    def _stacked_params(self, rows: Rows) -> Tensor:
        stack = self._empty()
        self.layout.gather(self.params, [True] * len(self.units), stack)
        return stack[rows]

    def _all_rows(self, stack: Tensor, rows: Rows) -> Tensor:
        """Return a contiguous stack of all rows, zero but for the given ones."""
        if isinstance(rows, Tensor):
            whole = stack.new_zeros(self.shape)
            return whole.index_copy_(0, rows.to(self.device), stack)
        return stack.contiguous()

    def _write(self, stack: Tensor, rows: Rows, live: Sequence[bool]) -> None:
        """Copy rows into the live parameters."""
        values = self.layout.scatter(self._all_rows(stack, rows), live)
        torch._foreach_copy_(list(self.layout.live_params(live)), values)

    def _apply(
        self, direction: Tensor, rows: Rows, live: Sequence[bool], hp: Mapping[str, Any]
    ) -> None:
        """Subtract lr times the directions from the parameters, and decay and constrain them."""
        params: list[Tensor] = list(self.layout.live_params(live))
        updates = self.layout.scatter(self._all_rows(direction, rows), live)
        rate = hp["lr"]
        if isinstance(rate, Tensor):
            updates, rate = list(torch._foreach_mul(updates, rate)), 1.0
        before, after = self._decay_factors(hp)
        _scale(params, before)
        torch._foreach_add_(params, updates, alpha=-rate)
        _scale(params, after)
        constraint = self.strategy.constraint()
        if constraint is not None:
            self._write(constraint(self._stacked_params(rows)), rows, live)

    def _apply_in_float32(
        self, direction: Tensor, rows: Rows, live: Sequence[bool], hp: Mapping[str, Any]
    ) -> None:
        """Do the same with parameters of low precision, which are rounded once at the end."""
        values = self._stacked_params(rows)
        if self.lost is not None:
            values += self.lost[on_device_of(rows, self.lost)]
        before, after = self._decay_factors(hp)
        values = values.mul_(before).sub_(direction * hp["lr"]).mul_(after)
        constraint = self.strategy.constraint()
        if constraint is not None:
            values = constraint(values)
        if self.rounding == "stochastic":
            rounded = round_stochastically(values, self.params[0].dtype)
        else:
            rounded = values.to(self.params[0].dtype)
        if self.lost is not None:
            values.sub_(rounded)
            self.lost[on_device_of(rows, self.lost)] = values.to(self.lost.dtype)
        self._write(rounded, rows, live)

    def _decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Return what the parameters are multiplied by before and after the update."""
        if self.strategy.decay == "inside" or hp["weight_decay"] == 0:
            return 1.0, 1.0
        factor = self.strategy.decay_factor(hp)
        return (factor, 1.0) if self.strategy.decay == "before" else (1.0, factor)


def _scale(tensors: list[Tensor], factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        torch._foreach_mul_(tensors, factor)
    elif factor != 1.0:
        # on the CPU a number is made a tensor for every single product, which takes as long as it
        on_cpu = tensors[0].device.type == "cpu"
        torch._foreach_mul_(tensors, tensors[0].new_tensor(factor) if on_cpu else factor)
