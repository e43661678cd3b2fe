"""Which tensors the optimizer can update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def problem_of(p: Tensor) -> str | None:
    """Return why a parameter cannot be updated and what to do, as a predicate; None if it can."""
    if is_lazy(p):
        return "has no shape yet. Run one forward pass before building the optimizer."
    if p.dtype not in _DTYPES or p.layout != torch.strided:
        return (
            f"has {p.dtype} and the layout {p.layout}, expected a dense real floating-point "
            "parameter of at least 16 bits. Convert it or leave it out."
        )
    return None
