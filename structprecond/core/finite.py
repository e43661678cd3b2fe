"""Excludes units with unusable gradients, with one host-device sync per device and dtype."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from structprecond.core.boxes import is_dtensor, local
from structprecond.core.bucket import compute_dtype
from structprecond.core.naming import enumerate_names
from structprecond.core.norms import norm_over_ranks
from structprecond.core.step import Plan
from structprecond.errors import GradientError

# a norm that no limit is below: the largest number of the narrowest dtype
_FITS_ALL = torch.finfo(torch.float16).max


def exclude_unusable(plans: Sequence[Plan], refuse: bool) -> str | None:
    """Exclude the units that the step would leave with infinities or NaN.

    Args:
        plans: The plans of all buckets; excluded units leave them.
        refuse: Whether to raise instead.

    Returns:
        A message about the excluded units; None if there are none.

    Raises:
        GradientError: If `refuse` and a gradient is unusable; nothing is excluded or counted.
    """
    large = with_large_gradient(plans)
    if not large:
        return None
    first = _exclude(plans, with_nonfinite_gradient(large), "not finite", refuse)
    unstable = [p for plan in plans for p in _unstable(plan, large)]
    second = _exclude(plans, unstable, "too large to compute with", refuse)
    return first or second


def _exclude(
    plans: Sequence[Plan],
    params: Sequence[nn.Parameter],
    problem: str,
    refuse: bool,
) -> str | None:
    """Exclude the units of some parameters, or raise; return the message."""
    if not params:
        return None
    bad = {id(p) for p in params}
    live = (
        unit for plan in plans for unit, on in zip(plan.bucket.units, plan.live, strict=True) if on
    )
    named = (pair for unit in live for pair in zip(unit.tensors, unit.names, strict=True))
    labels = enumerate_names([name for t, name in named if id(t) in bad])
    message = f"The gradients of {labels} are {problem} at step {plans[0].global_step}"
    if refuse:
        raise GradientError(f"{message}; nothing was changed.")
    for plan in plans:
        plan.exclude(_live_with_any(plan, bad))
    return (
        f"{message}. This step leaves their parameters and state unchanged. Later skips give no "
        "warning; optimizer.skipped counts them."
    )


def _live_with_any(plan: Plan, params: set[int]) -> list[bool]:
    """Return which live units have a parameter among the given ids."""
    return [
        on and any(id(t) in params for t in unit.tensors)
        for unit, on in zip(plan.bucket.units, plan.live, strict=True)
    ]


def with_large_gradient(plans: Sequence[Plan]) -> list[nn.Parameter]:
    """Return all parameters of live units whose gradients may be too large to compute with.

    A norm is too large if its fourth power, as in the norm of a Kronecker factor, overflows in the
    dtype of the computation (in float32: above 4e9), or if the parameters' dtype cannot hold it.
    That includes infinities and NaN.

    Args:
        plans: The plans. Norms of stacked rows are much faster than norms of hundreds of tensors.
    """
    found: list[nn.Parameter] = []
    for plan, sizes in zip(plans, _norms_of(plans), strict=True):
        # in C: about 30 ns per row; False for NaN
        if all(map(_FITS_ALL.__ge__, sizes)):
            continue
        bucket = plan.bucket
        limit = min(map(_limit_of, {p.dtype for p in bucket.params}))
        if all(size <= limit for size in sizes):
            continue
        for unit, span, on in zip(bucket.units, bucket.spans, plan.live, strict=True):
            if on and not all(size <= limit for size in sizes[span]):
                found += unit.tensors
    return found


def _limit_of(dtype: torch.dtype) -> float:
    """Return the largest norm of a gradient that surely can be computed with."""
    fourth_root: float = torch.finfo(compute_dtype(dtype)).max ** 0.25
    return min(fourth_root, torch.finfo(dtype).max)


def count_suspects(params: Sequence[nn.Parameter], parts: int) -> int:
    """Return how many gradients may be parts of ones that are too large to compute with.

    If there is none on any rank, then no whole gradient is in `with_large_gradient`.

    Args:
        params: Parameters, of which this rank may hold parts.
        parts: The largest number of parts of a unit on all ranks.
    """
    known = [(p.dtype, local(p.grad)) for p in params if p.grad is not None]
    if not known:
        return 0
    norms = torch._foreach_norm([grad for _, grad in known])
    sizes = _to_lists([norm.reshape(1) for norm in norms])
    limits = {dtype: _limit_of(dtype) / parts**0.5 for dtype, _ in known}
    pairs = zip(known, sizes, strict=True)
    return sum(not size <= limits[dtype] for (dtype, _), (size,) in pairs)


def _norms_of(plans: Sequence[Plan]) -> list[list[float]]:
    """Return the norm of each row's gradient; a second call for the same plans costs nothing."""
    new = [plan for plan in plans if plan.norms is None]
    stacks = (plan.grads for plan in new)
    norms = [torch.linalg.vector_norm(grad.unsqueeze(-1).flatten(1), dim=1) for grad in stacks]
    for plan, sizes in zip(new, _to_lists(norms), strict=True):
        plan.norms = sizes
    return [plan.norms or [] for plan in plans]


