"""Looking for gradients that no step can use, with one look at each device."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from structprecond.core.bucket import Bucket


def with_large_gradient(
    buckets: Sequence[Bucket], live: Sequence[Sequence[bool]], grads: Sequence[Tensor]
) -> list[nn.Parameter]:
    """Return all parameters of live units whose gradients may be too large to compute with.

    The fourth power of such a norm, as in the norm of a Kronecker factor, overflows in the dtype of
    the computation: in float32 from 4e9 on. Infinities and NaN are among them, and norms that
    parameters in float16 cannot hold.

    Args:
        buckets: The buckets.
        live: For each, whether each unit takes part.
        grads: The gradients of each, stacked; the norm of a row is much faster than those of the
            hundreds of tensors that may be behind a stack.
    """
    norms = [torch.linalg.vector_norm(grad.unsqueeze(-1).flatten(1), dim=1) for grad in grads]
    found: list[nn.Parameter] = []
    for bucket, alive, sizes in zip(buckets, live, _to_lists(norms), strict=True):
        largest = torch.finfo(bucket.params[0].dtype).max
        limit = min(torch.finfo(bucket.dtype).max ** 0.25, largest)
        if all(size <= limit for size in sizes):
            continue
        for unit, span, on in zip(bucket.units, bucket.spans, alive, strict=True):
            if on and not all(size <= limit for size in sizes[span]):
                found += unit.params
    return found


def _to_lists(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Return the numbers of some vectors, with one look at each device for each dtype."""
    lists: list[list[float]] = [[] for _ in vectors]
    for kind in {(v.device, v.dtype) for v in vectors}:
        own = [i for i, v in enumerate(vectors) if (v.device, v.dtype) == kind]
        numbers = iter(torch.cat([vectors[i] for i in own]).tolist())
        for i in own:
            lists[i] = list(islice(numbers, len(vectors[i])))
    return lists


def with_nonfinite_gradient(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters whose gradients hold an infinity or NaN.

    Sums of squares are fast, but overflow on some finite gradients: those are looked at again.
    """
    suspects = _without_finite_norm(params, 2)
    return suspects and _without_finite_norm(suspects, torch.inf)


def _without_finite_norm(params: Sequence[nn.Parameter], order: float) -> list[nn.Parameter]:
    found = []
    kinds = [(p.device, p.dtype) for p in params]
    for kind in set(kinds):
        members = [p for p, other in zip(params, kinds, strict=True) if other == kind]
        norms = torch._foreach_norm([p.grad for p in members if p.grad is not None], order)
        finite = torch.stack(norms).isfinite().tolist()
        found += [p for p, fine in zip(members, finite, strict=True) if not fine]
    return found


def unstable_units(bucket: Bucket, live: Sequence[bool], grad: Tensor, *args: Any) -> list[bool]:
    """Return which of the live units a step would leave with what is not finite.

    What a gradient does to state and parameters differs from strategy to strategy, and with the
    state: no bound is right for all. So a copy makes the step, which costs as much as the step.
    That is for large gradients alone, which are rare and the only ones that can do harm.

    Args:
        bucket: The bucket, which stays as it is.
        live: Whether each unit takes part.
        grad: The gradients, stacked, which stay as they are.
        args: The other arguments of `Bucket.step`.
    """
    twin = copy(bucket)
    twin.state = bucket.state.map(torch.clone)
    twin.steps, twin.failed = bucket.steps.clone(), bucket.failed.clone()
    twin.begun, twin.overdue = bucket.begun.clone(), bucket.overdue.clone()
    twin.lost = None if bucket.lost is None else bucket.lost.clone()
    twin.layout = copy(bucket.layout)
    twin.layout.params = [nn.Parameter(p.detach().clone()) for p in bucket.params]
    twin.step(live, grad.clone(), *args)
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
