"""Routes, groupings and hyperparameters without effect are refused."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from structprecond import (
    AdamW,
    AdamWStrategy,
    CheckpointError,
    GroupError,
    HyperparameterError,
    Muon,
    MuonStrategy,
    Routing,
    SOAPStrategy,
    State,
    StepContext,
    Strategy,
    StructPrecondError,
    StructuredOptimizer,
)
from tests.core.routed import MIXED, net, routes_of


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"*.gate": MuonStrategy(), "default": AdamWStrategy()}, r"'\*\.gate' match no param"),
        (
            {"experts": MuonStrategy(), "default": AdamWStrategy()},
            "'experts' match no parameter",
        ),
        (
            {"conv1.*": MuonStrategy(), "conv*": MuonStrategy(), "default": AdamWStrategy()},
            r"Several routes match conv1\.weight: 'conv1\.\*', 'conv\*'",
        ),
        (
            # the pattern takes all convolutions
            {"conv?.*": MuonStrategy(), "conv": SOAPStrategy(), "default": AdamWStrategy()},
            "'conv' match no parameter",
        ),
    ],
)
def test_ignored_and_double_rules_raise(strategy: Any, message: str) -> None:
    model = net()
    with pytest.raises(GroupError, match=message):
        StructuredOptimizer(model, strategy=strategy)
    assert not model._forward_hooks


def test_rules_of_a_param_group_have_to_apply_in_it() -> None:
    model = net()
    optimizer = Muon(model, model.hidden.parameters())
    rules: Any = {"conv": SOAPStrategy(), "default": AdamWStrategy()}
    with pytest.raises(GroupError, match="'conv' match no parameter"):
        optimizer.add_param_group({"params": model.head.parameters(), "strategy": rules})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": model.conv1.parameters(), "strategy": rules})
    assert routes_of(optimizer)["conv1.weight"] == ("soap", "conv")
    assert optimizer.param_groups[1]["soap_precondition_frequency"] == 10


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({}, "from roles, name patterns and 'default'"),
        ({"conv": SOAPStrategy()}, "from roles, name patterns and 'default'"),
        ({1: SOAPStrategy(), "default": SOAPStrategy()}, "from roles"),
        ({"conv": SOAPStrategy, "default": AdamWStrategy()}, "Did you pass the class"),
        ("sgd", "strategy= is 'sgd', expected one of 'adamw', "),
        (3, "strategy= takes an instance of Strategy"),
    ],
)
def test_what_is_no_routing_is_refused(strategy: Any, message: str) -> None:
    with pytest.raises(StructPrecondError, match=message):
        StructuredOptimizer(net(), strategy=strategy)


def test_misspelt_hyperparameters_are_refused() -> None:
    for wrong in ("muon_lr", "adamw_betas", "soap_lrscale", "conv_lr_scale"):
        with pytest.raises(HyperparameterError, match=rf"Unknown hyperparameters \['{wrong}'\]"):
            StructuredOptimizer(net(), strategy=MIXED, hyperparameters={wrong: 0.1})
    model = net()
    with pytest.raises(HyperparameterError, match=r"Unknown keys \['adamw_lr'\].*adamw_lr_scale"):
        Muon(model, [{"params": model.head.parameters(), "adamw_lr": 0.1}])
    with pytest.raises(HyperparameterError, match="soap_betas must be a pair"):
        StructuredOptimizer(net(), strategy=MIXED, hyperparameters={"soap_betas": (1.0, 0.9)})


def test_checkpoints_of_another_routing_are_refused() -> None:
    model = net()
    saved = Muon(model).state_dict()
    with pytest.raises(CheckpointError, match="strategy is"):
        Muon(model, routes={"head": "muon"}).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="strategy is"):
        AdamW(model).load_state_dict(saved)
    hooked = Muon(model, after_weight_update=torch.tanh)
    described = hooked.state_dict()["param_groups"][0]["strategy"]
    assert "tanh" in described
    assert " at 0x" not in described
    Muon(model, after_weight_update=torch.tanh).load_state_dict(hooked.state_dict())


def test_strategies_may_not_share_a_name() -> None:
    class AdamWStrategy(Strategy[State]):
        hyperparameters: ClassVar[Any] = {}

        def init(self, like: Tensor, structures: Any, dtypes: Any) -> State:
            raise NotImplementedError

        def update(self, state: State, grad: Tensor, hp: Any, ctx: StepContext) -> Tensor:
            raise NotImplementedError

    other = type(MIXED["default"])
    with pytest.raises(StructPrecondError, match="Two strategies are called 'adamw'"):
        Routing(AdamWStrategy(), {"conv": other()})


def test_hyperparameters_of_a_group_need_a_parameter_that_reads_them() -> None:
    model = net()
    groups: list[dict[str, Any]] = [
        {"params": [model.hidden.weight], "momentum": 0.5},
        {"params": [model.hidden.bias, *model.norm.parameters()], "momentum": 0.5},
    ]
    with pytest.raises(HyperparameterError, match="given momentum, but its parameters go to AdamW"):
        Muon(model, groups)
    groups[1] = {"params": groups[1]["params"], "adamw_eps": 1e-3, "lr": 1e-3}
    optimizer = Muon(model, groups)
    assert [b.hyperparameters.get("momentum") for b in optimizer.buckets] == [0.5, None, None]
    assert [b.hyperparameters.get("eps") for b in optimizer.buckets] == [None, 1e-3, 1e-3]
