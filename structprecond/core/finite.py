"""Looking for gradients that no step can use, with one look at each device."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import nn

from structprecond.core.bucket import Bucket


def with_large_gradient(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters whose gradients strategies may not be able to compute with.

    The fourth power of such a norm, as in the norm of a Kronecker factor, overflows in the dtype of
    the computation: in float32 from 4e9 on. Infinities and NaN are among them.
    """
    return _beyond(params, 2, 0.25)


def with_nonfinite_gradient(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters whose gradients hold an infinity or NaN.

    Sums of squares are fast, but overflow on some finite gradients: those are looked at again.
    """
    suspects = with_large_gradient(params)
    return suspects and _beyond(suspects, torch.inf, 1.0)


def _beyond(params: Sequence[nn.Parameter], order: float, power: float) -> list[nn.Parameter]:
    """Return where the norm of the gradient is above a power of the largest number, or NaN."""
    found = []
    kinds = [(p.device, p.dtype) for p in params]
    for kind in set(kinds):
        members = [p for p, other in zip(params, kinds, strict=True) if other == kind]
        dtype = kind[1]
        limit = torch.finfo(torch.promote_types(dtype, torch.float32)).max ** power
        norms = torch._foreach_norm([p.grad for p in members if p.grad is not None], order)
        sizes = torch.stack(norms).tolist()
        found += [p for p, size in zip(members, sizes, strict=True) if not size <= limit]
    return found


def unstable_units(bucket: Bucket, live: Sequence[bool], *args: Any) -> list[bool]:
    """Return which of the live units a step would leave with what is not finite.

    What a gradient does to state and parameters differs from strategy to strategy, and with the
    state: no bound is right for all. So a copy makes the step, which costs as much as the step.
    That is for large gradients alone, which are rare and the only ones that can do harm.

    Args:
        bucket: The bucket, which stays as it is.
        live: Whether each unit takes part.
        args: The other arguments of `Bucket.step`.
    """
    twin = copy(bucket)
    twin.state = bucket.state.map(torch.clone)
    twin.steps, twin.failed = bucket.steps.clone(), bucket.failed.clone()
    twin.begun, twin.overdue = bucket.begun.clone(), bucket.overdue.clone()
    twin.lost = None if bucket.lost is None else bucket.lost.clone()
    twin.layout = copy(bucket.layout)
    twin.layout.params = [nn.Parameter(p.detach().clone()) for p in bucket.params]
    for p, original in zip(twin.params, bucket.params, strict=True):
        p.grad = original.grad
    twin.step(live, *args)
    state = [t.unsqueeze(-1).flatten(1) for t in twin.named_tensors().values()]
    rows = torch.stack([t.isfinite().all(1).cpu() for t in state]).all(0)
    params = {
        id(original): bool(p.isfinite().all())
        for p, original in zip(twin.params, bucket.params, strict=True)
    }
    return [
        on and not (bool(rows[span].all()) and all(params[id(p)] for p in unit.params))
        for unit, span, on in zip(bucket.units, bucket.spans, live, strict=True)
    ]
