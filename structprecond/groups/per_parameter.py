"""Makes each parameter a unit: the default grouping."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size, Tensor, nn

from structprecond.groups.base import PreconditionerGroup, squeeze_axes


@dataclass(frozen=True)
class PerParameter(PreconditionerGroup):
    """Make each parameter a unit, without its axes of size 1.

    Example:
        >>> PerParameter().group([torch.zeros(4, 1, 3)]).shape
        torch.Size([4, 3])
    """

    requires_modules = False

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return each parameter as a unit."""
        return [[p] for p in model.parameters()]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Return the tensor without its axes of size 1; a scalar becomes a vector of one entry."""
        (tensor,) = tensors
        return squeeze_axes(tensor)

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Return the tensor in the parameter's shape."""
        (shape,) = tensor_shapes
        return [grouped_tensor.reshape(shape)]
