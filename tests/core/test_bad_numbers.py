"""What is no number, or too large a number, is refused at construction."""

# mypy: disable-error-code="arg-type,list-item,dict-item"
from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from structprecond import (
    LARS,
    SOAP,
    AdamW,
    GroupError,
    HyperparameterError,
    KLShampoo,
    MergeDims,
    Muon,
    PerParameter,
    Scion,
    Shampoo,
    SIRFShampoo,
    SplitHeads,
    StackExperts,
    StructPrecondError,
    StructuredOptimizer,
    StructureError,
)
from structprecond.structures import structure_class
from tests.every_strategy import OPTIMIZERS, strategy_of
from tests.helpers import assert_refused, net, same_bits, set_grads, snapshot, values

PAIRS: dict[str, Any] = {
    "a set": {0.9, 0.99},
    "a dict": {0.9: 1, 0.99: 2},
    "a tensor": torch.tensor([0.9, 0.99]),
    "tensors": (torch.tensor(0.9), torch.tensor(0.99)),
    "an array": np.array([0.9, 0.99]),
    "arrays": (np.array([0.9]), np.array([0.99])),
    "flags": (False, False),
    "one number": (0.9,),
    "NaN": (0.9, math.nan),
}


@pytest.mark.parametrize("value", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("name", ["betas", "adamw_betas"])
def test_betas_are_a_tuple_or_list_of_two_numbers(name: str, value: Any) -> None:
    make: Any = AdamW if name == "betas" else Muon
    assert_refused(
        lambda model: make(model, **{name: value}),
        rf"{name} must be a pair of numbers from 0 to below 1, as in \(0\.9, 0\.999\), got ",
    )


@pytest.mark.parametrize("value", [(0.5, 0.75), [0.5, 0.75], (np.float32(0.5), np.float64(0.75))])
def test_betas_of_other_kinds_of_numbers_are_the_same(value: Any) -> None:
    ends = []
    for betas in (value, (0.5, 0.75)):
        torch.manual_seed(0)
        model = net()
        optimizer = AdamW(model, lr=0.1, betas=betas)
        for step in range(2):
            set_grads(list(model.parameters()), step)
            optimizer.step()
        ends.append(values(model))
    assert same_bits(*ends)


NO_NUMBERS: dict[str, Any] = {
    "True": True,
    "True of numpy": np.bool_(True),
    "True of torch": torch.tensor(True),
    "an array": np.array([0.5]),
    "an imaginary tensor": torch.tensor(0.5j),
    "too large for a float": 10**400,
    "minus infinity": -math.inf,
}


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("strategy", [strategy_of(make) for make in OPTIMIZERS])
def test_no_hyperparameter_of_any_strategy_takes_flags_arrays_and_overflow(
    strategy: Any, value: Any
) -> None:
    for name, hyperparameter in strategy.hyperparameters.items():
        if isinstance(hyperparameter.default, bool) and isinstance(value, bool | np.bool_):
            continue
        with pytest.raises(HyperparameterError, match=rf"^{name} must be .*, got "):
            StructuredOptimizer(
                net(), strategy=strategy(), hyperparameters={"lr": 0.1, name: value}
            )


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["array", "tensor"])
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(Muon, "momentum"), (Muon, "weight_decay"), (AdamW, "eps"), (SIRFShampoo, "alpha1")],
)
def test_only_the_learning_rate_may_have_an_axis(optimizer: Any, name: str, make: Any) -> None:
    assert_refused(
        lambda model: optimizer(model, **{name: make([0.5])}), rf"{name} must be .*\[0\.5"
    )
    assert optimizer(net(), lr=torch.tensor([0.5])).param_groups[0]["lr"].shape == (1,)


