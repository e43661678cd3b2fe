"""Boxes: which part of each parameter a rank holds, from the placements of DTensors."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor

from structprecond.errors import StructPrecondError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Box:
    """A part of a tensor: a range of indices along every axis.

    Args:
        offset: The first index along each axis.
        size: The number of indices along each axis.
    """

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """Return the box of all entries."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """The number of entries."""
        return math.prod(self.size)

    def cut(self, other: Box) -> Box | None:
        """Return what two boxes have in common; None if that is nothing.

        Example:
            >>> Box((0, 2), (4, 4)).cut(Box((3, 0), (2, 3)))
            Box(offset=(3, 2), size=(1, 1))
        """
        starts = tuple(map(max, self.offset, other.offset))
        ends = [
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.size, other.offset, other.size, strict=True)
        ]
        size = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, size) if all(n > 0 for n in size) else None

    def moved(self, axis: int, by: int) -> Box:
        """Return the box at another place along one axis."""
        offset = list(self.offset)
        offset[axis] += by
        return Box(tuple(offset), self.size)

    def of(self, tensor: Tensor, held: Box) -> Tensor:
        """Return the view of this box in a tensor.

        Args:
            tensor: The entries of `held`.
            held: A box around this one.
        """
        for axis, (start, length) in enumerate(zip(self.offset, self.size, strict=True)):
            if length != tensor.shape[axis]:
                tensor = tensor.narrow(axis, start - held.offset[axis], length)
        return tensor


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor."""
    # it exists only where this module was imported, which takes long
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor, without a copy."""
    return tensor.to_local().detach() if is_dtensor(tensor) else tensor.detach()


def box_of(p: Tensor, coordinate: Sequence[int]) -> Box:
    """Return the box of a parameter that a rank holds.

    Args:
        p: The parameter.
        coordinate: The place of the rank in the mesh of the parameter; unused unless it is a
            DTensor.

    Example:
        >>> import torch
        >>> box_of(torch.zeros(3, 2), ())
        Box(offset=(0, 0), size=(3, 2))
    """
    if not is_dtensor(p):
        return Box.whole(p.shape)
    return _shard(tuple(p.shape), tuple(p.device_mesh.shape), tuple(coordinate), p.placements)


@lru_cache(maxsize=2**16)
def _shard(
    shape: tuple[int, ...],
    mesh: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Any, ...],
) -> Box:
    # the only function that knows all placements, also the strided ones of FSDP with tensor
    # parallelism; private, but a test compares it with what ranks hold
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    size, offset = _compute_local_shape_and_global_offset(shape, mesh, list(coordinate), placements)
    return Box(tuple(offset), tuple(size))


def describe_placed(p: Tensor) -> str:
    """Return shape, dtype and placements of a parameter."""
    placements = p.placements if is_dtensor(p) else "whole"
    return f"{tuple(p.shape)}, {p.dtype}, {placements}"


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, or a DTensor in any layout, into another one of the same shape.

    All ranks have to call it. It fails if `lacks_parts(source, target)`.
    """
    if _placed_alike(source, target):
        target, source = local(target), local(source)
    if is_dtensor(source):
        source = source.full_tensor()
    if is_dtensor(target):
        box = box_of(target, target.device_mesh.get_coordinate() or ())
        target, source = local(target), box.of(source, Box.whole(source.shape))
    target.copy_(source)


def lacks_parts(source: Tensor, target: Tensor) -> bool:
    """Return whether a source is a DTensor whose other parts no rank of this job can send."""
    if not is_dtensor(source) or _placed_alike(source, target):
        return False
    if all(placement.is_replicate() for placement in source.placements):
        return False
    mesh, place = source.device_mesh, source.device_mesh.get_coordinate()
    if place is None or not dist.is_initialized() or mesh.mesh[tuple(place)] != dist.get_rank():
        return True
    try:
        sizes = [dist.get_world_size(mesh.get_group(dim)) for dim in range(mesh.ndim)]
    except RuntimeError:
        return True
    return sizes != list(mesh.shape)


def _placed_alike(one: Tensor, other: Tensor) -> bool:
    """Return whether this rank has the same part of two DTensors."""
    if not is_dtensor(one) or not is_dtensor(other) or one.placements != other.placements:
        return False
    meshes = one.device_mesh, other.device_mesh
    # a file of another rank has its coordinate
    return meshes[0] == meshes[1] and meshes[0].get_coordinate() == meshes[1].get_coordinate()


def sharded_dims(p: Tensor) -> list[int]:
    """Return the dimensions of its mesh along which a parameter is sharded.

    Raises:
        StructPrecondError: If it is a sum over ranks that has not been computed yet.
    """
    if not is_dtensor(p):
        return []
    if any(placement.is_partial() for placement in p.placements):
        raise StructPrecondError(
            f"A parameter has the placements {p.placements}. Expected Shard and Replicate; "
            "redistribute it first."
        )
    return [dim for dim, placement in enumerate(p.placements) if not placement.is_replicate()]
