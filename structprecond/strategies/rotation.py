"""Bases of strategies that average Kronecker factors and rotate into their eigenbases."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from structprecond.checks import check_flags, check_positive
from structprecond.core.refresh import refresh_rows
from structprecond.core.state import Rows, on_device_of
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    Strategy,
    decoupled_decay,
    interval,
    nonnegative,
)
from structprecond.structures import DiagonalMatrix, StructuredMatrix
from structprecond.structures.blockwise import BlockwiseMatrix
from structprecond.structures.mode_product import matricize, multiply_axes
from structprecond.structures.spec import Structure

RotatedFactors = tuple[BlockwiseMatrix | None, ...]
"""One stack of matrices per axis, None for an axis that is not rotated."""


@dataclass(frozen=True)
class FactoredStrategy(Strategy[Any]):
    """Base of strategies that average Kronecker factors and refresh a decomposition of them.

    Args:
        max_precond_dim: Axes longer than this get no factor. Default: 10000.
        precondition_1d: Whether parameters with one axis get a factor. Default: False.
    """

    max_precond_dim: int = 10000
    precondition_1d: bool = False
    structures = (BlockwiseMatrix, DiagonalMatrix)

    def __post_init__(self) -> None:
        check_positive(max_precond_dim=self.max_precond_dim)
        check_flags(precondition_1d=self.precondition_1d)

    def due(self, steps: Tensor, phase_offsets: Tensor, every: int) -> Tensor:
        """Return the rows to refresh: those whose update t = 1, 2, ... the interval divides."""
        return super().due(steps + 1, phase_offsets, every)

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Return the factor of decoupled weight decay, which comes after the update."""
        return 1.0, decoupled_decay(hp)

    def adapt_structures(
        self, structures: tuple[Structure, ...], dims: Sequence[int], order: int, units: str
    ) -> tuple[Structure, ...]:
        """Leave out the factors of long axes and, without `precondition_1d`, of vectors."""
        structures = super().adapt_structures(structures, dims, order, units)
        if order <= 1 and not self.precondition_1d:
            return (None,) * len(structures)
        return tuple(
            None if dim > self.max_precond_dim else structure
            for structure, dim in zip(structures, dims, strict=True)
        )


@dataclass(frozen=True)
class RotatedStrategy(FactoredStrategy):
    """Base of strategies that work in eigenbases of Kronecker factors.

    States have `factors` and `bases`, which `_find_bases` initializes and `_refresh` improves.
    """

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "precondition_frequency": interval(10, operations=10.0),  # orthogonal iterations
        "refresh_tolerance": nonnegative(0.0),
    }

    @staticmethod
    def _find_bases(grad: Tensor, state: Any, rows: Rows) -> None:
        """Set the bases to the eigenbases of factors from a single gradient."""
        part = grad[on_device_of(rows, grad)]
        found: list[BlockwiseMatrix | None] = [None] * len(state.factors)
        for axis, S in enumerate(state.factors):
            if S is not None:
                X = matricize(part, axis).to(torch.promote_types(S.dtype, part.dtype))
                found[axis] = S.eigenbasis_of_inner(X)
        overwrite(state.bases, found)

    @abstractmethod
    def _refresh(self, state: Any, rows: Rows) -> None:
        """Refresh the bases of all rows of a state and rotate the moments into them."""

    def _refresh_stale(self, state: Any, hp: Mapping[str, Any], ctx: StepContext) -> None:
        """Refresh the rows that are due, except those within `refresh_tolerance`."""
        due = ctx.due
        axes = [
            (S, Q)
            for S, Q in zip(state.factors, state.bases, strict=True)
            if S is not None and Q is not None
        ]
        if due is None or not axes:
            return
        if hp["refresh_tolerance"]:
            ratios = torch.stack([S[due].off_diagonal_ratio(Q[due]) for S, Q in axes]).amax(0)
            # NaN counts as stale
            stale = ~(ratios <= hp["refresh_tolerance"]).cpu()
            due = torch.arange(len(ctx.failed), device="cpu")[due][stale]
        refresh_rows(self._refresh, state, due, ctx)


def overwrite(
    matrices: Sequence[StructuredMatrix | None], values: Sequence[StructuredMatrix | None]
) -> None:
    """Write values into matrices, axis by axis, in the dtypes of the matrices."""
    for matrix, value in zip(matrices, values, strict=True):
        if matrix is not None and value is not None:
            matrix.copy_(value)


def rotate(tensor: Tensor, bases: RotatedFactors) -> Tensor:
    r"""Express a stack in the eigenbases: \(G \times_1 Q_1^\top \dots \times_N Q_N^\top\)."""
    return multiply_axes(tensor, _turning(tensor, bases), "rmatmat")


def rotate_back(tensor: Tensor, bases: RotatedFactors) -> Tensor:
    r"""Undo `rotate`: \(G \times_1 Q_1 \dots \times_N Q_N\)."""
    return multiply_axes(tensor, _turning(tensor, bases), "matmat")


def _turning(tensor: Tensor, bases: RotatedFactors) -> RotatedFactors:
    """Leave out the bases of axes of length 1, which are 1."""
    return tuple(
        None if dim == 1 else basis for dim, basis in zip(tensor.shape[1:], bases, strict=True)
    )


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
