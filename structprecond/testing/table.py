"""The strategies of this library, with the settings under which they are tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from structprecond.core.optimizer import StructuredOptimizer
from structprecond.groups import LinearWeightBias, PerParameter
from structprecond.strategies.adamw import AdamW, AdamWStrategy
from structprecond.strategies.kl import KLSOAP, KLShampoo
from structprecond.strategies.lars import LARS
from structprecond.strategies.muon import Muon, MuonStrategy, NorMuon
from structprecond.strategies.scion import Scion
from structprecond.strategies.shampoo import Shampoo
from structprecond.strategies.sirf import SIRFShampoo
from structprecond.strategies.soap import SOAP, SOAPStrategy
from structprecond.testing.cells import NO_STRUCTURE, STRUCTURES
from structprecond.testing.runs import Make
from structprecond.testing.strategies import StrategyContract

_WITH_ROOTS = ("dense", "diagonal", "block2diagonal", "none")


def every_fourth(step: int) -> bool:
    """Return whether a step is the third of four: an interval that is a callable."""
    return step % 4 == 2


def _mixed(model: nn.Module, **overrides: Any) -> StructuredOptimizer:
    return StructuredOptimizer(
        model,
        strategy={"conv": SOAPStrategy(), "matrix": MuonStrategy(), "default": AdamWStrategy()},
        hyperparameters={"lr": 0.02, "soap_precondition_frequency": 3},
        **overrides,
    )


def _with(optimizer: Any, **settings: Any) -> Make:
    def make(model: nn.Module, **overrides: Any) -> StructuredOptimizer:
        made: StructuredOptimizer = optimizer(model, **settings, **overrides)
        return made

    return make


def _contract(
    make: Make,
    structures: Sequence[str] = (NO_STRUCTURE,),
    refusal: str = StrategyContract.refusal,
) -> type[StrategyContract]:
    """Return the contract of an optimizer."""
    members = {"make": staticmethod(make), "structures": tuple(structures), "refusal": refusal}
    return type("Contract", (StrategyContract,), members)


_BASES = (_WITH_ROOTS, "no eigenbasis")
_ROOTS = (_WITH_ROOTS, "no inverse root")

STRATEGIES: dict[str, type[StrategyContract]] = {
    "SIRFShampoo": _contract(_with(SIRFShampoo, lr=0.02, T=2), STRUCTURES),
    "SIRFShampoo by a callable": _contract(
        _with(
            SIRFShampoo,
            lr=0.02,
            T=every_fourth,
            batch_size=4,
            combine_params=(LinearWeightBias(), PerParameter()),
        ),
        STRUCTURES,
    ),
    "SOAP": _contract(_with(SOAP, lr=0.02, precondition_frequency=3), *_BASES),
    "SOAP by a callable": _contract(
        _with(SOAP, lr=0.02, precondition_frequency=every_fourth, precondition_1d=True),
        *_BASES,
    ),
    "SOAP in turns": _contract(
        _with(
            SOAP,
            lr=0.02,
            precondition_frequency=3,
            refresh="staggered",
            skip_first=False,
            transport=True,
            clip_rms=2.0,
        ),
        *_BASES,
    ),
    "KLShampoo": _contract(_with(KLShampoo, lr=0.01, precondition_frequency=3), *_BASES),
    "KLSOAP": _contract(_with(KLSOAP, lr=0.01, precondition_frequency=3), *_BASES),
    "Shampoo": _contract(
        _with(Shampoo, lr=0.02, precondition_frequency=3, start_preconditioning_step=2),
        *_ROOTS,
    ),
    "Shampoo, coupled Newton": _contract(
        _with(
            Shampoo,
            lr=0.02,
            precondition_frequency=3,
            root="coupled_newton",
            exponent=0.5,
            eps=1e-4,
            grafting="rmsprop",
        ),
        *_ROOTS,
    ),
    "Shampoo, Denman-Beavers": _contract(
        _with(
            Shampoo,
            lr=0.02,
            precondition_frequency=3,
            root="newton_db",
            exponent=0.5,
            eps=1e-4,
            grafting="sgd",
            refresh="staggered",
        ),
        *_ROOTS,
    ),
    "Muon": _contract(_with(Muon, lr=0.02, nesterov=True)),
    "NorMuon": _contract(_with(NorMuon, lr=0.02)),
    "Scion": _contract(_with(Scion, lr=0.02, radius=1.0, head_radius=1.0)),
    "LARS": _contract(_with(LARS, lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1)),
    "AdamW": _contract(_with(AdamW, lr=0.02)),
    "AdamW, compensated": _contract(_with(AdamW, lr=0.02, rounding="kahan")),
    "SOAP, Muon and AdamW by role": _contract(_mixed, *_BASES),
}
"""A contract for each strategy, and for each way of using it that keeps other state."""
