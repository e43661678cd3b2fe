"""The named optimizers: every keyword is shown, documented and takes effect."""

from __future__ import annotations

import inspect
import pydoc
import re
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    KLSOAP,
    SOAP,
    AdamW,
    Muon,
    SIRFShampoo,
    SOAPStrategy,
    StructPrecondError,
    StructuredOptimizer,
)
from structprecond.core.options import CommonOptions, FactorOptions, from_keywords
from structprecond.strategies.auxiliary import AuxiliaryOptions, WithAdamW
from tests.every_strategy import OPTIMIZERS, strategy_of

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
COMMON = {
    "routes",
    "no_decay",
    "combine_params",
    "policies",
    "nonfinite",
    "rounding",
    "maximize",
    "verbose_init",
    "mesh",
}
FACTORS = {"structures", "preconditioner_dtypes", "refresh"}
# keywords that are neither a field nor a hyperparameter of the same name
TRANSLATED = {
    "SOAP": {"merge_dims", "data_format"},
    "SIRFShampoo": {"batch_size", "init"},
    "SOAPMuon": {"whitening", "adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay"},
    "Muon": {"adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay"},
    "NorMuon": {"adamw_lr", "adamw_betas", "adamw_eps", "adamw_weight_decay"},
    "Scion": {"head_radius"},
}


@every_optimizer
def test_every_keyword_is_shown_and_documented(optimizer: Any) -> None:
    shown = inspect.signature(optimizer).parameters
    assert shown.keys() > COMMON
    assert shown.keys() > FACTORS or not FACTORS & shown.keys()
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in shown.values())
    documented = inspect.getdoc(optimizer) or ""
    for name in shown:
        assert documented.count(f"\n    {name}: ") == 1, name
    text = pydoc.plain(pydoc.render_doc(optimizer))
    assert all(re.search(rf"{name}: '[^']+' = ", text) for name in COMMON)


@every_optimizer
def test_every_keyword_goes_somewhere(optimizer: Any) -> None:
    strategy = strategy_of(optimizer)
    used = {field.name for field in fields(strategy)} | set(strategy.hyperparameters)
    used |= COMMON | FACTORS | {"model", "params"} | TRANSLATED.get(optimizer.__name__, set())
    assert not set(inspect.signature(optimizer).parameters) - used


@every_optimizer
def test_misspelt_keywords_are_refused_by_the_name_that_was_meant(optimizer: Any) -> None:
    given = {"lr": 0.1, "roundin": "kahan"}
    with pytest.raises(TypeError, match=rf"{optimizer.__name__} got .*'roundin'.*mean 'rounding'"):
        optimizer(nn.Linear(2, 2), **given)


def test_keywords_of_factors_are_refused_where_there_are_none() -> None:
    with pytest.raises(TypeError, match="AdamW got an unexpected keyword argument 'structures'"):
        AdamW(nn.Linear(2, 2), structures="diagonal")  # type: ignore[call-arg]


@pytest.mark.parametrize("lr", [3e-4, torch.tensor(0.1), "0.1"])
def test_a_learning_rate_by_position_is_refused(lr: Any) -> None:
    with pytest.raises(StructPrecondError, match=r"params= takes .*SOAP\(model, lr=\.\.\.\)"):
        SOAP(nn.Linear(2, 2), lr)


def test_defaults_of_shared_keywords_are_those_of_the_base() -> None:
    base = inspect.signature(StructuredOptimizer.__init__).parameters
    for optimizer in OPTIMIZERS:
        own = inspect.signature(optimizer).parameters
        for name in (COMMON | FACTORS) & own.keys():
            assert own[name].default == base[name].default
            assert own[name].annotation == base[name].annotation


@pytest.mark.parametrize(
    ("declared", "base"),
    [
        (CommonOptions, StructuredOptimizer),
        (FactorOptions, StructuredOptimizer),
        (AuxiliaryOptions, WithAdamW),
    ],
)
def test_declared_types_are_those_of_the_constructor(declared: Any, base: Any) -> None:
    parameters = inspect.signature(base.__init__).parameters
    for name, annotation in declared.__annotations__.items():
        assert parameters[name].annotation == annotation.__forward_arg__


def test_shared_keywords_reach_the_optimizer() -> None:
    p = nn.Parameter(torch.zeros(3, 2))
    optimizer = SOAP(
        [p], maximize=True, rounding="kahan", refresh="staggered", nonfinite="raise",
        structures="diagonal", preconditioner_dtypes=torch.float64,
    )  # fmt: skip
    assert (optimizer.maximize, optimizer.rounding) == (True, "kahan")
    assert (optimizer.refresh, optimizer.nonfinite) == ("staggered", "raise")
    assert optimizer.param_groups[0]["structures"] == "diagonal"
    assert optimizer.param_groups[0]["preconditioner_dtypes"] == torch.float64


@every_optimizer
def test_routes_reach_every_optimizer(optimizer: Any) -> None:
    given = {"lr": 0.1, "routes": {"bias": "lars"}}
    made = optimizer(nn.Linear(2, 2), **given)
    rules = {u.label: r for b in made.buckets for u, r in zip(b.units, b.rules, strict=True)}
    assert rules["bias"] == "bias"
    assert {type(b.strategy).__name__ for b in made.buckets if b.units[0].label == "bias"} == {
        "LARSStrategy"
    }


@every_optimizer
def test_no_decay_reaches_every_optimizer(optimizer: Any) -> None:
    given = {"lr": 0.1, "no_decay": "bias"}
    made = optimizer(nn.Linear(2, 2), **given)
    decays = {u.label: b.key.decays for b in made.buckets for u in b.units}
    assert decays == {"weight": True, "bias": False}


def test_facades_that_inherit_a_constructor_show_its_keywords() -> None:
    assert inspect.signature(KLSOAP) == inspect.signature(KLSOAP.__mro__[1])
    optimizer = KLSOAP(nn.Linear(3, 2), init_factor=0.2)
    assert "clamping: " in (inspect.getdoc(optimizer) or "")


def test_a_subclass_of_the_users_may_take_what_it_likes() -> None:
    class Mine(SOAP):
        """A subclass with a constructor of its own."""

        def __init__(self, model: nn.Module, **settings: Any) -> None:
            super().__init__(model, **settings)

    assert Mine(nn.Linear(2, 2), lr=0.5, maximize=True).param_groups[0]["lr"] == 0.5
    with pytest.raises(TypeError, match="unexpected keyword argument 'lrr'"):
        Mine(nn.Linear(2, 2), lrr=0.5)


def test_keywords_are_split_between_strategy_and_hyperparameters() -> None:
    given = {"self": None, "lr": 0.1, "betas": (0.5, 0.6), "transport": True, "unknown": 1}
    strategy, hyperparameters = from_keywords(SOAPStrategy, given)
    assert strategy == SOAPStrategy(transport=True)
    assert hyperparameters == {"lr": 0.1, "betas": (0.5, 0.6)}


def test_options_of_an_auxiliary_strategy_are_shown_with_their_defaults() -> None:
    parameters = inspect.signature(Muon).parameters
    assert parameters["adamw_betas"].default == (0.9, 0.95)
    assert parameters["routes"].default is None
    assert "batch_size" in inspect.signature(SIRFShampoo).parameters
