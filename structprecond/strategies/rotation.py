"""What the strategies share that average Kronecker factors and rotate into their eigenbases."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from structprecond.core.state import ALL_ROWS, Rows, rows_of, select
from structprecond.strategies.base import (
    Hyperparameter,
    StepContext,
    Strategy,
    interval,
    nonnegative,
)
from structprecond.structures import DiagonalMatrix
from structprecond.structures.blockwise import BlockwiseMatrix
from structprecond.structures.mode_product import mode_product
from structprecond.structures.spec import Structure

RotatedFactors = tuple[BlockwiseMatrix | None, ...]
"""One stack of matrices per axis, None for an axis that is not rotated."""


@dataclass(frozen=True)
class FactoredStrategy(Strategy[Any]):
    """Base of the strategies that average Kronecker factors and refresh what they need of them.

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


@dataclass(frozen=True)
class RotatedStrategy(FactoredStrategy):
    """Base of the strategies that work in eigenbases of Kronecker factors.

    Their states have `factors` and `bases`, and they refresh them in `_refresh`.
    """

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "precondition_frequency": interval(10),
        "refresh_tolerance": nonnegative(0.0),
    }

    @abstractmethod
    def _refresh(self, state: Any) -> None:
        """Refresh the bases of all rows, and bring the moments into the new ones."""

    def _refresh_stale(self, state: Any, hp: Mapping[str, Any], ctx: StepContext) -> None:
        """Refresh the rows that are due, but for those whose bases are still good enough."""
        if ctx.due is None:
            return
        with rows_of(state, ctx.due) as due:
            rows = self._stale(due.factors, due.bases, hp["refresh_tolerance"])
            if rows is not None:
                with rows_of(due, rows) as part:
                    self._refresh(part)

    @staticmethod
    def _stale(factors: RotatedFactors, bases: RotatedFactors, tolerance: float) -> Rows | None:
        """Return the rows of which an axis has a larger off-diagonal ratio than the tolerance."""
        axes = [
            (S, Q) for S, Q in zip(factors, bases, strict=True) if S is not None and Q is not None
        ]
        if not axes:
            return None  # nothing is rotated
        if not tolerance:
            return ALL_ROWS
        ratios = [S.off_diagonal_ratio(Q) for S, Q in axes]
        return select((torch.stack(ratios).amax(0) > tolerance).cpu())


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
