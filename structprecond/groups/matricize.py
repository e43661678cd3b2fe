"""Groups weights as matrices, for strategies that take only matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size, Tensor, nn

from structprecond.groups.base import PreconditionerGroup


@dataclass(frozen=True)
class Matricize(PreconditionerGroup):
    """Reshape each weight `(out, ...)` to a matrix; a convolution becomes `(out, in * kh * kw)`.

    Axes of size 1 stay, since `(1, n)` and `(n, 1)` are different matrices. Parameters with fewer
    than two axes become vectors.

    Example:
        >>> Matricize().group([torch.zeros(8, 3, 5, 5)]).shape
        torch.Size([8, 75])
    """

    requires_modules = False

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return each parameter as a unit."""
        return [[p] for p in model.parameters()]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Return the matrix."""
        (tensor,) = tensors
        return tensor.reshape(-1) if tensor.ndim < 2 else tensor.flatten(1)

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Return the tensor in the parameter's shape."""
        (shape,) = tensor_shapes
        return [grouped_tensor.reshape(shape)]
