"""Groups weight and bias of linear layers as one matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Size, Tensor, nn

from structprecond.groups.base import PreconditionerGroup, squeeze_axes


@dataclass(frozen=True)
class LinearWeightBias(PreconditionerGroup):
    """Group weight `(out, in)` and bias `(out,)` of a linear layer as one matrix `(out, in + 1)`.

    The bias is the last column. Layers without a bias are left to the next grouping.

    Attributes:
        LINEAR_CLS: The classes that count as linear layers.

    Example:
        >>> LinearWeightBias().group([torch.zeros(3, 2), torch.ones(3)]).shape
        torch.Size([3, 3])
    """

    LINEAR_CLS: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return weight and bias of every linear layer that has a bias."""
        layers = (m for m in model.modules() if isinstance(m, self.LINEAR_CLS))
        return [[m.weight, m.bias] for m in layers if isinstance(m.bias, nn.Parameter)]  # type: ignore[list-item]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Append the bias as last column, and drop axes of size 1."""
        weight, bias = tensors
        return squeeze_axes(torch.cat([weight, bias.unsqueeze(1)], dim=1))

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Split off the last column."""
        weight, bias = tensor_shapes
        matrix = grouped_tensor.view(weight[0], weight[1] + 1)
        return [matrix[:, :-1], matrix[:, -1].view(bias)]
