"""Moves parameters along directions: decay, update, constraint and rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from structprecond.core.bucket import Bucket
from structprecond.core.results import usable
from structprecond.core.rounding import is_low_precision, round_stochastically, row_keys
from structprecond.core.state import Rows, on_device_of
from structprecond.core.strategy import StepContext


def prepare_move(
    bucket: Bucket,
    direction: Tensor,
    rows: Rows,
    live: Sequence[bool],
    hp: Mapping[str, Any],
    ctx: StepContext,
) -> Callable[[], None]:
    """Return a function that subtracts lr times the directions, decays and constrains.

    The strategy is called here, and not by that function: if it fails, no parameter has changed.

    Args:
        bucket: The bucket.
        direction: The directions of some rows.
        rows: These rows.
        live: Whether each unit takes part.
        hp: The strategy's hyperparameters.
        ctx: The context of the update.
    """
    factors = bucket.strategy.decay_factors(hp)
    constraint = bucket.strategy.constraint()
    params: list[Tensor] = list(bucket.layout.live_params(live))
    # the model, or a part of it, may have been converted after construction
    dtypes = {p.dtype for p in params}
    low = {dtype for dtype in dtypes if is_low_precision(dtype)}
    if constraint is not None or low == dtypes:
        values = _moved_stack(bucket, direction, rows, hp["lr"], factors)
        if constraint is not None:
            name = f"The function from {type(bucket.strategy).__name__}.constraint"
            values = usable(constraint(values), values, name)
        return partial(_write, bucket, values, rows, live, dtypes, ctx)
    updates = bucket.scatter(direction, rows, live)
    if not low:
        return partial(_move, params, updates, hp["lr"], factors)
    is_low = [p.dtype in low for p in params]
    return partial(_move_mixed, params, updates, is_low, hp["lr"], factors)


_Factors = tuple[float | Tensor, float | Tensor]


def _moved_stack(
    bucket: Bucket, direction: Tensor, rows: Rows, rate: float | Tensor, factors: _Factors
) -> Tensor:
    """Return the moved parameters of some rows, in the dtype of the stack."""
    values, kept = bucket.gather_params(rows), bucket.compensation
    if kept is not None:
        values += kept[on_device_of(rows, kept)]
    return values.mul_(factors[0]).sub_(direction * rate).mul_(factors[1])


def _write(
    bucket: Bucket,
    values: Tensor,
    rows: Rows,
    live: Sequence[bool],
    dtypes: set[torch.dtype],
    ctx: StepContext,
) -> None:
    """Round moved parameters once, and write them."""
    kept, rounded = bucket.compensation, values
    if len(dtypes) == 1:
        (dtype,) = dtypes
        if bucket.rounding == "stochastic" and is_low_precision(dtype):
            rounded = round_stochastically(values, dtype, row_keys(ctx.seeds, ctx.t))
        else:
            rounded = values.to(dtype)
    if kept is not None:
        kept[on_device_of(rows, kept)] = (values - rounded).to(kept.dtype)
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
