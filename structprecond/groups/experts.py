"""The experts of a mixture as independent problems."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Size, Tensor, nn

from structprecond.groups.base import PreconditionerGroup, squeeze_axes
from structprecond.roles import infer_roles


@dataclass(frozen=True)
class StackExperts(PreconditionerGroup):
    """Treat the experts of a weight `(experts, out, in)` as independent rows of a stack.

    Which weights are such is what `infer_roles` says. Each expert has Kronecker factors of its own,
    where `PerParameter` gives the weight three factors.

    Example:
        >>> StackExperts().group([torch.zeros(8, 16, 4)]).shape
        torch.Size([8, 16, 4])
    """

    stacked = True

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return every parameter that holds the weights of several experts."""
        roles = infer_roles(model)
        return [[p] for name, p in model.named_parameters() if roles[name].role == "experts"]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Return the stack, without axes of size 1 inside an expert."""
        (tensor,) = tensors
        return squeeze_axes(tensor, first=1)

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Return the tensor in the parameter's shape."""
        (shape,) = tensor_shapes
        return [grouped_tensor.reshape(shape)]
