"""Unusable parameters and param groups are refused, as in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    SOAP,
    AdamW,
    FlattenEmbedding,
    GroupError,
    LinearWeightBias,
    Muon,
    PerParameter,
    PreconditionerGroup,
    SIRFShampoo,
    SOAPStrategy,
    SplitHeads,
    StructPrecondError,
)
from tests.helpers import net, same_bits, snapshot, values


@pytest.mark.parametrize("rule", [LinearWeightBias(), FlattenEmbedding(), SplitHeads("*", 1)])
def test_rule_that_needs_modules_refuses_plain_parameters(rule: PreconditionerGroup) -> None:
    with pytest.raises(GroupError, match=rf"(?s){type(rule).__name__}.*modules.*first argument"):
        SIRFShampoo(net().parameters(), combine_params=(rule, PerParameter()), batch_size=1)


def test_counting_needs_the_model() -> None:
    with pytest.raises(StructPrecondError, match=r"first argument.*batch_size="):
        SIRFShampoo(net().parameters())


def test_params_need_the_model_first() -> None:
    model = net()
    with pytest.raises(StructPrecondError, match="Pass the model first"):
        SIRFShampoo(model.parameters(), list(model.parameters()))


def _used_up(model: nn.Module) -> Any:
    params = model.parameters()
    list(params)
    return params


def _two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}, {"params": next(model.parameters())}]


PARAMS: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "nothing": (lambda m: [], ValueError, "empty parameter list"),
    "no parameters of a model": (lambda m: nn.Tanh().parameters(), ValueError, "empty param"),
    "a generator that is used up": (_used_up, ValueError, "empty parameter list"),
    "a parameter in two groups": (_two_groups, ValueError, "more than one parameter group"),
    "a parameter twice in a group": (
        lambda m: [*m.parameters(), next(m.parameters())],
        UserWarning,
        "duplicate parameters",
    ),
    "a set in a group": (
        lambda m: [{"params": set(m.parameters())}],
        TypeError,
        "ordered collections.*use a list",
    ),
    "a parameter alone": (lambda m: next(m.parameters()), TypeError, "should be an iterable of"),
    "a number": (lambda m: 3, TypeError, "not iterable"),
    "a text": (lambda m: "abc", TypeError, "only optimize Tensors.*str"),
    "numbers": (lambda m: [1, 2], TypeError, "only optimize Tensors.*int"),
    "modules": (lambda m: [nn.Linear(2, 2)], TypeError, "only optimize Tensors.*Linear"),
    "the class of a model": (lambda m: nn.Linear, TypeError, "not iterable"),
    "a group as a dict": (
        lambda m: {"params": list(m.parameters())},
        TypeError,
        "only optimize Tensors.*str",
    ),
    "a group without params": (lambda m: [{"lr": 0.1}], KeyError, "params"),
    "names for some": (
        lambda m: [("a", next(m.parameters())), *list(m.parameters())[1:]],
        ValueError,
        "with/without names",
    ),
    "results": (lambda m: [2 * next(m.parameters())], ValueError, "non-leaf"),
}


# Muon is given parameters without names
roles_are_guessed = pytest.mark.filterwarnings("ignore:Muon routes parameters by their roles")


@roles_are_guessed
@pytest.mark.parametrize("cls", [AdamW, SOAP, Muon])
@pytest.mark.parametrize(("params", "error", "message"), PARAMS.values(), ids=PARAMS)
def test_parameters_are_refused_as_torch_does(
    params: Callable[[nn.Module], Any], error: type[Exception], message: str, cls: Any
) -> None:
    model = net()
    before = values(model)
    with pytest.raises(error, match=message):
        torch.optim.SGD(params(model), lr=0.1)
    with pytest.raises(error, match=message):
        cls(params(model), lr=0.1)
    assert same_bits(values(model), before)
    assert not model._forward_hooks


@roles_are_guessed
@pytest.mark.parametrize("cls", [AdamW, SOAP, Muon])
def test_group_that_is_refused_is_not_added(cls: Any) -> None:
    model = net()
    optimizer = cls(model[0].parameters(), lr=0.1)
    for damage in (
        {"params": list(model[0].parameters())},
        {"params": set(model[1].parameters())},
        {"params": list(model[1].parameters()), "lr": -1.0},
        {"params": list(model[1].parameters()), "rounding": "kahan"},
        {"params": list(model[1].parameters()), "strategy": SOAPStrategy},
        {"params": list(model[1].parameters()), "structures": "dence"},
        {"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]},
    ):
        before = snapshot(model, optimizer)
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(damage)
        assert same_bits(snapshot(model, optimizer), before)
        assert len(optimizer.param_groups) == 1
        assert set(optimizer.state) == set(model[0].parameters())


def test_parameter_in_two_groups_of_a_model_is_an_error_as_in_torch() -> None:
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model.parameters()}]
    with pytest.raises(ValueError, match="more than one parameter group"):
        SIRFShampoo(model, groups)
    assert not model._forward_hooks
