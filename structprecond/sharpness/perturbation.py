"""How far SAM goes: the norm of the gradients of all parameters, and the step along them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Part:
    """The parameters of one group, dtype and device that are perturbed, and their gradients.

    Gradients of low precision come in float32.
    """

    rho: float  # negative where the base maximizes
    adaptive: bool
    params: list[Tensor]
    grads: list[Tensor]

    def __post_init__(self) -> None:
        """Compute the directions."""
        self.set_grads(self.grads)

    def set_grads(self, grads: list[Tensor]) -> None:
        """Compute the directions T g, up to signs that cancel in T² g."""
        self.grads = grads
        self.directions = grads
        if self.adaptive:
            self.directions = [*torch._foreach_mul(self.params, grads)]

    def norm(self, order: float = 2.0) -> Tensor:
        """Return the norm of the directions, of the gradients if the order is infinite."""
        tensors = self.directions if order == 2 else self.grads
        norms: Tensor = torch.stack(torch._foreach_norm(tensors, order))
        return torch.linalg.vector_norm(norms, order)  # type: ignore[no-any-return]

    def perturb(self, norm: float) -> None:
        """Add e, where the norm of T g is given; uses up the directions."""
        if self.adaptive:
            torch._foreach_mul_(self.directions, self.params)
        torch._foreach_add_(self.params, self.directions, alpha=self.rho / norm)


def total_norm(parts: list[Part]) -> tuple[float, float]:
    """Return the norm of all directions, and the unit it is measured in.

    The unit is 1 unless squares overflow. Then the gradients of the parts are divided by their
    largest entry, the unit, on which the perturbation does not depend.
    """
    norm = _combine(parts, 2.0)
    if math.isfinite(norm):
        return norm, 1.0
    unit = _combine(parts, torch.inf)
    if not math.isfinite(unit) or unit == 0:
        return norm, 1.0
    for part in parts:
        part.set_grads(list(torch._foreach_div(part.grads, unit)))
    return _combine(parts, 2.0), unit


def _combine(parts: list[Part], order: float) -> float:
    """Return a norm over all parts, on whatever devices they are, with one look at one of them."""
    if not parts:
        return 0.0
    norms = [part.norm(order) for part in parts]
    widest = max((n.dtype for n in norms), key=lambda dtype: dtype.itemsize)
    together = torch.stack([n.to(norms[0].device, widest) for n in norms])
    return float(torch.linalg.vector_norm(together, order))
