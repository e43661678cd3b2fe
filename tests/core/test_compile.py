"""Compiled models and steps, and other tools of torch around an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo  # else `torch.compile` imports it while a test checks warnings
from torch import nn
from torch.amp import GradScaler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from structprecond import SIRFShampoo, StructPrecondError, describe
from tests.every_strategy import MAKERS, Make, every_strategy
from tests.helpers import (
    SETTINGS,
    assert_close,
    backward,
    data,
    mlp,
    same_bits,
    set_grads,
    snapshot,
    values,
)

STEPS = 13
dynamo_looks_at_gradients = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """Clear compiled code, since torch limits the number of versions per function."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def _train(model: Any, optimizer: Any, called: Any, step: Any) -> None:
    """Train with gradients from another handle of the model."""
    for i in range(STEPS):
        optimizer.zero_grad()
        backward(called, i)
        step()


# --- torch.compile -------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_model_trains_as_the_model_itself(make: Make, backend: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    compiled: Any = torch.compile(twin, backend=backend)
    _train(model, optimizer, model, optimizer.step)
    _train(twin, other, compiled, other.step)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_close(values(twin), values(model), 1e-9)


@every_strategy
def test_optimizer_of_a_compiled_model_knows_its_parameters(make: Make) -> None:
    compiled: Any = torch.compile(mlp(), backend="eager")
    optimizer, plain = make(compiled), make(mlp())
    assert [b.key for b in optimizer.buckets] == [b.key for b in plain.buckets]
    strategies = [row.strategy for row in describe(optimizer).rows]
    assert strategies == [row.strategy for row in describe(plain).rows]
    _train(compiled, optimizer, compiled, optimizer.step)
    assert all(p.isfinite().all() for p in compiled.parameters())


@every_strategy
def test_compiled_step_is_the_step(make: Make) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    step = torch.compile(other.step, backend="eager")
    frames = []
    for i in range(STEPS):
        for m in (model, twin):
            set_grads(list(m.parameters()), i)
        optimizer.step()
        step()
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
        assert same_bits(values(twin), values(model)), f"step {i}"
    assert same_bits(other.state_dict(), optimizer.state_dict())
    assert frames[1:] == frames[1:2] * (STEPS - 1), "compiled again and again"


@dynamo_looks_at_gradients
def test_compiled_training_step_trains_alike() -> None:
    """Forward, backward and step in one compiled function, as in tutorials."""
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = SIRFShampoo(model, T=2, **SETTINGS), SIRFShampoo(twin, T=2, **SETTINGS)

    def step(model: nn.Module, optimizer: SIRFShampoo, i: int) -> None:
        optimizer.zero_grad()
        backward(model, i)
        optimizer.step()

    compiled: Any = torch.compile(step, backend="eager")
    for i in range(STEPS):
        step(model, optimizer, i)
        compiled(twin, other, i)
    assert other.batch_size == optimizer.batch_size == 6
    assert_close(values(twin), values(model), 1e-9)


@dynamo_looks_at_gradients
def test_batch_size_is_counted_in_models_whose_backward_is_compiled() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    compiled: Any = torch.compile(model, backend="aot_eager")
    for samples in (6, 6, 4, 9):
        optimizer.zero_grad()
        backward(compiled, 0, samples=samples)
        optimizer.step()
        assert optimizer.batch_size == samples


# --- tools of torch ------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["mean", "ema"])
def test_averaged_model_follows_and_leaves_training_alone(make: Make, average: Any) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = make(model), make(twin)
    averaged = AveragedModel(twin, multi_avg_fn=average)
    expected: list[Any] = []
    for i in range(5):
        for m, o in ((model, optimizer), (twin, other)):
            set_grads(list(m.parameters()), i)
            o.step()
        averaged.update_parameters(twin)
        now = values(model)
        if not expected:
            expected = now
        elif average is None:
            expected = [e + (p - e) / (i + 1) for e, p in zip(expected, now, strict=True)]
        else:
            expected = [0.9 * e + 0.1 * p for e, p in zip(expected, now, strict=True)]
    assert same_bits(values(twin), values(model))
    assert_close(values(averaged.module), expected, 1e-12)


