"""Groupings: which parameters form a unit."""

from structprecond.groups.base import FlattenAndConcatenate, PreconditionerGroup
from structprecond.groups.embedding import FlattenEmbedding
from structprecond.groups.experts import StackExperts
from structprecond.groups.linear import LinearWeightBias
from structprecond.groups.matricize import Matricize
from structprecond.groups.merge import MergeDims
from structprecond.groups.per_parameter import PerParameter
from structprecond.groups.split import SplitHeads

__all__ = [
    "FlattenAndConcatenate",
    "FlattenEmbedding",
    "LinearWeightBias",
    "Matricize",
    "MergeDims",
    "PerParameter",
    "PreconditionerGroup",
    "SplitHeads",
    "StackExperts",
]
