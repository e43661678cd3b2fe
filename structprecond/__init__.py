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
    MergeDims,
    PerParameter,
    PreconditionerGroup,
    SplitHeads,
)
from structprecond.report import describe
from structprecond.strategies.base import Hyperparameter, StepContext, Strategy
from structprecond.strategies.kl import KLSOAP, KLShampoo, KLShampooStrategy, KLSOAPStrategy
from structprecond.strategies.shampoo import Shampoo, ShampooStrategy
from structprecond.strategies.sirf import SIRFShampoo, SIRFShampooStrategy
from structprecond.strategies.soap import SOAP, SOAPStrategy
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
    "KLSOAP",
    "SOAP",
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
    "KLSOAPStrategy",
    "KLShampoo",
    "KLShampooStrategy",
    "LinearWeightBias",
    "MergeDims",
    "PerParameter",
    "PreconditionerGroup",
    "SIRFShampoo",
    "SIRFShampooStrategy",
    "SOAPStrategy",
    "Shampoo",
    "ShampooStrategy",
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
