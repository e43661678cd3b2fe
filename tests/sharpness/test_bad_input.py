"""SAM refuses bad input with an error that says what was given, and changes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from structprecond import (
    SAM,
    SOAP,
    HyperparameterError,
    SOAPStrategy,
    StructPrecondError,
)
from tests.helpers import (
    assert_refused,
    same_bits,
)
from tests.sharpness.helpers import one

P = one(1.0)


def _sgd(**group: Any) -> SGD:
    return SGD([{"params": [one(1.0)], **group}], lr=0.1)


class Splitting(SGD):
    """Makes a group of every parameter."""

    def __init__(self, params: Any, lr: float) -> None:
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in params]
        super().__init__([{**g, "params": [p]} for g in groups for p in g["params"]], lr=lr)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "negative rho": (
        lambda: SAM([P], SGD, rho=-0.1), HyperparameterError,
        "rho must be a finite number of at least 0, got -0.1."),
    "infinite rho": (
        lambda: SAM([P], SGD, rho=math.inf), HyperparameterError, "at least 0, got inf."),
    "rho that is not a number": (
        lambda: SAM([P], SGD, rho=math.nan), HyperparameterError, "at least 0, got nan."),
    "rho that is a text": (
        lambda: SAM([P], SGD, rho="0.1"), HyperparameterError,  # type: ignore[arg-type]
        "at least 0, got '0.1'."),
    "rho that is a bool": (
        lambda: SAM([P], SGD, rho=True), HyperparameterError, "at least 0, got True."),
    "rho that is a tensor": (
        lambda: SAM([P], SGD, rho=torch.ones(2)), HyperparameterError,  # type: ignore[arg-type]
        "at least 0, got tensor"),
    "adaptive": (
        lambda: SAM([P], SGD, adaptive=1), HyperparameterError,  # type: ignore[arg-type]
        "adaptive must be True or False, got 1."),
    "rho of a group": (
        lambda: SAM([{"params": [P], "rho": -1}], SGD), HyperparameterError,
        "rho must be a finite number of at least 0, got -1."),
    "adaptive of a group": (
        lambda: SAM([{"params": [P], "adaptive": "no"}], SGD), HyperparameterError,
        "adaptive must be True or False, got 'no'."),
    "rho of an instance's group": (
        lambda: SAM(None, _sgd(rho=-2)), HyperparameterError, "at least 0, got -2."),
    "base that is a function": (
        lambda: SAM([P], lambda params: SGD(params)), StructPrecondError,  # type: ignore[arg-type]
        "base_optimizer takes an optimizer or its class, got <function"),
    "base that is another class": (
        lambda: SAM([P], nn.Linear), StructPrecondError,  # type: ignore[arg-type]
        "base_optimizer takes an optimizer or its class, got <class"),
    "base that is a name": (
        lambda: SAM([P], "sgd"), StructPrecondError,  # type: ignore[arg-type]
        "got 'sgd'. Pass the class, as in SAM(params, torch.optim.SGD, lr=0.1)."),
    "class without params": (
        lambda: SAM(None, SGD, lr=0.1), StructPrecondError,
        "params is None, but the base optimizer is a class."),
    "instance and params": (
        lambda: SAM([P], _sgd()), StructPrecondError,
        "base_optimizer is an instance of SGD with its own parameters, but params is a list."),
    "instance and keywords": (
        lambda: SAM(None, _sgd(), lr=0.1, rho=0.1), StructPrecondError,
        "base_optimizer is an instance of SGD, which cannot take the arguments ['lr']."),
    "a tensor": (
        lambda: SAM(P, SGD), StructPrecondError,
        "params takes parameters, named parameters, group dicts or a model, got a Parameter."),
    "a number": (
        lambda: SAM(3, SGD), StructPrecondError, "got a int."),  # type: ignore[arg-type]
    "SAM around SAM": (
        lambda: SAM(None, SAM([P], SGD)), StructPrecondError, "base_optimizer is a SAM, expected"),
    "SAM around the class SAM": (
        lambda: SAM([P], SAM), StructPrecondError, "base_optimizer is a SAM, expected"),
    "base with a rho of its own": (
        lambda: SAM([P], torch.optim.Adadelta), StructPrecondError,
        "Adadelta has hyperparameters ['rho'], as SAM does"),
    "base that makes groups of its own": (
        lambda: SAM([{"params": [P, one(1.0)], "rho": 1}], Splitting, lr=0.1), StructPrecondError,
        "Splitting made 2 param groups from 1"),
    "unknown keyword": (
        lambda: SAM([P], SGD, momentom=0.9), TypeError, "momentom"),
    "unknown keyword of a structured base": (
        lambda: SAM([P], SOAP, epsilon=0.9), TypeError, "epsilon"),
    "keyword of a structured base in its group": (
        lambda: SAM([{"params": [P], "rounding": "kahan"}], SOAP), HyperparameterError, "rounding"),
    "no parameters": (
        lambda: SAM([], SGD), ValueError, "empty parameter list"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    make, error, message = BAD[case]
    with pytest.raises(error, match=re.escape(message)):
        make()
    assert P.tolist() == [1.0]


def test_splitting_base_gets_the_defaults() -> None:
    sam = SAM([P, one(2.0)], Splitting, rho=0.3, lr=0.1)
    assert [g["rho"] for g in sam.param_groups] == [0.3, 0.3]


def test_bad_instance_is_left_as_it_was() -> None:
    groups: list[dict[str, Any]] = [{"params": [one(1.0)]}, {"params": [one(2.0)], "rho": -1}]
    base = SGD(groups, lr=0.1)
    before = base.state_dict()
    with pytest.raises(HyperparameterError, match="rho must be"):
        SAM(None, base)
    assert same_bits(base.state_dict(), before)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"params": [one(2.0)], "rho": -1}, "rho must be a finite number of at least 0, got -1."),
        ({"params": [one(2.0)], "adaptive": None}, "adaptive must be True or False, got None."),
        ([one(2.0)], "A param group is a dict with 'params', got [Parameter"),
        ({"params": [P]}, "some parameters appear in more than one parameter group"),
    ],
)
def test_bad_group_is_not_added(group: Any, message: str) -> None:
    sam = SAM([P], SGD, lr=0.1)
    with pytest.raises(ValueError, match=re.escape(message)):
        sam.add_param_group(group)
    assert [g["params"] for g in sam.param_groups] == [[P]]


# --- around a structured base --------------------------------------------------------------------


STRUCTURED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a name for the base": (
        lambda m: SAM(m, "soap"),  # type: ignore[arg-type]
        "takes an optimizer or its class.*got 'soap'",
    ),
    "a strategy for the base": (lambda m: SAM(m, SOAPStrategy()), "takes an optimizer"),  # type: ignore[arg-type]
    "no parameters": (lambda m: SAM(None, SOAP), "params is None"),
    "parameters twice": (lambda m: SAM(m, SOAP(m)), "with its own parameters, but params is"),
    "SAM around SAM": (lambda m: SAM(None, SAM(m, SOAP)), "base_optimizer is a SAM"),
    "rho": (lambda m: SAM(m, SOAP, rho=-1.0), r"rho must be.*got -1\.0"),
    "a hyperparameter of the base": (lambda m: SAM(m, SOAP, lr=-1.0), r"lr must be.*got -1\.0"),
    "a step without a closure": (lambda m: SAM(m, SOAP).step(), "no first step is pending"),
}


@pytest.mark.parametrize(("make", "message"), STRUCTURED.values(), ids=STRUCTURED)
def test_sam_refuses_and_leaves_the_model_alone(
    make: Callable[[nn.Module], Any], message: str
) -> None:
    assert_refused(make, message)
