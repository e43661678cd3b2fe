"""Structured preconditioners for PyTorch: one optimizer core, every strategy, every structure."""

from structprecond.core.batch_size import get_batch_size
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.state import State
from structprecond.errors import (
    CheckpointError,
    DecompositionError,
    GradientError,
    GroupError,
    HyperparameterError,
    StructPrecondError,
    StructureError,
)
from structprecond.groups import (
    FlattenAndConcatenate,
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SplitHeads,
)
from structprecond.report import describe
from structprecond.strategies.base import Hyperparameter, StepContext, Strategy
from structprecond.strategies.sirf import SIRFShampoo, SIRFShampooStrategy
from structprecond.structures import (
    BlockDiagonalMatrix,
    DenseMatrix,
    DiagonalMatrix,
    HierarchicalMatrix,
    StructuredMatrix,
    TrilBottomRightDiagMatrix,
    TrilToeplitzMatrix,
    TrilTopLeftDiagMatrix,
    TriuBottomRightDiagMatrix,
    TriuToeplitzMatrix,
    TriuTopLeftDiagMatrix,
)

__version__ = "0.1.0"

__all__ = [
    "BlockDiagonalMatrix",
    "CheckpointError",
    "DecompositionError",
    "DenseMatrix",
    "DiagonalMatrix",
    "FlattenAndConcatenate",
    "FlattenEmbedding",
    "GradientError",
    "GroupError",
    "HierarchicalMatrix",
    "Hyperparameter",
    "HyperparameterError",
    "LinearWeightBias",
    "PerParameter",
    "PreconditionerGroup",
    "SIRFShampoo",
    "SIRFShampooStrategy",
    "SplitHeads",
    "State",
    "StepContext",
    "Strategy",
    "StructPrecondError",
    "StructureError",
    "StructuredMatrix",
    "StructuredOptimizer",
    "TrilBottomRightDiagMatrix",
    "TrilToeplitzMatrix",
    "TrilTopLeftDiagMatrix",
    "TriuBottomRightDiagMatrix",
    "TriuToeplitzMatrix",
    "TriuTopLeftDiagMatrix",
    "describe",
    "get_batch_size",
]
