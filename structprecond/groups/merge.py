"""Merges neighbouring axes: fewer, larger Kronecker factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Size, Tensor, nn

from structprecond.errors import GroupError
from structprecond.groups.base import PreconditionerGroup

DataFormat = Literal["channels_first", "channels_last"]


def merge_shape(shape: Sequence[int], max_dim: int) -> tuple[int, ...]:
    """Multiply neighbouring sizes from the left while the product is at most `max_dim`.

    Source: Vyas et al. 2024 (arXiv 2409.11321), official implementation.

    Example:
        >>> merge_shape((64, 32, 3, 3), 300)
        (64, 288)
    """
    merged: list[int] = []
    current = 1
    for size in shape:
        if current * size <= max_dim:
            current *= size
            continue
        if current > 1:
            merged.append(current)
            current = size
        else:
            merged.append(size)
    if current > 1 or not merged:
        merged.append(current)
    return tuple(merged)


@dataclass(frozen=True)
class MergeDims(PreconditionerGroup):
    """Make each parameter a unit, with neighbouring axes merged while their product is small.

    Args:
        max_dim: The largest product of merged axes, at least 1. Default: 10000.
        data_format: "channels_last" permutes 4-d tensors from `(out, height, width, in)` to
            `(out, in, height, width)`. Default: "channels_first".

    Raises:
        GroupError: If an argument is out of range.

    Example:
        >>> import torch
        >>> MergeDims(max_dim=300).group([torch.zeros(64, 32, 3, 3)]).shape
        torch.Size([64, 288])
    """

    max_dim: int = 10000
    data_format: DataFormat = "channels_first"
    requires_modules = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        if self.max_dim < 1 or self.data_format not in ("channels_first", "channels_last"):
            raise GroupError(
                f"{self}: max_dim must be at least 1, and data_format 'channels_first' or "
                "'channels_last'."
            )

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return each parameter as a unit."""
        return [[p] for p in model.parameters()]

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Merge the axes."""
        (tensor,) = tensors
        if self._permutes(tensor.shape):
            tensor = tensor.permute(0, 3, 1, 2)
        return tensor.reshape(merge_shape(tensor.shape, self.max_dim))

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Split the axes again."""
        (shape,) = tensor_shapes
        if not self._permutes(shape):
            return [grouped_tensor.reshape(shape)]
        out, height, width, channels = shape
        return [grouped_tensor.reshape(out, channels, height, width).permute(0, 2, 3, 1)]

    def _permutes(self, shape: Sequence[int]) -> bool:
        return self.data_format == "channels_last" and len(shape) == 4
