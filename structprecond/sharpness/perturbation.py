"""SAM's perturbation: the norm of all gradients, and the step along them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from structprecond.core.norms import norm_over_ranks


@dataclass
class Part:
    """This rank's parts of parameters of one group, dtype and device, and of their gradients.

    Args:
        rho: The size of the neighbourhood, negative where the base maximizes.
        adaptive: Whether it scales with the parameters.
        params: The parameters.
        grads: Their gradients, those of low precision in float32.
        whole: The whole parameters, which are all placed alike.
    """

    rho: float
    adaptive: bool
    params: list[Tensor]
    grads: list[Tensor]
    whole: list[nn.Parameter]

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
        """Return the 2-norm of the directions on all ranks, or the infinity norm of the gradients.

        It is the same on all ranks that hold parts of the same parameters.
        """
        tensors = [t for t in (self.directions if order == 2 else self.grads) if t.numel()]
        norm = self.grads[0].new_zeros(())
        if tensors:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors, order)), order)
        return norm_over_ranks(norm, order, self.whole[0])

    def perturb(self, norm: float) -> None:
        """Add e, given the norm of T g; overwrites the directions."""
        if self.adaptive:
            torch._foreach_mul_(self.directions, self.params)
        torch._foreach_add_(self.params, self.directions, alpha=self.rho / norm)


def total_norm(parts: list[Part]) -> tuple[float, float]:
    """Return the norm of all directions, and its unit.

    The unit is 1 unless squares overflow. Then it is the largest entry of the gradients, which are
    divided by it; the perturbation does not depend on their scale.
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
    """Return a norm over all parts on all devices, with one host-device sync."""
    if not parts:
        return 0.0
    norms = [part.norm(order) for part in parts]
    widest = max((n.dtype for n in norms), key=lambda dtype: dtype.itemsize)
    together = torch.stack([n.to(norms[0].device, widest) for n in norms])
    return float(torch.linalg.vector_norm(together, order))
