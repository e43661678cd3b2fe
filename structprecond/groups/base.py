"""The interface of groupings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Size, Tensor, nn

from structprecond.errors import GroupError


class PreconditionerGroup(ABC):
    """A grouping: which parameters form a unit, and as which tensor.

    `group` and `ungroup` move entries and undo each other. An `ungroup` that returns views costs
    nothing: the optimizer finds the views once and copies gradients straight into them. Only units
    with equal groupings are stacked, so make your own grouping a frozen dataclass.

    Attributes:
        stacked: If True, dimension 0 of the grouped tensor indexes independent rows (heads,
            experts), each with its own Kronecker factors.
        requires_modules: If True, `identify` needs modules, so the optimizer must be given the
            model.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class NormsTogether(FlattenAndConcatenate):
        ...     '''Group weight and bias of each layer norm into one vector.'''
        ...
        ...     def identify(self, model):
        ...         norms = (m for m in model.modules() if isinstance(m, nn.LayerNorm))
        ...         return [[m.weight, m.bias] for m in norms]
        >>> [len(unit) for unit in NormsTogether().identify(nn.LayerNorm(4))]
        [2]
    """

    stacked: ClassVar[bool] = False
    requires_modules: ClassVar[bool] = True

    @abstractmethod
    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return the parameters of each unit.

        A unit is used if none of its parameters belongs to an earlier unit, all are in the same
        param group, and either all or none are frozen. A parameter that two modules share may
        occur in two units.
        """

    @abstractmethod
    def group(self, tensors: list[Tensor]) -> Tensor:
        """Join tensors with the shapes of a unit's parameters into one tensor."""

    @abstractmethod
    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Split a grouped tensor into tensors of the given shapes: the inverse of `group`."""


def check_pattern(rule: PreconditionerGroup, pattern: object) -> None:
    """Raise `GroupError` unless a grouping's pattern is a text."""
    if not isinstance(pattern, str):
        raise GroupError(
            f"{rule}: pattern is a text with shell wildcards that parameter names match, got "
            f"{pattern!r}."
        )


def squeeze_axes(tensor: Tensor) -> Tensor:
    """Drop axes of size 1 but keep at least one axis, which avoids 1x1 Kronecker factors."""
    return tensor.reshape([size for size in tensor.shape if size != 1] or [1])


class FlattenAndConcatenate(PreconditionerGroup):
    """Base of groupings that join parameters into one vector; subclasses define `identify`."""

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Concatenate the flattened tensors."""
        return torch.cat([t.flatten() for t in tensors])

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Split the vector and reshape the pieces."""
        pieces = grouped_tensor.split([shape.numel() for shape in tensor_shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, tensor_shapes, strict=True)]
