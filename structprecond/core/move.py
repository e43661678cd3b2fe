"""Moves parameters along directions: policies, decay, update, constraint and rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from structprecond.core.bucket import Bucket
from structprecond.core.policies import Move, apply_policies
from structprecond.core.results import usable
from structprecond.core.rounding import is_low_precision, round_stochastically, row_keys
from structprecond.core.state import Rows, on_device_of
from structprecond.core.strategy import StepContext


def prepare_move(
    bucket: Bucket,
    direction: Tensor,
    grad: Tensor | None,
    rows: Rows,
    live: Sequence[bool],
    hp: Mapping[str, Any],
    ctx: StepContext,
) -> Callable[[], None]:
    """Return a function that subtracts lr times the directions, decays and constrains.

    The strategy and the policies are called here, and not by that function: if they fail, no
    parameter has changed.

    Args:
        bucket: The bucket.
        direction: The directions of some rows.
        grad: The gradients of these rows; None unless a policy uses them.
        rows: These rows.
        live: Whether each unit takes part.
        hp: The strategy's hyperparameters.
        ctx: The context of the update.
    """
    move = Move(
        direction,
        partial(_values_before, bucket, rows),
        grad,
        *bucket.strategy.decay_factors(hp),
    )
    _apply_policies(bucket, move, rows)
    constraint = bucket.strategy.constraint()
    params: list[Tensor] = list(bucket.layout.live_params(live))
    # the model, or a part of it, may have been converted after construction
    dtypes = {p.dtype for p in params}
    low = {dtype for dtype in dtypes if is_low_precision(dtype)}
    if constraint is not None or move.needs_params or low == dtypes:
        values = _moved_stack(move, hp["lr"])
        if constraint is not None:
            name = f"The function from {type(bucket.strategy).__name__}.constraint"
            values = usable(constraint(values), values, name)
        return partial(_write, bucket, values, rows, live, dtypes, ctx)
    updates = bucket.scatter(move.direction, rows, live)
    factors = move.before, move.after
    if not low:
        return partial(_move, params, updates, hp["lr"], factors)
    is_low = [p.dtype in low for p in params]
    return partial(_move_mixed, params, updates, is_low, hp["lr"], factors)


_Factors = tuple[float | Tensor, float | Tensor]


def _apply_policies(bucket: Bucket, move: Move, rows: Rows) -> None:
    """Let the policies of a bucket change the move of some rows, and what they keep of these."""
    if not bucket.key.policies:
        return
    places = {name: on_device_of(rows, numbers) for name, numbers in bucket.policy_numbers.items()}
    kept = {name: numbers[places[name]].clone() for name, numbers in bucket.policy_numbers.items()}
    apply_policies(bucket.key.policies, move, kept)
    for name, numbers in kept.items():
        bucket.policy_numbers[name][places[name]] = numbers


def _values_before(bucket: Bucket, rows: Rows) -> Tensor:
    """Return the parameters of some rows with their rounding errors, in the dtype of the stack."""
    values, lost = bucket.gather_params(rows), bucket.compensation
    if lost is not None:
        values += lost[on_device_of(rows, lost)]
    return values


def _moved_stack(move: Move, rate: float | Tensor) -> Tensor:
    """Return the moved parameters, in the dtype of the stack.

    Overwrites those before the move, unless projections may look at them.
    """
    values = move.params.clone() if move.projections else move.params
    values.mul_(move.before).sub_(move.direction * rate).mul_(move.after)
    for project in move.projections:
        values = usable(project(values), values, "The projection of a policy")
    return values


def _write(
    bucket: Bucket,
    values: Tensor,
    rows: Rows,
    live: Sequence[bool],
    dtypes: set[torch.dtype],
    ctx: StepContext,
) -> None:
    """Round moved parameters once, and write them."""
    lost, rounded = bucket.compensation, values
    if len(dtypes) == 1:
        (dtype,) = dtypes
        if bucket.rounding == "stochastic" and is_low_precision(dtype):
            rounded = round_stochastically(values, dtype, row_keys(ctx.seeds, ctx.t))
        else:
            rounded = values.to(dtype)
    if lost is not None:
        lost[on_device_of(rows, lost)] = (values - rounded).to(lost.dtype)
    bucket.write_params(rounded, rows, live)


def _move(
    params: list[Tensor], updates: list[Tensor], rate: float | Tensor, factors: _Factors
) -> None:
    """Move parameters in their own dtype."""
    if isinstance(rate, Tensor):
        updates, rate = list(torch._foreach_mul(updates, rate)), 1.0
    _scale(params, factors[0])
    torch._foreach_add_(params, updates, alpha=-rate)
    _scale(params, factors[1])


def _move_mixed(
    params: list[Tensor],
    updates: list[Tensor],
    is_low: list[bool],
    rate: float | Tensor,
    factors: _Factors,
) -> None:
    """Move some parameters in their own dtype, and those of low precision as `_moved_stack`."""
    pairs = list(zip(params, updates, is_low, strict=True))
    own = [(p, update) for p, update, low in pairs if not low]
    _move([p for p, _ in own], [update for _, update in own], rate, factors)
    rounded = [(p, update) for p, update, low in pairs if low]
    values = [p.to(update.dtype) for p, update in rounded]
    _scale(values, factors[0])
    torch._foreach_sub_(values, torch._foreach_mul([update for _, update in rounded], rate))
    _scale(values, factors[1])
    torch._foreach_copy_([p for p, _ in rounded], values)


def _scale(tensors: list[Tensor], factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        torch._foreach_mul_(tensors, factor)
    elif factor != 1.0:
        # on the CPU, torch converts a number to a tensor for each product, at the cost of a product
        on_cpu = tensors[0].device.type == "cpu"
        torch._foreach_mul_(tensors, tensors[0].new_tensor(factor) if on_cpu else factor)
