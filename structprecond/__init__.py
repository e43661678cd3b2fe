"""Structured preconditioners for PyTorch: one optimizer core, every strategy, every structure."""

from structprecond.chooser import Recommendation, recommend
from structprecond.core.captured import CapturedStep
from structprecond.core.estimate import Estimate, estimate
from structprecond.core.inputs import get_batch_size, get_token_count
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.policies import (
    CapRMS,
    CautiousDecay,
    CautiousUpdate,
    Hyperball,
    MatchRMS,
    Move,
    Policy,
)
from structprecond.core.report import describe
from structprecond.core.routing import Routing
from structprecond.core.state import State
from structprecond.core.strategy import Hyperparameter, StepContext, Strategy
from structprecond.diagnostics import Diagnosis, Diagnostics, to_tensorboard
from structprecond.errors import (
    CheckpointError,
    DecompositionError,
    DistributedError,
    GradientError,
    GroupError,
    HyperparameterError,
    LostRankError,
    StructPrecondError,
    StructureError,
)
from structprecond.groups import (
    FlattenAndConcatenate,
    FlattenEmbedding,
    LinearWeightBias,
    Matricize,
    MergeDims,
    PerParameter,
    PreconditionerGroup,
    SplitHeads,
    StackExperts,
)
from structprecond.migrate import load_adamw
from structprecond.roles import infer_roles
from structprecond.sharpness.batch_norm import freeze_batch_norm
from structprecond.sharpness.sam import SAM
from structprecond.strategies.adamw import AdamW, AdamWStrategy
from structprecond.strategies.kl import KLSOAP, KLShampoo, KLShampooStrategy, KLSOAPStrategy
from structprecond.strategies.lars import LARS, LARSStrategy
from structprecond.strategies.muon import Muon, MuonStrategy, NorMuon, NorMuonStrategy
from structprecond.strategies.orthogonalized import OrthogonalizedMomentumStrategy
from structprecond.strategies.psgd import PSGDKron, PSGDKronStrategy
from structprecond.strategies.recommended import RECOMMENDED
from structprecond.strategies.scion import Scion, ScionStrategy
from structprecond.strategies.shampoo import Shampoo, ShampooStrategy
from structprecond.strategies.sirf import SIRFShampoo, SIRFShampooStrategy
from structprecond.strategies.soap import SOAP, SOAPStrategy
from structprecond.strategies.soap_muon import KLMuonStrategy, SOAPMuon, SOAPMuonStrategy
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
    "LARS",
    "RECOMMENDED",
    "SAM",
    "SOAP",
    "AdamW",
    "AdamWStrategy",
    "BlockDiagonalMatrix",
    "CapRMS",
    "CapturedStep",
    "CautiousDecay",
    "CautiousUpdate",
    "CheckpointError",
    "DecompositionError",
    "DenseMatrix",
    "Diagnosis",
    "Diagnostics",
    "DiagonalMatrix",
    "DistributedError",
    "Estimate",
    "FlattenAndConcatenate",
    "FlattenEmbedding",
    "GradientError",
    "GroupError",
    "HierarchicalMatrix",
    "Hyperball",
    "Hyperparameter",
    "HyperparameterError",
    "KLMuonStrategy",
    "KLSOAPStrategy",
    "KLShampoo",
    "KLShampooStrategy",
    "LARSStrategy",
    "LinearWeightBias",
    "LostRankError",
    "MatchRMS",
    "Matricize",
    "MergeDims",
    "Move",
    "Muon",
    "MuonStrategy",
    "NorMuon",
    "NorMuonStrategy",
    "OrthogonalizedMomentumStrategy",
    "PSGDKron",
    "PSGDKronStrategy",
    "PerParameter",
    "Policy",
    "PreconditionerGroup",
    "Recommendation",
    "Routing",
    "SIRFShampoo",
    "SIRFShampooStrategy",
    "SOAPMuon",
    "SOAPMuonStrategy",
    "SOAPStrategy",
    "Scion",
    "ScionStrategy",
    "Shampoo",
    "ShampooStrategy",
    "SplitHeads",
    "StackExperts",
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
    "estimate",
    "freeze_batch_norm",
    "get_batch_size",
    "get_token_count",
    "infer_roles",
    "load_adamw",
    "recommend",
    "to_tensorboard",
]