ARGUMENTS: dict[str, tuple[Callable[[nn.Module], Any], type[StructPrecondError], str]] = {
    "clip_rms": (lambda m: SOAP(m, clip_rms=True), HyperparameterError, "clip_rms.*got True"),
    "exponent": (
        lambda m: Shampoo(m, exponent=np.array([0.5])),
        HyperparameterError,
        r"exponent must be a finite number above 0, got array\(\[0\.5\]\)",
    ),
    "init_factor": (
        lambda m: KLShampoo(m, init_factor=True),
        HyperparameterError,
        "init_factor.*got True",
    ),
    "max_precond_dim": (
        lambda m: SOAP(m, max_precond_dim=True),
        HyperparameterError,
        "max_precond_dim.*got True",
    ),
    "radius": (lambda m: Scion(m, radius=True), HyperparameterError, "radius.*got True"),
    "scale": (
        lambda m: Muon(m, extra_scale_factor=True),
        HyperparameterError,
        "extra_scale_factor.*got True",
    ),
    "second lr": (lambda m: Muon(m, adamw_lr=True), HyperparameterError, "adamw_lr.*got True"),
    "dampening": (lambda m: LARS(m, lr=0.1, dampening=True), HyperparameterError, "dampening"),
    "coefficient NaN": (
        lambda m: Muon(m, coefficient_type=[(math.nan, 1.0, 1.0)], num_ns_steps=1),
        StructPrecondError,
        r"triples \(a, b, c\) of finite numbers, got \[\(nan",
    ),
    "coefficient True": (
        lambda m: Muon(m, coefficient_type=[(True, 1.0, 1.0)], num_ns_steps=1),
        StructPrecondError,
        "of finite numbers, got",
    ),
    "interval": (
        lambda m: SOAP(m, precondition_frequency=2**70),
        HyperparameterError,
        r"precondition_frequency must be an integer of at least 1 and below 2\^63.*got 118",
    ),
    "first step": (
        lambda m: Shampoo(m, start_preconditioning_step=2**70),
        StructPrecondError,
        r"start_preconditioning_step must be an integer of at least 1 and below 2\^63",
    ),
    "batch size": (
        lambda m: SIRFShampoo(m, batch_size=2**63),
        HyperparameterError,
        r"batch_size must be an integer of at least 1 and below 2\^63",
    ),
    "Newton-Schulz steps": (
        lambda m: Muon(m, num_ns_steps=2**70),
        StructPrecondError,
        r"steps must be at most 1000, got 118.*polar_factor is exact",
    ),
    "route from a number": (
        lambda m: Muon(m, routes={3: "adamw"}),
        StructPrecondError,
        r"routes must be a dict from roles or name patterns to strategies.*got \{3: ",
    ),
    "route to a list": (
        lambda m: Muon(m, routes={"0.weight": []}),
        StructPrecondError,
        r"instance of Strategy.*got \[\]",
    ),
    "order that is a flag": (
        lambda m: SOAP(m, structures={True: "dense", 2: "dense", 3: "dense"}),
        StructureError,
        r"has the keys \[True\]; keys must be numbers of axes",
    ),
    "number for a structure's name": (
        lambda m: structure_class(3),
        StructureError,
        "name is a text, got 3. Known are dense",
    ),
    "list for a structure's name": (
        lambda m: structure_class([]),
        StructureError,
        r"name is a text, got \[\]",
    ),
    "half a head": (
        lambda m: SplitHeads("0.weight", heads=2.0),
        GroupError,
        r"heads=2\.0, axis=0\): heads must be an integer of at least 1, and axis 0 or 1",
    ),
    "one head": (lambda m: SplitHeads("0.weight", heads=True), GroupError, "heads=True"),
    "text of heads": (lambda m: SplitHeads("0.weight", heads="2"), GroupError, "heads='2'"),
    "axis of heads": (lambda m: SplitHeads("0.weight", 2, axis=True), GroupError, "axis=True"),
    "pattern of heads": (
        lambda m: SplitHeads(3, 2),
        GroupError,
        "pattern is a text with shell wildcards that parameter names match, got 3",
    ),
    "pattern of experts": (lambda m: StackExperts(3), GroupError, "pattern is a text.*got 3"),
    "merged size NaN": (lambda m: MergeDims(math.nan), GroupError, r"max_dim=nan.*finite number"),
    "merged size True": (lambda m: MergeDims(True), GroupError, "max_dim=True"),
    "merged sizes": (lambda m: MergeDims(np.array([1, 2])), GroupError, "max_dim must be"),
}


@pytest.mark.parametrize(("make", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_argument_is_refused(
    make: Callable[[nn.Module], Any], error: type[StructPrecondError], message: str
) -> None:
    model = net()
    with pytest.raises(error, match=f"(?s){message}"):
        make(model)
    assert not model._forward_hooks


@pytest.mark.parametrize("digits", ["99999999999", "9" * 30, "9" * 5000])
@pytest.mark.parametrize("name", ["block{}diagonal", "hierarchical{}_1", "hierarchical1_{}"])
@pytest.mark.parametrize("make", [SIRFShampoo, SOAP])
def test_blocks_whose_entries_have_no_index_are_refused(make: Any, name: str, digits: str) -> None:
    with pytest.raises(StructureError, match=r"number 9{11,20}(\.{3})?, expected at most 2147483"):
        make(net(), structures=name.format(digits))


@pytest.mark.parametrize("name", ["block2147483647diagonal", "hierarchical2147483647_2147483647"])
def test_blocks_longer_than_any_axis_are_the_dense_matrix(name: str) -> None:
    ends = []
    for structures in (name, "dense"):
        torch.manual_seed(0)
        model = net().double()
        optimizer = SIRFShampoo(model, lr=0.1, batch_size=2, structures=structures)
        for step in range(3):
            set_grads(list(model.parameters()), step)
            optimizer.step()
        ends.append(values(model))
    for p, q in zip(*ends, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


FLOAT8 = [dtype for dtype in vars(torch).values() if str(dtype).startswith("torch.float8_")]


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_float8_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(StructPrecondError, match=rf"holds {dtype} for 0\.weight.*Use torch\."):
        SOAP(net(), preconditioner_dtypes={1: None, 2: (None, dtype), 3: None})
    p = nn.Parameter(torch.ones(3, 2).to(dtype), requires_grad=False)
    for make in (SOAP, Muon, AdamW):
        with pytest.raises(GroupError, match=rf"has {dtype}.*expected .* at least 16 bits"):
            make([p])


@pytest.mark.parametrize("make", [AdamW, partial(SIRFShampoo, batch_size=1), Muon])
@pytest.mark.parametrize("bare", [True, False])
def test_group_that_is_no_dict_is_the_error_of_torch(make: Any, bare: bool) -> None:
    model = net()
    optimizer = make(list(model[0].named_parameters()) if bare else model)
    before = snapshot(model, optimizer)
    p = nn.Parameter(torch.ones(2))
    for group in ([p], p, None, (p,), "abc"):
        messages = []
        for o in (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), optimizer):
            with pytest.raises(TypeError, match="param_group must be a dict") as caught:
                o.add_param_group(group)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert same_bits(snapshot(model, optimizer), before)


def test_a_size_of_merged_axes_may_be_a_float() -> None:
    rules = (MergeDims(8.0), PerParameter())
    assert SOAP(net(), combine_params=rules).buckets
