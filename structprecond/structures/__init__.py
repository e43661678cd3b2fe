"""Structured matrices: the structures that Kronecker factors may have."""

from structprecond.structures.base import StructuredMatrix
from structprecond.structures.block_diagonal import BlockDiagonalMatrix
from structprecond.structures.bordered import (
    BorderedDiagonalMatrix,
    TrilBottomRightDiagMatrix,
    TrilTopLeftDiagMatrix,
    TriuBottomRightDiagMatrix,
    TriuTopLeftDiagMatrix,
)
from structprecond.structures.dense import DenseMatrix
from structprecond.structures.diagonal import DiagonalMatrix
from structprecond.structures.hierarchical import HierarchicalMatrix
from structprecond.structures.spec import SUPPORTED_STRUCTURES, structure_class
from structprecond.structures.toeplitz import TrilToeplitzMatrix, TriuToeplitzMatrix

__all__ = [
    "SUPPORTED_STRUCTURES",
    "BlockDiagonalMatrix",
    "BorderedDiagonalMatrix",
    "DenseMatrix",
    "DiagonalMatrix",
    "HierarchicalMatrix",
    "StructuredMatrix",
    "TrilBottomRightDiagMatrix",
    "TrilToeplitzMatrix",
    "TrilTopLeftDiagMatrix",
    "TriuBottomRightDiagMatrix",
    "TriuToeplitzMatrix",
    "TriuTopLeftDiagMatrix",
    "structure_class",
]