def test_forward_passes_of_an_averaged_model_are_not_counted() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    averaged = AveragedModel(model)
    for i in range(3):
        optimizer.zero_grad()
        backward(model, i)
        averaged(torch.ones(50, 3, dtype=torch.float64))
        optimizer.step()
        averaged.update_parameters(model)
        assert optimizer.batch_size == 6


def test_batch_size_of_a_step_that_a_scaler_skips_is_not_added_to_the_next() -> None:
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    optimizer, reference = SIRFShampoo(model, **SETTINGS), SIRFShampoo(twin, **SETTINGS)
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1000)
    for i, samples in enumerate((6, 4, 8, 5)):
        optimizer.zero_grad()
        x, y = data(i, samples, torch.float32)
        scaler.scale((model(x) - y).square().sum(1).mean()).backward()
        if i == 1:
            model[0].bias.grad[0] = torch.inf
        else:
            reference.zero_grad()
            backward(twin, i, samples)
            reference.step()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.batch_size == samples
    assert (optimizer.global_step, optimizer.skipped) == (3, 0)
    assert_close(values(model), values(twin), 1e-5)


@every_strategy
def test_maximizing_is_minimizing_with_the_opposite_gradients(make: Make) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, other = make(model, maximize=True), make(twin)
    for i in range(8):
        for m, sign in ((model, -1), (twin, 1)):
            set_grads(list(m.parameters()), i)
            for p in m.parameters():
                p.grad *= sign
        optimizer.step()
        other.step()
    assert same_bits(values(model), values(twin))


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_converted_after_construction_goes_on_with_its_state(
    make: Make, dtype: torch.dtype
) -> None:
    model = mlp()
    optimizer = make(model)
    for i in range(8):
        if i == 4:
            model.to(dtype)
            before = values(model)
        set_grads(list(model.parameters()), i)
        optimizer.step()
    assert optimizer.global_step == 8
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.dtype == dtype
        assert p.isfinite().all()
        assert not torch.equal(p, old)
    assert {int(s) for b in optimizer.buckets for s in b.counters.step} <= {7, 8}


@every_strategy
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_converted_model_is_refused_where_its_precision_matters(make: Make, rounding: str) -> None:
    model = mlp()
    optimizer = make(model, rounding=rounding)
    for i in range(3):
        set_grads(list(model.parameters()), i)
        optimizer.step()
    model.bfloat16()
    set_grads(list(model.parameters()), 3)
    before = snapshot(model, optimizer)
    with pytest.raises(StructPrecondError, match=r"from torch\.float64.*0\.weight.*first"):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)
    model.double()
    optimizer.step()
    assert optimizer.global_step == 4


@every_strategy
def test_learning_rate_in_a_tensor_may_be_scheduled_under_a_compiled_step(make: Make) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    rate = torch.tensor(0.01, dtype=torch.float64)
    optimizer, other = make(model, lr=0.01), make(twin, lr=rate)
    step = torch.compile(other.step, backend="eager")
    for i in range(6):
        for m in (model, twin):
            set_grads(list(m.parameters()), i)
        optimizer.step()
        step()
        optimizer.param_groups[0]["lr"] *= 0.5
        rate.mul_(0.5)
    assert_close(values(twin), values(model), 1e-10)


HOOKED = {name: MAKERS[name] for name in ("SOAP", "Muon", "SIRFShampoo, batch size given")}


@pytest.mark.parametrize("make", HOOKED.values(), ids=HOOKED)
def test_hooks_run_around_compiled_steps_and_state_dicts(make: Make) -> None:
    model = mlp()
    optimizer = make(model)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    optimizer.register_state_dict_post_hook(partial(_note, seen))
    step = torch.compile(optimizer.step, backend="eager")
    for i in range(3):
        set_grads(list(model.parameters()), i)
        step()
    assert seen == ["before", "after"] * 3
    assert optimizer.state_dict()["note"] == 6


def _note(seen: list[str], optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "note": len(seen)}
