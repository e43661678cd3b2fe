"""The strategies of this library, with the settings under which they are tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.policies import MatchRMS
from structprecond.groups import LinearWeightBias, PerParameter
from structprecond.strategies.adamw import AdamW, AdamWStrategy
from structprecond.strategies.kl import KLSOAP, KLShampoo
from structprecond.strategies.lars import LARS
from structprecond.strategies.muon import Muon, MuonStrategy, NorMuon
from structprecond.strategies.psgd import PSGDKron
from structprecond.strategies.scion import Scion
from structprecond.strategies.shampoo import Shampoo
from structprecond.strategies.sirf import SIRFShampoo
from structprecond.strategies.soap import SOAP, SOAPStrategy
from structprecond.strategies.soap_muon import SOAPMuon
from structprecond.testing.cells import NO_STRUCTURE, STRUCTURES
from structprecond.testing.strategies import StrategyContract


def every_fourth(step: int) -> bool:
    """Return whether a step is the third of four: an interval that is a callable."""
    return step % 4 == 2


@dataclass(frozen=True)
class Usage:
    """A strategy, and a way of using it.

    Args:
        optimizer: Its optimizer.
        settings: The arguments of the optimizer.
        structures: The structures that the strategy can use, one name of each kind.
        refusal: Why it cannot use the others.
        conformance: Whether it has the full contract, and rows in `docs/conformance.md`.
        protocol: Whether the tests that treat all strategies alike, in `tests/`, try it. Their
            gradients come from nowhere, so it may not depend on a counted batch size.
        saved_as: The name that it has in `tests/data/checkpoint_v1.pt`, if it is saved there. What
            a strategy refuses to load another value of has to stay as it is; hyperparameters come
            from the file.
    """

    optimizer: Callable[..., StructuredOptimizer]
    settings: Mapping[str, Any]
    structures: Sequence[str] = (NO_STRUCTURE,)
    refusal: str = StrategyContract.refusal
    conformance: bool = True
    protocol: bool = True
    saved_as: str | None = None

    def make(self, model: nn.Module, **overrides: Any) -> StructuredOptimizer:
        """Return an optimizer of the model, with some arguments replaced."""
        return self.optimizer(model, **{**self.settings, **overrides})

    def contract(self) -> type[StrategyContract]:
        """Return the contract of the strategy as it is used here."""
        members = {
            "make": staticmethod(self.make),
            "structures": tuple(self.structures),
            "refusal": self.refusal,
        }
        return type("Contract", (StrategyContract,), members)


_SAVED_STRUCTURES: Any = {
    1: "diagonal",
    2: ("hierarchical2_1", "block2diagonal"),
    3: ("triltoeplitz", "none", "dense"),
    4: ("triutoeplitz", "trilbottomrightdiag", "none", "dense"),
}
_BLOCKS: Any = {1: "none", 2: ("dense", "block3diagonal"), 4: "dense"}
_JOINT = (LinearWeightBias(), PerParameter())
_WITH_ROOTS = ("dense", "diagonal", "block2diagonal", "none")

_any_structure = partial(Usage, structures=STRUCTURES)
_with_bases = partial(Usage, structures=_WITH_ROOTS, refusal="no eigenbasis")
_with_roots = partial(Usage, structures=_WITH_ROOTS, refusal="no inverse root")

STRATEGIES: dict[str, Usage] = {
    "SIRFShampoo": _any_structure(SIRFShampoo, {"lr": 0.02, "T": 2}, protocol=False),
    "SIRFShampoo by a callable": _any_structure(
        SIRFShampoo,
        {"lr": 0.02, "T": every_fourth, "batch_size": 4, "combine_params": _JOINT},
        protocol=False,
    ),
    "SIRFShampoo, batch size given": _any_structure(
        SIRFShampoo, {"lr": 0.05, "T": 2, "batch_size": 4}, conformance=False
    ),
    "SIRFShampoo, many structures": _any_structure(
        SIRFShampoo,
        {"lr": 0.05, "T": 2, "batch_size": 4, "structures": _SAVED_STRUCTURES},
        conformance=False,
        protocol=False,
        saved_as="SIRFShampoo",
    ),
    "SIRFShampoo joint": _any_structure(
        SIRFShampoo,
        {"lr": 0.05, "batch_size": 4, "combine_params": _JOINT, "structures": "dense"},
        conformance=False,
        protocol=False,
        saved_as="SIRFShampoo joint",
    ),
    "SOAP": _with_bases(SOAP, {"lr": 0.02, "precondition_frequency": 3}, saved_as="SOAP"),
    "SOAP by a callable": _with_bases(
        SOAP,
        {"lr": 0.02, "precondition_frequency": every_fourth, "precondition_1d": True},
        protocol=False,
    ),
    "SOAP staggered, options": _with_bases(
        SOAP,
        {
            "lr": 0.02,
            "precondition_frequency": 3,
            "refresh": "staggered",
            "skip_first": False,
            "transport": True,
            "clip_rms": 2.0,
        },
        protocol=False,
    ),
    "SOAP staggered": _with_bases(
        SOAP,
        {"lr": 0.02, "precondition_frequency": 3, "refresh": "staggered"},
        conformance=False,
    ),
    "SOAP staggered joint": _with_bases(
        SOAP,
        {"precondition_frequency": 2, "refresh": "staggered", "combine_params": _JOINT},
        conformance=False,
        protocol=False,
        saved_as="SOAP staggered",
    ),
    "SOAP options": _with_bases(
        SOAP,
        {
            "lr": 0.02,
            "precondition_frequency": 2,
            "skip_first": False,
            "transport": True,
            "clip_rms": 2.0,
        },
        conformance=False,
    ),
    "SOAP blocks": _with_bases(
        SOAP, {"lr": 0.02, "structures": _BLOCKS, "precondition_1d": True}, conformance=False
    ),
    "SOAP merged": _with_bases(
        SOAP, {"lr": 0.02, "merge_dims": True, "max_precond_dim": 12}, conformance=False
    ),
    "KLShampoo": _with_bases(
        KLShampoo, {"lr": 0.01, "precondition_frequency": 3}, saved_as="KLShampoo"
    ),
    "KLSOAP": _with_bases(
        KLSOAP, {"lr": 0.01, "precondition_frequency": 3}, protocol=False, saved_as="KLSOAP"
    ),
    "KLSOAP blocks": _with_bases(
        KLSOAP,
        {"lr": 0.01, "precondition_frequency": 3, "structures": _BLOCKS},
        conformance=False,
    ),
    "KLShampoo as published": _with_bases(
        KLShampoo,
        {
            "lr": 0.01,
            "precondition_frequency": 3,
            "init_factor": 0.1,
            "shampoo_beta": -1,
            "policies": (),
        },
        conformance=False,
    ),
    "SIRFShampoo from the first gradient": _any_structure(
        SIRFShampoo,
        {
            "lr": 0.02,
            "beta2": 0.3,
            "lam": 2e-4,
            "batch_size": 4,
            "init": "gradient",
            "policies": (MatchRMS(0.5),),
        },
        protocol=False,
    ),
    "Shampoo": _with_roots(
        Shampoo,
        {"lr": 0.02, "precondition_frequency": 3, "start_preconditioning_step": 2},
    ),
    "Shampoo from the first step": _with_roots(
        Shampoo,
        {"lr": 0.02, "precondition_frequency": 3},
        conformance=False,
        protocol=False,
        saved_as="Shampoo",
    ),
    "Shampoo, coupled Newton": _with_roots(
        Shampoo,
        {
            "lr": 0.02,
            "precondition_frequency": 3,
            "root": "coupled_newton",
            "exponent": 0.5,
            "eps": 1e-4,
            "grafting": "rmsprop",
        },
        protocol=False,
    ),
    "Shampoo, Denman-Beavers": _with_roots(
        Shampoo,
        {
            "lr": 0.02,
            "precondition_frequency": 3,
            "root": "newton_db",
            "exponent": 0.5,
            "eps": 1e-4,
            "grafting": "sgd",
            "refresh": "staggered",
        },
        protocol=False,
    ),
    "Shampoo staggered": _with_roots(
        Shampoo,
        {
            "lr": 0.02,
            "precondition_frequency": 4,
            "refresh": "staggered",
            "grafting": "rmsprop",
        },
        conformance=False,
    ),
    "Shampoo joint": _with_roots(
        Shampoo, {"lr": 0.02, "grafting": "sgd", "combine_params": _JOINT}, conformance=False
    ),
    "PSGDKron": Usage(
        PSGDKron,
        {"lr": 0.01, "precondition_frequency": 2},
        structures=("dense", "diagonal", "none"),
        refusal="neither dense nor diagonal",
    ),
    "Muon": Usage(Muon, {"lr": 0.02, "nesterov": True}, saved_as="Muon"),
    "Muon l2": Usage(
        Muon,
        {"lr": 0.02, "weight_decay_method": "l2", "after_weight_update": torch.tanh},
        conformance=False,
    ),
    "NorMuon": Usage(NorMuon, {"lr": 0.02}, saved_as="NorMuon"),
    "SOAPMuon": _with_bases(SOAPMuon, {"lr": 0.02, "precondition_frequency": 3}),
    "SOAPMuon by KL-Shampoo": _with_bases(
        SOAPMuon,
        {"lr": 0.02, "whitening": "kl", "precondition_frequency": 2, "refresh": "staggered"},
        protocol=False,
    ),
    "Scion": Usage(Scion, {"lr": 0.02, "radius": 1.0, "head_radius": 1.0}, saved_as="Scion"),
    "LARS": Usage(
        LARS,
        {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1},
        saved_as="LARS",
    ),
    "AdamW": Usage(AdamW, {"lr": 0.02}, saved_as="AdamW"),
    "AdamW, compensated": Usage(AdamW, {"lr": 0.02, "rounding": "kahan"}, protocol=False),
    "SOAP, Muon and AdamW by role": _with_bases(
        StructuredOptimizer,
        {
            "strategy": {
                "conv": SOAPStrategy(),
                "matrix": MuonStrategy(),
                "default": AdamWStrategy(),
            },
            "hyperparameters": {"lr": 0.02, "soap_precondition_frequency": 3},
        },
        protocol=False,
    ),
}
"""Each strategy, and each way of using it that keeps other state or takes another path."""

CONTRACTS = {name: usage.contract() for name, usage in STRATEGIES.items() if usage.conformance}
"""The contracts of those that `docs/conformance.md` is about."""