def _to_lists(vectors: Sequence[Tensor]) -> list[list[float]]:
    """Return vectors as lists, with one host-device sync per device and dtype."""
    lists: list[list[float]] = [[] for _ in vectors]
    for kind in {(v.device, v.dtype) for v in vectors}:
        own = [i for i, v in enumerate(vectors) if (v.device, v.dtype) == kind]
        numbers = iter(torch.cat([vectors[i] for i in own]).tolist())
        for i in own:
            lists[i] = list(islice(numbers, len(vectors[i])))
    return lists


def with_nonfinite_gradient(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters whose gradients hold an infinity or NaN.

    The 2-norm is fast but overflows on some finite gradients; these are checked again.
    """
    suspects = _without_finite_norm(params, 2)
    return suspects and _without_finite_norm(suspects, torch.inf)


def are_nonfinite_on_a_rank(params: Sequence[nn.Parameter]) -> bool:
    """Return whether gradients hold an infinity or NaN, also in the parts that other ranks hold."""
    found = bool(with_nonfinite_gradient(params))
    placed = {(p.device_mesh, p.placements): p for p in params if is_dtensor(p)}
    flag = torch.tensor(float(found))
    flags = [norm_over_ranks(flag.to(p.device), math.inf, p) for p in placed.values()]
    return found or any(map(bool, flags))


def _without_finite_norm(params: Sequence[nn.Parameter], order: float) -> list[nn.Parameter]:
    found = []
    kinds = [(p.device, p.dtype) for p in params]
    for kind in set(kinds):
        members = [p for p, other in zip(params, kinds, strict=True) if other == kind]
        norms = torch._foreach_norm([local(p.grad) for p in members if p.grad is not None], order)
        finite = torch.stack(norms).isfinite().tolist()
        found += [p for p, fine in zip(members, finite, strict=True) if not fine]
    return found


def _unstable(plan: Plan, large: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters of units with large gradients that a step would not leave finite.

    The effect of a gradient depends on strategy and state, so no bound fits all: a copy of the
    bucket makes a trial step, at the cost of a step. Only large gradients need one, and are rare.
    """
    suspects = _live_with_any(plan, {id(p) for p in large})
    if not any(suspects):
        return []
    trial = plan.trial(suspects)
    trial.apply()
    state = [t.unsqueeze(-1).flatten(1) for t in trial.bucket.named_tensors().values()]
    rows = torch.stack([t.isfinite().all(1).cpu() for t in state]).all(0)
    pairs = zip(plan.bucket.params, trial.bucket.params, strict=True)
    finite = {id(original): bool(p.isfinite().all()) for original, p in pairs}
    units = zip(plan.bucket.units, plan.bucket.spans, suspects, strict=True)
    return [
        t
        for unit, span, suspected in units
        if suspected and not (bool(rows[span].all()) and all(finite[id(t)] for t in unit.tensors))
        for t in unit.tensors
    ]
