"""Batch norm during passes that must not update its statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def freeze_batch_norm(model: nn.Module) -> Iterator[None]:
    """Freeze the running statistics of batch norm, also in training mode.

    Outputs do not change: training mode still uses the batch's statistics, evaluation mode the
    running ones. Meant for the second pass of `SAM`, whose activations come from perturbed
    parameters.

    Args:
        model: The model. Its modules are restored after the context, also after an exception.

    Example:
        >>> from structprecond import freeze_batch_norm
        >>> norm = nn.BatchNorm1d(2)
        >>> with freeze_batch_norm(norm):
        ...     _ = norm(torch.ones(4, 2))
        >>> norm.running_mean
        tensor([0., 0.])
    """
    tracking = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
