"""Looking for gradients that are not finite, with one look at each device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


def with_nonfinite_gradient(params: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters whose gradients hold an infinity or NaN.

    Sums of squares are fast, but overflow on some finite gradients: those are looked at again.
    """
    suspects = _with_infinite_norm(params, 2)
    return suspects and _with_infinite_norm(suspects, torch.inf)


def _with_infinite_norm(params: Sequence[nn.Parameter], order: float) -> list[nn.Parameter]:
    alike: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for p in params:
        alike.setdefault((p.device, p.dtype), []).append(p)
    found = []
    for members in alike.values():
        norms = torch._foreach_norm([p.grad for p in members if p.grad is not None], order)
        finite = torch.stack(norms).isfinite().tolist()
        found += [p for p, ok in zip(members, finite, strict=True) if not ok]
    return found
