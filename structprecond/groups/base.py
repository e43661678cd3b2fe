"""The interface of grouping rules: which parameters form one tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Size, Tensor, nn


class PreconditionerGroup(ABC):
    """A rule: which parameters are treated jointly, and as which tensor.

    `group` and `ungroup` rearrange entries and are inverse to each other. An `ungroup` that returns
    views costs nothing: the optimizer finds the views once and copies gradients straight into them.
    Rules are compared with `==` to decide which parameters can be stacked, so make your own a
    frozen dataclass.

    Attributes:
        stacked: If True, dimension 0 of the grouped tensor indexes independent problems (heads,
            experts), each with Kronecker factors of its own.
        requires_modules: If True, `identify` looks at modules, so the optimizer has to be given the
            model and not just parameters.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class NormsTogether(FlattenAndConcatenate):
        ...     '''Treat scale and shift of each layer norm as one vector.'''
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
        """Return the parameters of the model that are treated jointly, one list per unit.

        A unit is used if none of its parameters belongs to another unit already (a parameter that
        is shared by two modules may be listed twice: the first unit gets it), all of them are in
        the same parameter group, and either all or none are frozen.
        """

    @abstractmethod
    def group(self, tensors: list[Tensor]) -> Tensor:
        """Combine tensors with the shapes of a unit's parameters into one tensor."""

    @abstractmethod
    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Split a grouped tensor into tensors of the given shapes: the inverse of `group`."""


def squeeze_axes(tensor: Tensor) -> Tensor:
    """Drop axes of size 1, keeping at least one: no 1x1 Kronecker factors."""
    return tensor.reshape([size for size in tensor.shape if size != 1] or [1])


class FlattenAndConcatenate(PreconditionerGroup):
    """Base of the rules that treat several parameters as one long vector.

    Subclasses say in `identify` which parameters belong together.
    """

    def group(self, tensors: list[Tensor]) -> Tensor:
        """Return one vector with all entries, tensor after tensor."""
        return torch.cat([t.flatten() for t in tensors])

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        """Cut the vector and shape the pieces."""
        pieces = grouped_tensor.split([shape.numel() for shape in tensor_shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, tensor_shapes, strict=True)]
