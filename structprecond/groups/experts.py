"""Groups the experts of a mixture, or the layers of a stack, as independent rows."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Size, Tensor, nn

from structprecond.errors import GroupError
from structprecond.groups.base import PreconditionerGroup, check_pattern
from structprecond.roles import RoleName, infer_roles

_STACKED: tuple[RoleName, ...] = ("experts", "stack")


@dataclass(frozen=True)
class StackExperts(PreconditionerGroup):
    """Group the experts of a weight `(experts, out, in)` as independent rows of a stack.

    Each expert, and each layer of a weight `(layers, out, in)`, has its own Kronecker factors.
    `PerParameter` would give the whole weight three factors instead.

    Args:
        pattern: A pattern of parameter names, with shell wildcards, for other weights with at least
            two axes, such as heads `(heads, in, out)`. Default: None, the experts that
            `infer_roles` finds.

    Raises:
        GroupError: If the pattern is no text, or no parameter matches it, or one with fewer than
            two axes.

    Example:
        >>> StackExperts().group([torch.zeros(8, 16, 4)]).shape
        torch.Size([8, 16, 4])
    """

    pattern: str | None = None
    stacked = True
    requires_modules = False

    def __post_init__(self) -> None:
        """Check the pattern."""
        if self.pattern is not None:
            check_pattern(self, self.pattern)

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return every parameter with the weights of several experts or layers."""
        named = dict(model.named_parameters())
        if self.pattern is None:
            roles = infer_roles(model)
            return [[p] for name, p in named.items() if roles[name].role in _STACKED]
        found = {name: p for name, p in named.items() if fnmatchcase(name, self.pattern)}
        if not found or any(p.ndim < 2 for p in found.values()):
            raise GroupError(
                f"{self}: expected parameters with at least two axes, found "
                f"{ {name: tuple(p.shape) for name, p in found.items()} }. Match one of "
                f"{', '.join(named)}."
            )
        return [[p] for p in found.values()]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Return the weight: its first axis indexes the rows."""
        return tensors[0]

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Return the tensor in the parameter's shape."""
        (shape,) = tensor_shapes
        return [grouped_tensor.reshape(shape)]
