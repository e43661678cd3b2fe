"""A failing step or batch size says what to do, and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    SOAP,
    GradientError,
    HyperparameterError,
    SIRFShampoo,
    StructPrecondError,
)
from tests.helpers import mlp, net, same_bits, set_grads, snapshot


def test_unknown_batch_size_raises_at_the_step_and_changes_nothing() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    set_grads(list(model.parameters()), 0)  # no forward pass
    before = snapshot(model, optimizer)
    with pytest.raises(StructPrecondError, match=r"SIRFShampooStrategy needs the batch size.*="):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)
    optimizer.batch_size = 6
    optimizer.step()
    assert optimizer.global_step == 1


def test_unknown_batch_size_does_not_count_the_step_as_skipped() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    set_grads(list(model.parameters()), 0)
    model[0].bias.grad[0] = torch.nan
    with pytest.raises(StructPrecondError, match="needs the batch size"):
        optimizer.step()
    assert optimizer.skipped == 0


def test_sparse_gradient_raises_names_the_parameter_and_changes_nothing() -> None:
    model = nn.ModuleDict(
        {"words": nn.Embedding(5, 3, sparse=True), "head": nn.Linear(3, 2)}
    ).double()
    optimizer = SIRFShampoo(model, batch_size=4)
    model["head"](model["words"](torch.tensor([0, 2, 2, 4]))).sum().backward()
    before = snapshot(model, optimizer)
    with pytest.raises(GradientError, match=r"words\.weight.*sparse"):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)


def _grad(bad: float) -> Callable[[Any, Any], None]:
    def damage(model: Any, optimizer: Any) -> None:
        model[2].weight.grad[0, 0] = bad

    return damage


def _sparse(model: Any, optimizer: Any) -> None:
    model[2].weight.grad = model[2].weight.grad.to_sparse()


def _unknown_name(model: Any, optimizer: Any) -> None:
    entry = optimizer.state[model[2].weight]
    optimizer.state[model[2].weight] = {**entry, "momentum": torch.ones(())}


def _misshapen(model: Any, optimizer: Any) -> None:
    entry = optimizer.state[model[2].weight]
    optimizer.state[model[2].weight] = {**entry, "step": torch.ones(3)}


def _failing_interval(model: Any, optimizer: Any) -> None:
    def interval(step: int) -> bool:
        raise LookupError(f"no schedule for step {step}")

    optimizer.param_groups[0]["precondition_frequency"] = interval


STEPS: dict[str, tuple[Callable[[Any, Any], None], Any, type[Exception], str]] = {
    "NaN": (_grad(math.nan), None, GradientError, r"2\.weight.*not finite.*nothing was changed"),
    "infinity": (_grad(math.inf), None, GradientError, r"2\.weight.*not finite"),
    "a sparse gradient": (_sparse, None, GradientError, r"2\.weight.*sparse_coo.*sparse=False"),
    "an unknown name in the state": (_unknown_name, None, StructPrecondError, r"2\.weight.*'mom"),
    "a misshapen entry": (_misshapen, None, StructPrecondError, r"2\.weight.*'step': \(3,\)"),
    "an interval that raises": (_failing_interval, None, LookupError, "no schedule for step 3"),
    "a number for a closure": (lambda m, o: None, 3, TypeError, "'int' object is not callable"),
    "a loss for a closure": (
        lambda m, o: None, torch.ones(()), TypeError, "'Tensor' object is not callable"
    ),
    "a closure with arguments": (
        lambda m, o: None, lambda batch: 0.0, TypeError, "missing 1 required positional argument"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "closure", "error", "message"), STEPS.values(), ids=STEPS)
def test_step_raises_and_changes_nothing(
    damage: Callable[[Any, Any], None], closure: Any, error: type[Exception], message: str
) -> None:
    model = mlp()
    optimizer = SOAP(model, precondition_frequency=1, nonfinite="raise")
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    set_grads(list(model.parameters()), 3)
    before = snapshot(model, optimizer)
    frequency = optimizer.param_groups[0]["precondition_frequency"]
    damage(model, optimizer)
    with pytest.raises(error, match=f"(?s){message}"):
        optimizer.step(closure)
    optimizer.param_groups[0]["precondition_frequency"] = frequency
    now = snapshot(model, optimizer)
    for key in ("params", "stacks", "groups", "counters"):
        assert same_bits(now[key], before[key]), key


@pytest.mark.parametrize("value", [0, -3, True, 2.0, "8", None])
def test_assigning_a_bad_batch_size_keeps_the_old_one(value: Any) -> None:
    model = net()
    optimizer = SIRFShampoo(model, batch_size=4)
    counting = SIRFShampoo(model)
    for o in (optimizer, counting):
        with pytest.raises(HyperparameterError, match="batch_size must be"):
            o.batch_size = value
    assert optimizer.batch_size == 4
    assert len(model._forward_hooks) == 1


def test_measure_that_fails_says_what_to_do() -> None:
    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, texts: list[str]) -> Tensor:
            return self.weight * len(texts)

    model = Texts()
    SIRFShampoo(model, batch_size=1)
    optimizer = SIRFShampoo(model)
    with pytest.raises(StructPrecondError, match="batch_size="):
        model(["a", "b"])
    optimizer.batch_size = lambda inputs: len(inputs[0])
    model(["a", "b"]).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 2
