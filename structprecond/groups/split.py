"""Splits a parameter into independent rows: attention heads, fused projections."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from einops import rearrange
from torch import Size, Tensor, nn

from structprecond.checks import is_count
from structprecond.errors import GroupError
from structprecond.groups.base import PreconditionerGroup, check_pattern


@dataclass(frozen=True)
class SplitHeads(PreconditionerGroup):
    """Split the heads (or fused blocks) of a parameter into independent rows of a stack.

    A weight `(heads * d, in)` becomes a stack `(heads, d, in)` whose rows have their own Kronecker
    factors, and a bias `(heads * d,)` a stack `(heads, d)`. For a fused query-key-value projection,
    `heads=3` splits q, k and v, and `heads=3 * num_heads` splits all their heads. `axis=1` splits
    the input axis, as for an output projection `(out, heads * d)`.

    Args:
        pattern: A pattern of parameter names, with shell wildcards.
        heads: The number of equal pieces, at least 1.
        axis: The axis to split, 0 or 1. Default: 0.

    Raises:
        GroupError: If an argument has another type or is out of range, no parameter matches the
            pattern, or the axis cannot be split evenly.

    Example:
        >>> SplitHeads("*.qkv.weight", heads=3).group([torch.zeros(12, 4)]).shape
        torch.Size([3, 4, 4])
    """

    pattern: str
    heads: int
    axis: int = 0
    stacked = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        axis_fits = self.axis in (0, 1) and isinstance(self.axis, int)
        if not is_count(self.heads) or not axis_fits or isinstance(self.axis, bool):
            raise GroupError(f"{self}: heads must be an integer of at least 1, and axis 0 or 1.")
        check_pattern(self, self.pattern)

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return every parameter whose name matches the pattern."""
        named = dict(model.named_parameters(remove_duplicate=False))
        found = {name: p for name, p in named.items() if fnmatchcase(name, self.pattern)}
        if not found:
            raise GroupError(f"{self} matches no parameter. Match one of {', '.join(named)}.")
        for name, p in found.items():
            if p.ndim <= self.axis or p.shape[self.axis] % self.heads:
                raise GroupError(
                    f"{self} cannot split axis {self.axis} of {name} {tuple(p.shape)} into "
                    f"{self.heads} equal pieces. Choose a divisor of its size."
                )
        return [[p] for p in dict.fromkeys(found.values())]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Return the stack of the pieces."""
        (tensor,) = tensors
        pattern = (
            "(heads d) ... -> heads d ..."
            if self.axis == 0
            else ("out (heads d) ... -> heads out d ...")
        )
        stack: Tensor = rearrange(tensor, pattern, heads=self.heads)
        return stack

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Join the pieces."""
        (shape,) = tensor_shapes
        if self.axis == 0:
            return [grouped_tensor.reshape(shape)]
        pieces = grouped_tensor.reshape(self.heads, shape[0], -1, *shape[2:])
        return [rearrange(pieces, "heads out d ... -> out (heads d) ...")]
