"""Wrong or unknown hyperparameters are refused, by every strategy."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch

from structprecond import (
    HyperparameterError,
    SIRFShampoo,
    StructuredOptimizer,
)
from tests.every_strategy import OPTIMIZERS, strategy_of
from tests.helpers import net, same_bits, values

STRATEGIES = tuple(map(strategy_of, OPTIMIZERS))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_misspelt_keyword_is_a_type_error(cls: Any) -> None:
    model = net()
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta_2'"):
        cls(model, lr=0.1, beta_2=0.1)
    assert not model._forward_hooks


NO_NUMBERS: dict[str, Any] = {
    "NaN": math.nan,
    "infinity": math.inf,
    "None": None,
    "a text": "0.1",
    "two numbers": torch.ones(2),
    "three numbers": (0.1, 0.2, 0.3),
    "a complex number": 1j,
    "a list": [],
}


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_hyperparameter_of_any_strategy_takes_what_is_no_number(
    strategy: Any, value: Any
) -> None:
    model = net()
    before = values(model)
    lr = {"lr": 0.1}  # one strategy has no default
    last = model[2].parameters()
    optimizer = StructuredOptimizer(model, last, strategy=strategy(), hyperparameters=lr)
    groups = copy.copy(optimizer.param_groups)
    for name in strategy.hyperparameters:
        if name == "grafting_beta2" and value is None:
            continue  # its default
        message = rf"^{name} must be .*, got {re.escape(repr(value))}\.$"
        given = {**lr, name: value}
        with pytest.raises(HyperparameterError, match=message):
            StructuredOptimizer(model, strategy=strategy(), hyperparameters=given)
        with pytest.raises(HyperparameterError, match=message):
            optimizer.add_param_group({"params": list(model[0].parameters()), name: value})
    assert optimizer.param_groups == groups
    assert len(optimizer.state) == 2
    assert same_bits(values(model), before)
    assert not model._forward_hooks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unknown_hyperparameters_are_listed_with_those_that_exist(strategy: Any) -> None:
    for given in ({"beta_2": 0.1}, [("beta_2", 0.1)]):
        with pytest.raises(HyperparameterError, match=r"beta_2.*Known are .*lr.*"):
            StructuredOptimizer(net(), strategy=strategy(), hyperparameters=given)  # type: ignore[arg-type]


def test_hyperparameters_of_torch_optimizers_are_refused_not_ignored() -> None:
    for key in ("momentum", "betas", "eps", "nesterov", "maximize"):
        with pytest.raises(HyperparameterError, match=key):
            SIRFShampoo(net(), [{"params": list(net().parameters())[:0], key: 0.5}])
