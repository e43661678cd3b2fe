"""Checks that a step makes before it changes anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from structprecond.core.bucket import Bucket
from structprecond.core.naming import enumerate_names
from structprecond.core.routing import as_routing
from structprecond.core.strategy import nonnegative
from structprecond.errors import GradientError, HyperparameterError, StructPrecondError


def check_values(group: Mapping[str, Any]) -> None:
    """Raise `HyperparameterError` unless a param group has all hyperparameters, and valid ones.

    Tensors on an accelerator are not checked: that would need a host-device sync.
    """
    hyperparameters = as_routing(group["strategy"]).hyperparameters
    if "weight_decay" in group:  # also where the strategy has another name for it
        hyperparameters.setdefault("weight_decay", nonnegative(0.0))
    for name, hyperparameter in hyperparameters.items():
        if name not in group:
            raise HyperparameterError(
                f"A param group has no {name!r} any more. Set it, for example to the default, "
                f"{hyperparameter.default!r}."
            )
        value = group[name]
        if not (isinstance(value, Tensor) and value.device.type not in ("cpu", "meta")):
            hyperparameter.validate(name, value)


def check_step(
    param_groups: Sequence[Mapping[str, Any]],
    buckets: Sequence[Bucket],
    names: Mapping[nn.Parameter, str],
) -> list[list[bool]]:
    """Check hyperparameters and tensors; return the live units of each bucket.

    Raises:
        StructPrecondError: If a hyperparameter, a parameter or a gradient cannot be used.
    """
    for group in param_groups:
        check_values(group)
    live = [bucket.layout.live() for bucket in buckets]
    for bucket, alive in zip(buckets, live, strict=True):
        check_tensors(bucket, alive, names)
    return live


def check_tensors(bucket: Bucket, live: Sequence[bool], names: Mapping[nn.Parameter, str]) -> None:
    """Check that the parameters still fit the bucket, and that the gradients fit the parameters.

    Raises:
        StructPrecondError: If the shape of a parameter has changed, or its dtype where rounding
            depends on it, or if it has no values.
        GradientError: If a gradient is sparse, complex, or of another shape.
    """
    _check_dtypes(bucket, names)
    # all at once: checking hundreds of tensors one by one takes as long as updating them
    grads = bucket.layout.live_grads(live)
    if (
        [p.shape for p in bucket.params] == bucket.layout.shapes
        and not any(p.is_meta for p in bucket.params)
        and {grad.layout for grad in grads} <= {torch.strided}
        and [grad.shape for grad in grads] == bucket.layout.live_shapes(live)
        and all(dtype.is_floating_point for dtype in {grad.dtype for grad in grads})
    ):
        return
    for p, shape in zip(bucket.params, bucket.layout.shapes, strict=True):
        if p.shape != shape or p.is_meta:
            raise StructPrecondError(
                f"{names[p]} has the shape {tuple(p.shape)} on {p.device}, expected {tuple(shape)} "
                "on a device with values. Build a new optimizer."
            )
    for p, grad in zip(bucket.layout.live_params(live), grads, strict=True):
        if grad.layout != torch.strided:
            raise GradientError(
                f"The gradient of {names[p]} has the layout {grad.layout}, expected a dense one. "
                "Build the embedding with sparse=False."
            )
        if grad.shape != p.shape or not grad.is_floating_point():
            raise GradientError(
                f"The gradient of {names[p]} has {grad.dtype} and shape {tuple(grad.shape)}, "
                f"expected real numbers of shape {tuple(p.shape)}. Set p.grad accordingly."
            )


def _check_dtypes(bucket: Bucket, names: Mapping[nn.Parameter, str]) -> None:
    dtype = bucket.key.param_dtype
    if bucket.rounding == "nearest" or {p.dtype for p in bucket.params} == {dtype}:
        return
    raise StructPrecondError(
        f"With rounding={bucket.rounding!r}, parameters must keep their dtype, but these were "
        f"converted from {dtype}: {enumerate_names([names[p] for p in bucket.params])}. Convert "
        "the model first, then build the optimizer."
    )


def check_batch_size(
    batch_size: int | None, buckets: Sequence[Bucket], live: Sequence[Sequence[bool]]
) -> None:
    """Raise `StructPrecondError` if a strategy needs the batch size and it is unknown."""
    if batch_size is not None:
        return
    for bucket, alive in zip(buckets, live, strict=True):
        if bucket.strategy.needs_batch_size and any(alive):
            raise StructPrecondError(
                f"{type(bucket.strategy).__name__} needs the batch size, but no gradient came from "
                "a forward pass of the model, or of a part of it, in training mode. Pass "
                "batch_size= as an integer, or assign one to optimizer.batch_size."
            )
