"""What the strategies that work in eigenbases of Kronecker factors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from structprecond.strategies.base import Strategy
from structprecond.structures import DiagonalMatrix
from structprecond.structures.blockwise import BlockwiseMatrix
from structprecond.structures.mode_product import mode_product
from structprecond.structures.spec import Structure

RotatedFactors = tuple[BlockwiseMatrix | None, ...]
"""One stack of matrices per axis, None for an axis that is not rotated."""


@dataclass(frozen=True)
class RotatedStrategy(Strategy[Any]):
    """Base of the strategies that work in eigenbases of Kronecker factors.

    Args:
        max_precond_dim: Axes longer than this get no factor. Default: 10000.
        precondition_1d: Whether parameters with one axis get a factor. Default: False.
    """

    max_precond_dim: int = 10000
    precondition_1d: bool = False
    decay: ClassVar[Literal["before", "after", "inside"]] = "after"
    refresh_interval = "precondition_frequency"
    refresh_phase = 1
    structures = (BlockwiseMatrix, DiagonalMatrix)

    def adapt_structures(
        self, structures: tuple[Structure, ...], dims: Sequence[int], order: int, units: str
    ) -> tuple[Structure, ...]:
        """Leave out the factors of long axes and, unless asked for, of vectors."""
        structures = super().adapt_structures(structures, dims, order, units)
        if order <= 1 and not self.precondition_1d:
            return (None,) * len(structures)
        return tuple(
            None if dim > self.max_precond_dim else structure
            for structure, dim in zip(structures, dims, strict=True)
        )


def rotate(tensor: Tensor, bases: RotatedFactors) -> Tensor:
    r"""Express a stack in the eigenbases: \(G \times_1 Q_1^\top \dots \times_N Q_N^\top\)."""
    for axis, basis in enumerate(bases):
        if basis is not None:
            tensor = mode_product(tensor, basis.to(tensor.dtype).rmatmat, axis)
    return tensor


def rotate_back(tensor: Tensor, bases: RotatedFactors) -> Tensor:
    r"""Undo `rotate`: \(G \times_1 Q_1 \dots \times_N Q_N\)."""
    for axis, basis in enumerate(bases):
        if basis is not None:
            tensor = mode_product(tensor, basis.to(tensor.dtype).matmat, axis)
    return tensor


def make_factors(
    like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
) -> tuple[RotatedFactors, RotatedFactors]:
    """Return zero factors and identity bases for the axes that are rotated."""

    def one(make: str) -> RotatedFactors:
        return tuple(
            _make(structure, make, dim, like, dtype)
            for structure, dim, dtype in zip(structures, like.shape[1:], dtypes, strict=True)
        )

    return one("zeros"), one("eye")


def _make(
    structure: Structure, make: str, dim: int, like: Tensor, dtype: torch.dtype
) -> BlockwiseMatrix | None:
    if structure is None or not issubclass(structure, BlockwiseMatrix):
        return None
    made: BlockwiseMatrix = getattr(structure, make)(dim, like.shape[:1], dtype, like.device)
    return made
