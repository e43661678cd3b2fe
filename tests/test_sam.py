"""SAM: golden trajectories, an independent dense computation, and all that may go wrong."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from structprecond import (
    SAM,
    SOAP,
    GradientError,
    HyperparameterError,
    SIRFShampoo,
    StructPrecondError,
    StructuredOptimizer,
    freeze_batch_norm,
)
from tests import golden
from tests.helpers import SETTINGS, assert_close, data, mlp, same_bits, snapshot, values

Groups = list[tuple[list[str], float, bool]]
"""Names of parameters, rho, adaptive."""


def loss_of(model: nn.Module, step: int) -> Tensor:
    dtype = next(p.dtype for p in model.parameters())
    x, y = data(step, dtype=dtype)
    loss: Tensor = (model(x) - y).square().sum(1).mean()
    return loss


def closure_of(model: nn.Module, step: int) -> Callable[[], float]:
    """Return a closure that leaves clearing the gradients to SAM."""

    def closure() -> Any:
        loss = loss_of(model, step)
        loss.backward()
        return loss.detach()

    return closure


def train(model: nn.Module, sam: SAM, steps: int, start: int = 0) -> list[float]:
    return [float(sam.step(closure_of(model, step))) for step in range(start, start + steps)]


def square() -> Any:
    """Return a model whose gradients have eigenbases that are unique but for signs, as of step 1.

    With others, SOAP depends on how rounding picks a basis of a null space.
    """
    layers = nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)
    return nn.Sequential(*layers).double()


def perturbation(params: dict[str, Tensor], grads: dict[str, Tensor], groups: Groups) -> Any:
    """Compute e by name: one long vector, and the formulas of the papers."""
    T = {n: params[n].abs() if a else torch.ones_like(params[n]) for ns, _, a in groups for n in ns}
    norm = torch.cat([(T[n] * grads[n]).flatten() for n in T]).norm()
    rho = {n: r for names, r, _ in groups for n in names}
    return {n: rho[n] / (norm + 1e-12) * T[n] ** 2 * grads[n] for n in T}


def train_by_hand(
    model: nn.Module, base: Optimizer, groups: Groups, steps: int, sign: int = 1
) -> list[float]:
    """Train without ever moving the model's parameters except by the base."""
    losses = []
    for step in range(steps):
        params = dict(model.named_parameters())
        x, y = data(step)

        def loss_at(at: Any, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (functional_call(model, at, x) - y).square().sum(1).mean()

        base.zero_grad()
        loss = loss_at(params)
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
        e = perturbation({n: p.detach() for n, p in params.items()}, grads, groups)
        elsewhere = {n: (p.detach() + sign * e[n]).requires_grad_() for n, p in params.items()}
        second = torch.autograd.grad(loss_at(elsewhere), list(elsewhere.values()))
        for p, grad in zip(params.values(), second, strict=True):
            p.grad = grad
        base.step()
        losses.append(loss.item())
    return losses


def one(*numbers: float, grad: list[float] | None = None, **kwargs: Any) -> nn.Parameter:
    """Return a parameter, with a gradient if there is one."""
    p = nn.Parameter(torch.tensor(numbers, **kwargs))
    if grad is not None:
        p.grad = torch.tensor(grad, dtype=p.dtype)
    return p


def bits(model: nn.Module, optimizer: Optimizer) -> Any:
    """Copy all that a step may change."""
    return copy.deepcopy([values(model), optimizer.state_dict()])


# --- the rule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.names("sam"))
@pytest.mark.parametrize("manual", [False, True])
def test_golden(name: str, manual: bool) -> None:
    recorded = golden.load(name)
    arrays, meta = recorded.arrays, recorded.meta
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.from_numpy(arrays[f"init|{key}"]))
    X, Y = (torch.from_numpy(arrays[key]) for key in "XY")
    base = {"SGD": SGD, "AdamW": AdamW}[meta["base"]]
    sam = SAM(model.parameters(), base, **recorded.kwargs, **meta["base_kwargs"])

    def closure() -> Any:
        loss = nn.functional.mse_loss(model(X), Y)
        loss.backward()
        return loss

    for step in range(meta["steps"]):
        if manual:
            sam.zero_grad()
            loss = closure()
            sam.first_step(zero_grad=True)
            closure()
            sam.second_step()
        else:
            loss = sam.step(closure)
        assert loss.item() == pytest.approx(float(arrays[f"loss|{step}"]), rel=1e-9)
        for key, p in model.named_parameters():
            expected = torch.from_numpy(arrays[f"param|{step}|{key}"])
            assert (p - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"adaptive": False}, [1 + 0.3, -2 + 0.4]),  # |g| = 5
        ({"adaptive": True}, [1 + 1.5 / 73**0.5, -2 + 8 / 73**0.5]),  # |T g| = |(3, 8)|
        ({}, [1 + 1.5 / 73**0.5, -2 + 8 / 73**0.5]),
        ({"adaptive": False, "maximize": True}, [1 - 0.3, -2 - 0.4]),
        ({"adaptive": False, "rho": 0.0}, [1, -2]),
    ],
)
def test_first_step_in_numbers(settings: dict[str, Any], expected: list[float]) -> None:
    p = one(1.0, -2.0, grad=[3.0, 4.0], dtype=torch.float64)
    sam = SAM([p], SGD, **{"rho": 0.5, "lr": 0.1} | settings)
    sam.first_step()
    assert_close(p.detach(), torch.tensor(expected, dtype=torch.float64))
    assert p.grad is not None
    assert p.grad.tolist() == [3.0, 4.0]


def test_default_rho() -> None:
    sam = SAM([one(1.0)], SGD)
    assert (sam.param_groups[0]["rho"], sam.param_groups[0]["adaptive"]) == (0.05, True)


BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "SGD foreach": (SGD, {"lr": 0.1, "momentum": 0.9, "foreach": True}),
    "SGD fused": (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "SGD maximize": (SGD, {"lr": 0.01, "maximize": True}),
    "AdamW": (AdamW, {"lr": 0.1}),
    "AdamW fused": (AdamW, {"lr": 0.1, "fused": True}),
    "SIRFShampoo": (SIRFShampoo, {**SETTINGS, "batch_size": 6}),
    "SIRFShampoo maximize": (
        SIRFShampoo,
        {**SETTINGS, "lr": 0.01, "batch_size": 6, "maximize": True},
    ),
    "SOAP": (SOAP, {"lr": 0.1, "precondition_frequency": 2}),
}


def build(base: type[Optimizer], model: nn.Module, **kwargs: Any) -> Optimizer:
    if issubclass(base, StructuredOptimizer):
        return base(model, **kwargs)
    return base(model.parameters(), **kwargs)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_around_an_instance_equals_the_computation_by_hand(base: str, adaptive: bool) -> None:
    cls, kwargs = BASES[base]
    model = square()
    twin = copy.deepcopy(model)
    sam = SAM(None, build(cls, model, **kwargs), rho=0.4, adaptive=adaptive)
    names = [name for name, _ in model.named_parameters()]
    sign = -1 if kwargs.get("maximize") else 1
    expected = train_by_hand(
        twin, build(cls, twin, **kwargs), [(names, 0.4, adaptive)], 6, sign=sign
    )
    assert_close(torch.tensor(train(model, sam, 6)), torch.tensor(expected), 1e-9)
    assert_close(values(model), values(twin), 1e-8)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "SOAP"])
def test_groups_with_their_own_rho_share_one_norm(base: str) -> None:
    cls, kwargs = BASES[base]
    model = square()
    twin = copy.deepcopy(model)
    params, own = dict(model.named_parameters()), dict(twin.named_parameters())
    names = list(params)
    groups: Groups = [(names[:3], 0.5, True), (names[3:4], 0.05, False), (names[4:], 1.0, False)]
    sam = SAM(
        [
            {"params": [params[n] for n in groups[0][0]], "rho": 0.5, "lr": 0.02},
            {"params": [params[n] for n in groups[1][0]], "adaptive": False},
            {"params": [params[n] for n in groups[2][0]], "rho": 1, "adaptive": False},
        ],
        cls,
        **kwargs,
    )
    twins = [{"params": [own[n] for n in group]} for group, _, _ in groups]
    twins[0]["lr"] = 0.02  # type: ignore[assignment]
    train_by_hand(twin, cls(twins, **kwargs), groups, 5)
    train(model, sam, 5)
    assert_close(values(model), values(twin), 1e-9)
    assert [(g["rho"], g["adaptive"]) for g in sam.param_groups] == [g[1:] for g in groups]


def test_rho_may_be_scheduled() -> None:
    p = one(0.0, 0.0, grad=[3.0, 4.0])
    sam = SAM([p], SGD, lr=0.1, adaptive=False)
    sam.param_groups[0]["rho"] = 5.0
    sam.first_step()
    assert_close(p.detach(), torch.tensor([3.0, 4.0]), 1e-6)
    sam.param_groups[0]["rho"] = -1.0
    with pytest.raises(HyperparameterError, match=re.escape("rho must be a finite number")):
        sam.first_step()
    assert p.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["model", "named", "generator", "tuple"])
@pytest.mark.parametrize("base", ["SGD", "SOAP"])
def test_params_are_what_the_base_takes(kind: str, base: str) -> None:
    cls, kwargs = BASES[base]
    model = square()
    twin = copy.deepcopy(model)
    params: Any = {
        "model": model,
        "named": list(model.named_parameters()),
        "generator": model.parameters(),
        "tuple": tuple(model.parameters()),
    }[kind]
    sam = SAM(params, cls, **kwargs)
    names = [name for name, _ in model.named_parameters()]
    train_by_hand(twin, build(cls, twin, **kwargs), [(names, 0.05, True)], 3)
    train(model, sam, 3)
    assert_close(values(model), values(twin), 1e-9)
    if isinstance(sam.base_optimizer, StructuredOptimizer):
        assert sam.base_optimizer.model is (model if kind == "model" else None)
    if kind == "named":
        assert sam.param_groups[0]["param_names"] == names


def test_given_group_dicts_stay_as_they_are() -> None:
    p = one(1.0)
    groups: list[dict[str, Any]] = [{"params": [p], "rho": 0.3}]
    given = copy.copy(groups[0])
    sam = SAM(groups, SGD, lr=0.1)
    assert groups == [given]
    extra: dict[str, Any] = {"params": [one(2.0)], "rho": 0.7}
    given = copy.copy(extra)
    sam.add_param_group(extra)
    assert extra == given


def test_instance_keeps_the_settings_of_its_groups() -> None:
    p, q = one(1.0), one(2.0)
    base = SGD([{"params": [p], "rho": 0.7}, {"params": [q], "adaptive": False}], lr=0.1)
    sam = SAM(None, base, rho=0.2)
    assert [(g["rho"], g["adaptive"]) for g in base.param_groups] == [(0.7, True), (0.2, False)]
    assert sam.base_optimizer is base


# --- passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("who_clears", ["nobody", "sam", "model"])
def test_closure_is_called_twice_with_cleared_gradients(who_clears: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sam = SAM(model, SGD, rho=0.4, lr=0.1)
    names = [name for name, _ in model.named_parameters()]
    expected = train_by_hand(twin, SGD(twin.parameters(), lr=0.1), [(names, 0.4, True)], 1)
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    calls = []

    def closure() -> Any:
        if who_clears == "sam":
            sam.zero_grad()
        elif who_clears == "model":
            model.zero_grad(set_to_none=False)
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(loss.item())
        return loss

    with torch.no_grad():
        loss: Any = sam.step(closure)
    assert len(calls) == 2
    assert calls[0] < calls[1]  # the second is of where the loss is high
    assert loss.item() == calls[0]
    assert_close(torch.tensor(calls[0]), torch.tensor(expected[0]))
    assert_close(values(model), values(twin))
    sam.step(closure=closure)
    assert len(calls) == 4


def test_parameters_return_to_their_bits() -> None:
    model = mlp(torch.float32)
    sam = SAM(model, SGD, rho=1e4, lr=0.0)
    before = values(model)
    loss_of(model, 0).backward()
    sam.first_step(zero_grad=True)
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(p, old) for p, old in zip(values(model), before, strict=True))
    loss_of(model, 0).backward()
    sam.second_step(zero_grad=True)
    assert same_bits(values(model), before)
    assert all(p.grad is None for p in model.parameters())
    loss_of(model, 0).backward()
    sam.first_step()
    sam.restore()
    assert same_bits(values(model), before)


@pytest.mark.parametrize("finish", ["step", "second_step"])
def test_by_hand_equals_the_closure(finish: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, AdamW, rho=0.4, lr=0.1) for m in (model, twin))
    for step in range(3):
        sam.zero_grad()
        loss_of(model, step).backward()
        sam.first_step(zero_grad=True)
        loss_of(model, step).backward()
        assert getattr(sam, finish)() is None
        assert next(model.parameters()).grad is not None
    train(twin, reference, 3)
    assert same_bits(values(model), values(twin))


def test_first_step_twice_gives_up_the_second_pass() -> None:
    p = one(1.0, -2.0, grad=[3.0, 4.0])
    sam = SAM([p], SGD, rho=0.5, lr=1.0)
    sam.first_step()
    once = p.detach().clone()
    sam.first_step()
    assert same_bits(p.detach(), once)
    p.grad = torch.tensor([1.0, 1.0])
    sam.second_step()
    assert p.tolist() == [0.0, -3.0]


def test_closure_gives_up_a_pending_first_step() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, SGD, rho=0.4, lr=0.1) for m in (model, twin))
    loss_of(model, 5).backward()
    sam.first_step()
    train(model, sam, 1)
    train(twin, reference, 1)
    assert same_bits(values(model), values(twin))


def test_restore_without_a_first_step_does_nothing() -> None:
    p = one(1.0, grad=[1.0])
    sam = SAM([p], SGD, lr=0.5)
    sam.restore()
    sam.first_step()
    sam.second_step()
    sam.restore()
    assert p.tolist() == [0.5]


@pytest.mark.parametrize("finish", ["step", "second_step"])
@pytest.mark.parametrize("after", ["nothing", "a step", "a restored first step"])
def test_completing_without_a_first_step_raises(finish: str, after: str) -> None:
    model = mlp()
    sam = SAM(model, SGD, lr=0.1)
    if after == "a step":
        train(model, sam, 1)
    elif after == "a restored first step":
        loss_of(model, 0).backward()
        sam.first_step()
        sam.restore()
    before = values(model)
    with pytest.raises(StructPrecondError, match=re.escape("Call first_step() before step()")):
        getattr(sam, finish)()
    assert same_bits(values(model), before)


def test_backups_are_freed() -> None:
    """They hold as much memory as the model."""
    model = mlp()
    sam = SAM(model, SGD, lr=0.1)
    train(model, sam, 1)
    assert sam._old is None
    assert not sam.state


# --- whatever goes wrong -------------------------------------------------------------------------


class Failing(SGD):
    """Changes parameters, then raises."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p += 1
        raise RuntimeError("out of luck")


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("base", ["SGD", "AdamW", "SIRFShampoo"])
def test_failing_closure_changes_nothing(
    base: str, error: type[BaseException], failing_call: int
) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, cls, rho=0.4, **kwargs) for m in (model, twin))
    train(model, sam, 2)
    before, calls = bits(model, sam), 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss = loss_of(model, 7)
        loss.backward()
        if calls == failing_call:
            raise error("out of data")
        return loss

    with pytest.raises(error, match="out of data"):
        sam.step(closure)
    assert calls == failing_call
    assert same_bits(bits(model, sam), before)
    with pytest.raises(StructPrecondError, match="no first step is pending"):
        sam.second_step()
    train(model, sam, 2, start=2)
    train(twin, reference, 4)
    assert same_bits(values(model), values(twin))


@pytest.mark.parametrize("manual", [False, True])
def test_failing_base_changes_no_parameter(manual: bool) -> None:
    p, late, unused = one(1.0, grad=[1.0]), one(2.0), one(3.0)
    sam = SAM([p, late, unused], Failing, rho=0.5, lr=0.1)

    def closure() -> Any:
        loss = p.square().sum() + (0 if p.item() == 1.0 else late.sum())
        loss.backward()
        return loss

    if manual:
        sam.first_step()
        closure()
    step: Any = sam.second_step if manual else lambda: sam.step(closure)
    with pytest.raises(RuntimeError, match="out of luck"):
        step()
    assert (p.item(), late.item(), unused.item()) == (1.0, 2.0, 3.0)
    assert late.grad is not None
    assert sam._old is None


def test_failing_perturbation_changes_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = one(1.0, grad=[1.0]), one(2.0, grad=[1.0], dtype=torch.float64)
    sam = SAM([p, q], SGD, rho=0.5, lr=0.1)
    add, calls = torch._foreach_add_, 0

    def fail_later(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError("out of memory")
        add(*args, **kwargs)

    monkeypatch.setattr(torch, "_foreach_add_", fail_later)
    with pytest.raises(MemoryError):
        sam.first_step()
    assert (p.item(), q.item()) == (1.0, 2.0)
    with pytest.raises(StructPrecondError, match="no first step is pending"):
        sam.step()


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_gradients_that_cannot_be_used(kind: str, which: int) -> None:
    dense = one(1.0, grad=[1.0])
    odd = nn.Parameter(torch.ones(3, dtype=torch.complex64 if kind == "complex" else None))
    sam = SAM([dense, odd], SGD, rho=0.5, lr=0.1)

    def spoil() -> None:
        grad = torch.ones_like(odd)
        odd.grad = grad.to_sparse() if kind == "sparse" else grad

    if which == 2:
        sam.first_step()
    spoil()
    with pytest.raises(GradientError, match=r"shape \(3,\) .* only dense, real gradients"):
        (sam.first_step if which == 1 else sam.second_step)()
    assert dense.item() == 1.0
    assert same_bits(odd.detach().real.clone(), torch.ones(3))
    with pytest.raises(StructPrecondError, match="no first step is pending"):
        sam.step()


# --- gradients that are missing or peculiar ------------------------------------------------------


def test_missing_gradients() -> None:
    both, first, second, none = (one(1.0) for _ in range(4))
    sam = SAM([both, first, second, none], SGD, rho=0.5, adaptive=False, lr=1.0, weight_decay=0.1)
    both.grad, first.grad = torch.tensor([3.0]), torch.tensor([4.0])
    sam.first_step(zero_grad=True)
    perturbed = [p.item() for p in (both, first, second, none)]
    assert_close(torch.tensor(perturbed), torch.tensor([1.3, 1.4, 1.0, 1.0]), 1e-6)
    both.grad, second.grad = torch.tensor([2.0]), torch.tensor([4.0])
    sam.second_step()
    after = torch.tensor([p.item() for p in (both, first, second, none)])
    assert_close(after, torch.tensor([-1.1, 1.0, -3.1, 1.0]), 1e-6)


def test_no_gradient_at_all() -> None:
    p = one(1.0)
    sam = SAM([p], SGD, lr=0.1)
    sam.first_step()
    sam.second_step()
    assert p.item() == 1.0
    p.grad = torch.tensor([1.0])
    sam.first_step(zero_grad=True)
    sam.second_step()
    assert p.item() == 1.0
    assert sam.skipped == 0


def test_frozen_parameters_neither_move_nor_count() -> None:
    p, frozen = one(0.0, 0.0, grad=[3.0, 4.0]), one(1.0, grad=[100.0])
    frozen.requires_grad_(False)
    sam = SAM([p, frozen], SGD, rho=0.5, adaptive=False, lr=0.1)
    sam.first_step()
    assert frozen.item() == 1.0
    assert_close(p.detach(), torch.tensor([0.3, 0.4]), 1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_empty_parameters(adaptive: bool) -> None:
    p = one(1.0, grad=[1.0])
    empty, alone = (nn.Parameter(torch.ones(0, 3, dtype=d)) for d in (None, torch.float64))
    empty.grad, alone.grad = torch.ones_like(empty), torch.ones_like(alone)
    sam = SAM([p, empty, alone], SGD, rho=0.5, adaptive=adaptive, lr=1.0)
    sam.first_step(zero_grad=False)
    assert p.item() == 1.5
    sam.second_step()
    assert p.item() == 0.0


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_of_low_precision_is_computed_in_float32(dtype: torch.dtype, adaptive: bool) -> None:
    # squares overflow in float16, and so do products with the parameters
    p = nn.Parameter(torch.full((4, 25), 2.0, dtype=dtype))
    p.grad = torch.full_like(p, 4e4)
    wide = one(1.0, grad=[1.0], dtype=torch.float64)
    sam = SAM([p, wide], SGD, rho=5.0, adaptive=adaptive, lr=0.1)
    sam.first_step()
    # |g| = 10 * 4e4, |T g| = 2 * that, e = 5 / |T g| * T² g
    expected = 2 + (5 * 4 / (2 * 10) if adaptive else 5 / 10)
    assert p.dtype == dtype
    assert same_bits(p.detach(), torch.full_like(p, expected).detach())
    tiny = nn.Parameter(torch.full((4,), 0.5, dtype=dtype))
    tiny.grad = torch.full_like(tiny, 6e-5)
    sam = SAM([tiny], SGD, rho=1.0, adaptive=False, lr=0.1)
    sam.first_step()
    assert_close(tiny.detach().float(), torch.ones(4), 1e-3)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e30, torch.float32), (3e38, torch.float32), (1e38, torch.bfloat16), (1e200, torch.float64)],
)
def test_huge_gradients_are_finite(size: float, dtype: torch.dtype, adaptive: bool) -> None:
    p, q = (nn.Parameter(torch.tensor([2.0, -2.0], dtype=d)) for d in (dtype, torch.float64))
    p.grad = torch.full_like(p, size)
    q.grad = torch.full_like(q, p.grad[0].double().item())
    empty = nn.Parameter(torch.ones(0, 3, dtype=dtype))
    empty.grad = torch.ones_like(empty)
    groups: list[dict[str, Any]] = [{"params": [p, empty]}, {"params": [q], "rho": 2.0}]
    sam = SAM(groups, SGD, rho=1.0, adaptive=adaptive)
    sam.first_step()
    # |g| = 2 size; |T g| = 4 size, T² g = 4 size
    e = 1.0 if adaptive else 0.5
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert_close(p.detach().double(), torch.tensor([2 + e, -2 + e]).double(), tolerance)
    assert_close(q.detach(), torch.tensor([2 + 2 * e, -2 + 2 * e]).double(), 1e-6)
    p.grad, q.grad = torch.full_like(p, min(size, 1e30)), None
    sam.second_step()
    assert sam.skipped == 0
    assert p[0] < -1e26


def test_huge_gradients_of_tiny_parameters() -> None:
    p = one(*[1e-13] * 4, grad=[3e38] * 4)
    sam = SAM([p], SGD, rho=0.5, lr=0.1)
    sam.first_step()
    assert p.tolist() == pytest.approx([1.25e-13] * 4, rel=1e-5)


def test_norm_has_the_precision_of_the_widest_dtype() -> None:
    narrow, wide = one(1.0, grad=[3.0]), one(0.0, grad=[0.1], dtype=torch.float64)
    sam = SAM([narrow, wide], SGD, rho=1.0, adaptive=False, lr=0.1)
    sam.first_step()
    assert wide.item() == pytest.approx(0.1 / 9.01**0.5, rel=1e-11)


def test_tiny_gradients_are_not_blown_up() -> None:
    p = one(1.0, 1.0, grad=[1e-30, 1e-30])
    sam = SAM([p], SGD, rho=1.0, lr=0.1)
    sam.first_step()
    assert_close(p.detach(), torch.ones(2), 1e-6)


# --- not finite ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
def test_step_with_a_nonfinite_gradient_is_skipped_whole(
    base: str, manual: bool, which: int, bad: float
) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, cls, rho=0.4, **kwargs) for m in (model, twin))
    train(model, sam, 2)
    before = bits(model, sam)

    def step(number: int) -> Any:
        calls = 0

        def closure() -> Any:
            nonlocal calls
            calls += 1
            loss = loss_of(model, number)
            loss.backward()
            if calls == which:
                model[2].weight.grad[0, 0] = bad
            return loss

        if not manual:
            loss = sam.step(closure)
            assert calls == which
            return loss
        sam.zero_grad()
        loss = closure()
        sam.first_step(zero_grad=True)
        closure()
        sam.second_step()
        return loss

    name = "first" if which == 1 else "second"
    with pytest.warns(UserWarning, match=f"gradient of the {name} pass was not finite") as caught:
        loss = step(7)
    assert len(caught) == 1
    assert manual or caught[0].filename == __file__
    assert math.isfinite(loss.item())
    assert sam.skipped == 1
    assert same_bits(bits(model, sam), before)
    step(8)  # without a second warning, which would be an error
    assert sam.skipped == 2
    assert same_bits(bits(model, sam), before)
    train(model, sam, 2, start=2)
    train(twin, reference, 4)
    assert same_bits(values(model), values(twin))


def test_nonfinite_parameter_skips_the_step() -> None:
    p = one(torch.inf, 1.0, grad=[0.0, 1.0])
    sam = SAM([p], SGD, lr=0.1)
    sam.first_step()
    with pytest.warns(UserWarning, match="first pass"):
        sam.second_step()
    assert p.tolist() == [torch.inf, 1.0]


def test_first_pass_that_failed_is_known_by_its_gradients() -> None:
    """Ranks that did not fail learn of it when the gradients are averaged: none may be finite."""
    p, q = one(1.0, grad=[torch.inf]), one(2.0, grad=[1.0])
    sam = SAM([p, q], SGD, lr=0.1)
    sam.first_step(zero_grad=True)
    assert p.grad is not None
    assert q.grad is not None
    assert p.grad.isnan().all()
    assert q.grad.isnan().all()
    assert (p.item(), q.item(), sam.skipped) == (1.0, 2.0, 1)
    p.grad, q.grad = torch.ones(1), torch.ones(1)  # cleared by someone else
    with pytest.warns(UserWarning, match="first pass"):
        sam.second_step()
    assert (p.item(), q.item(), sam.skipped) == (1.0, 2.0, 1)


def test_structured_base_decides_about_the_second_pass() -> None:
    model = mlp()
    sam = SAM(model, SOAP, rho=0.4)
    train(model, sam, 2)
    before = snapshot(model, sam.base_optimizer)  # type: ignore[arg-type]
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss = loss_of(model, 7)
        loss.backward()
        if calls == 2:
            model[2].weight.grad[0, 0] = torch.nan
        return loss

    with pytest.warns(UserWarning, match=re.escape("gradients of 2.weight are not finite")):
        sam.step(closure)
    after = snapshot(model, sam.base_optimizer)  # type: ignore[arg-type]
    stayed = [n for n, p in after["params"].items() if same_bits(p, before["params"][n])]
    assert stayed == ["2.weight"]
    assert (sam.skipped, sam.base_optimizer.skipped) == (0, 1)  # type: ignore[attr-defined]


def test_structured_base_that_raises_changes_nothing() -> None:
    model = mlp()
    sam = SAM(model, SIRFShampoo, rho=0.4, nonfinite="raise", batch_size=6)
    train(model, sam, 2)
    before = snapshot(model, sam.base_optimizer)  # type: ignore[arg-type]
    loss_of(model, 7).backward()
    sam.first_step(zero_grad=True)
    (loss_of(model, 7) * torch.inf).backward()
    with pytest.raises(GradientError, match="are not finite at step 2"):
        sam.second_step()
    assert same_bits(snapshot(model, sam.base_optimizer), before)  # type: ignore[arg-type]
    assert sam.skipped == 0


# --- shared with the base ------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["SGD", "AdamW", "SIRFShampoo"])
def test_shares_groups_state_and_defaults_also_after_loading(base: str) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    sam = SAM(model, cls, rho=0.4, **kwargs)
    for _ in range(2):
        assert sam.param_groups is sam.base_optimizer.param_groups
        assert sam.state is sam.base_optimizer.state
        assert sam.defaults is sam.base_optimizer.defaults
        assert not {"rho", "adaptive"} & set(sam.defaults)
        train(model, sam, 1)
        sam.load_state_dict(sam.state_dict())
    sam.param_groups[0]["lr"] = 0.0
    before = values(model)
    train(model, sam, 1)
    if base != "AdamW":
        assert same_bits(values(model), before)


def test_state_may_be_reset() -> None:
    model = mlp()
    sam = SAM(model, SGD, lr=0.1, momentum=0.9)
    train(model, sam, 2)
    sam.state = type(sam.state)(dict)
    assert not sam.base_optimizer.state


def test_is_an_optimizer_with_all_its_parts() -> None:
    sam = SAM([one(1.0)], SGD, lr=0.1)
    plain = SGD([one(1.0)], lr=0.1)
    assert isinstance(sam, Optimizer)
    missing = [name for name in vars(plain) if not hasattr(sam, name)]
    assert missing in ([], ["_warned_capturable_if_run_uncaptured"])


def _saved(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("base", ["SGD", "AdamW", "SIRFShampoo", "SOAP"])
def test_resumes_bit_equal(base: str) -> None:
    cls, kwargs = BASES[base]
    straight = mlp()
    broken, resumed = copy.deepcopy(straight), mlp()
    one_go = SAM(straight, cls, rho=0.4, **kwargs)
    train(straight, one_go, 6)
    first = SAM(broken, cls, rho=0.4, **kwargs)
    train(broken, first, 3)
    first.param_groups[0]["rho"] = np.float64(0.4)  # a scheduler's number
    first.param_groups[0]["rho"] = 0.4
    checkpoint = _saved([broken.state_dict(), first.state_dict()])
    second = SAM(resumed, cls, adaptive=False, **kwargs)
    resumed.load_state_dict(checkpoint[0])
    second.load_state_dict(checkpoint[1])
    assert second.param_groups[0]["rho"] == 0.4
    assert second.param_groups[0]["adaptive"] is True
    train(resumed, second, 3, start=3)
    assert same_bits(values(resumed), values(straight))


def test_numpy_numbers_do_not_spoil_checkpoints() -> None:
    sam = SAM([one(1.0)], SGD, rho=np.float64(0.25), lr=0.1)
    assert _saved(sam.state_dict())["param_groups"][0]["rho"] == 0.25


@pytest.mark.parametrize("base", ["SGD", "SIRFShampoo"])
def test_checkpoint_of_the_bare_base_leaves_the_settings(base: str) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    bare = build(cls, model, **kwargs)
    bare.param_groups[0]["lr"] = 0.07
    sam = SAM(model, cls, rho=0.4, adaptive=False, **kwargs)
    sam.param_groups[0]["rho"] = 0.3
    sam.load_state_dict(bare.state_dict())
    group = sam.param_groups[0]
    assert (group["lr"], group["rho"], group["adaptive"]) == (0.07, 0.3, False)


@pytest.mark.parametrize("base", ["SGD", "SIRFShampoo"])
def test_state_dict_between_the_passes(base: str) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    sam = SAM(model, cls, rho=0.4, **kwargs)
    train(model, sam, 2)
    before, state_dict = values(model), copy.deepcopy(sam.state_dict())
    loss_of(model, 2).backward()
    sam.first_step()
    perturbed = values(model)
    assert same_bits(sam.state_dict(), state_dict)
    with pytest.raises(StructPrecondError, match=re.escape("Call restore(), then load")):
        sam.load_state_dict(state_dict)
    assert same_bits(values(model), perturbed)
    sam.restore()
    sam.load_state_dict(state_dict)
    assert same_bits(bits(model, sam), [before, state_dict])


@pytest.mark.parametrize("base", ["SGD", "SOAP"])
def test_add_param_group(base: str) -> None:
    cls, kwargs = BASES[base]
    model = square()
    twin = copy.deepcopy(model)
    params, own = dict(model.named_parameters()), dict(twin.named_parameters())
    names = list(params)
    sam = SAM([params[n] for n in names[:2]], cls, rho=0.4, **kwargs)
    sam.add_param_group({"params": [params[n] for n in names[2:5]], "rho": 0.2, "lr": 0.01})
    sam.add_param_group({"params": [params[n] for n in names[5:]], "adaptive": False})
    groups: Groups = [(names[:2], 0.4, True), (names[2:5], 0.2, True), (names[5:], 0.4, False)]
    assert [(g["rho"], g["adaptive"]) for g in sam.param_groups] == [g[1:] for g in groups]
    reference = cls([own[n] for n in names[:2]], **kwargs)
    reference.add_param_group({"params": [own[n] for n in names[2:5]], "lr": 0.01})
    reference.add_param_group({"params": [own[n] for n in names[5:]]})
    train(model, sam, 3)
    train_by_hand(twin, reference, groups, 3)
    assert_close(values(model), values(twin), 1e-9)


def test_group_that_was_added_to_the_base_gets_the_defaults() -> None:
    p, q = one(0.0), one(0.0)
    sam = SAM([p], SGD, rho=0.5, adaptive=False, lr=0.1)
    sam.base_optimizer.add_param_group({"params": [q]})
    p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
    sam.first_step()
    assert_close(torch.tensor([p.item(), q.item()]), torch.tensor([0.3, 0.4]), 1e-6)


@pytest.mark.parametrize("manual", [False, True])
def test_group_added_between_the_passes(manual: bool) -> None:
    p, q = one(1.0, grad=[1.0]), one(1.0)
    sam = SAM([p], SGD, rho=0.5, lr=1.0)
    sam.first_step()
    sam.add_param_group({"params": [q]})
    p.grad = q.grad = torch.ones(1)
    sam.second_step()
    assert (p.item(), q.item()) == (0.0, 0.0)


# --- torch's other tools -------------------------------------------------------------------------


SCHEDULERS: dict[str, tuple[Callable[[Optimizer], Any], Callable[[int], float]]] = {
    "step": (lambda o: StepLR(o, 2, 0.5), lambda t: 0.1 * 0.5 ** (t // 2)),
    "lambda": (lambda o: LambdaLR(o, lambda t: 1 / (1 + t)), lambda t: 0.1 / (1 + t)),
    "cycle": (
        lambda o: OneCycleLR(
            o, max_lr=1.0, total_steps=5, pct_start=0.4, anneal_strategy="linear", div_factor=10.0,
            final_div_factor=1.0,
        ),
        lambda t: [0.1, 1.0, 0.7, 0.4, 0.1, 0.1][t],
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ["closure", "step", "second_step"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("of_base", [False, True])
def test_schedulers(scheduler: str, how: str, of_base: bool) -> None:
    make, rate = SCHEDULERS[scheduler]
    model = mlp()
    sam = SAM(model, SGD, lr=0.1, momentum=0.9)
    schedule = make(sam.base_optimizer if of_base else sam)
    for step in range(4):
        assert sam.base_optimizer.param_groups[0]["lr"] == pytest.approx(rate(step))
        if how == "closure":
            train(model, sam, 1, start=step)
        else:
            sam.zero_grad()
            loss_of(model, step).backward()
            sam.first_step(zero_grad=True)
            loss_of(model, step).backward()
            getattr(sam, how)()
        schedule.step()  # warnings are errors
    copy.deepcopy(sam)
    pickle.dumps(sam)


def test_weight_averaging() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    sam = SAM(model, SGD, lr=0.1)
    average: Any = AveragedModel(model)
    schedule = SWALR(sam, swa_lr=0.05, anneal_epochs=1)
    seen = []
    for step in range(3):
        train(model, sam, 1, start=step)
        average.update_parameters(model)
        schedule.step()
        seen.append(values(model)[0])
    assert sam.param_groups[0]["lr"] == 0.05
    assert_close(average.module[0].weight.detach(), torch.stack(seen).mean(0))
    update_bn([data(0)[0]], average)


@pytest.mark.parametrize("how", ["closure", "step", "second_step"])
def test_step_hooks_run_once_a_step(how: str) -> None:
    model = mlp()
    sam = SAM(model, SGD, lr=0.1)
    seen: list[Any] = []
    sam.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", o)))
    sam.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", o)))
    if how == "closure":
        train(model, sam, 1)
    else:
        loss_of(model, 0).backward()
        sam.first_step(zero_grad=True)
        loss_of(model, 0).backward()
        getattr(sam, how)()
    assert seen == [("before", sam), ("after", sam)]


@pytest.mark.parametrize("base", ["SGD", "SIRFShampoo"])
@pytest.mark.parametrize("copied", [False, True])
def test_state_dict_hooks_run_once(base: str, copied: bool) -> None:
    cls, kwargs = BASES[base]
    sam = SAM(mlp(), cls, **kwargs)
    sam = copy.deepcopy(sam) if copied else sam
    seen = []
    sam.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    sam.register_state_dict_post_hook(lambda o, sd: {**sd, "extra": 1})
    sam.register_load_state_dict_pre_hook(lambda o, sd: seen.append(sd.pop("extra")))
    sam.register_load_state_dict_post_hook(lambda o: seen.append("post"))
    sam.load_state_dict(sam.state_dict())
    assert seen == ["pre", 1, "post"]


@pytest.mark.parametrize("clear", ["sam", "base"])
@pytest.mark.parametrize("set_to_none", [False, True])
def test_zero_grad(clear: str, set_to_none: bool) -> None:
    p = one(1.0, grad=[1.0])
    sam = SAM([p], SGD, lr=0.1)
    (sam if clear == "sam" else sam.base_optimizer).zero_grad(set_to_none=set_to_none)
    assert p.grad is None if set_to_none else p.grad == 0


def _copy(kind: str, *objects: Any) -> Any:
    return copy.deepcopy(objects) if kind == "deepcopy" else pickle.loads(pickle.dumps(objects))


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
@pytest.mark.parametrize("base", ["SGD", "AdamW", "SIRFShampoo"])
@pytest.mark.parametrize("pending", [False, True])
def test_copies_go_on_alike_and_apart(base: str, kind: str, pending: bool) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    sam = SAM(model, cls, rho=0.4, **kwargs)
    sam.skipped = 3
    train(model, sam, 2)
    before = values(model)
    if pending:
        loss_of(model, 2).backward()
        sam.first_step()
    twin, other = _copy(kind, model, sam)
    assert other.skipped == 3
    assert other.param_groups is other.base_optimizer.param_groups
    assert {id(p) for p in twin.parameters()} == {
        id(p) for group in other.param_groups for p in group["params"]
    }
    if pending:
        other.restore()
        assert same_bits(values(twin), before)
        sam.restore()
    train(twin, other, 2, start=2)
    assert same_bits(values(model), before)
    train(model, sam, 2, start=2)
    assert same_bits(values(twin), values(model))
    scheduler = StepLR(other, 1)
    train(twin, other, 1, start=4)
    scheduler.step()
    if base != "SIRFShampoo":  # which wants parameters of its model
        other.add_param_group({"params": [one(1.0)]})
        assert other.param_groups[-1]["rho"] == 0.4


def test_repr_shows_base_and_groups() -> None:
    shown = repr(SAM([one(1.0)], SGD, rho=0.25, lr=0.125))
    assert all(text in shown for text in ("SAM", "SGD", "rho: 0.25", "adaptive: True", "lr: 0.125"))


# --- mixed precision -----------------------------------------------------------------------------


def scaled_step(
    model: nn.Module,
    sam: SAM,
    scaler: Any,
    step: int,
    factors: tuple[float, float] = (1.0, 1.0),
    clip: float | None = None,
) -> None:
    sam.zero_grad()
    scaler.scale(loss_of(model, step) * factors[0]).backward()
    sam.first_step(zero_grad=True)
    scaler.scale(loss_of(model, step) * factors[1]).backward()
    if clip is not None:
        scaler.unscale_(sam)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(sam)
    scaler.update()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("base", ["SGD", "AdamW fused", "SOAP"])
@pytest.mark.parametrize(
    ("factors", "enabled"),
    [((1.0, 1.0), True), ((1.0, 1.0), False), ((torch.inf, 1.0), True), ((1.0, torch.inf), True)],
)
def test_grad_scaler(
    base: str, clip: float | None, factors: tuple[float, float], enabled: bool
) -> None:
    cls, kwargs = BASES[base]
    model = mlp(torch.float32)
    twin = copy.deepcopy(model)
    sam, reference = (SAM(m, cls, rho=0.4, **kwargs) for m in (model, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, enabled=enabled)
    overflows = factors != (1.0, 1.0)
    for step in range(4):
        if step == 2 and overflows:
            before = bits(model, sam)
            scaled_step(model, sam, scaler, step, factors, clip)
            assert same_bits(bits(model, sam), before)
            assert sam.skipped == 1
            assert scaler.get_scale() == 2.0**9
        scaled_step(model, sam, scaler, step, clip=clip)
        reference.zero_grad()
        loss_of(twin, step).backward()
        reference.first_step(zero_grad=True)
        loss_of(twin, step).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), clip)
        reference.second_step()
        # the scale is a power of two, so only the 1e-12 beside the norm differs
        assert_close(values(model), values(twin), 1e-5)
    assert scaler.get_scale() == (1.0 if not enabled else 2.0**9 if overflows else 2.0**10)
    assert sam.skipped == overflows
    assert not hasattr(sam, "grad_scale")


def test_scaler_after_a_failed_first_pass_whose_gradients_someone_cleared() -> None:
    p = one(1.0, grad=[torch.inf])
    sam, scaler = SAM([p], SGD, lr=0.1), torch.amp.GradScaler("cpu")
    sam.first_step(zero_grad=True)
    p.grad = None
    scaler.scale(p.sum()).backward()
    with pytest.warns(UserWarning, match="first pass"):
        scaler.step(sam)
    scaler.update()
    assert (p.item(), sam.skipped) == (1.0, 1)


def test_scale_of_a_step_that_raised_is_forgotten() -> None:
    p = one(1.0)
    sam = SAM([p], SGD, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    base: Any = sam.base_optimizer
    step, base.step = base.step, _fail
    for _ in range(2):
        sam.zero_grad()
        scaler.scale(p.sum()).backward()
        sam.first_step(zero_grad=True)
        scaler.scale(p.sum()).backward()
        if base.step is _fail:
            with pytest.raises(RuntimeError, match="out of luck"):
                scaler.step(sam)
            base.step = step
        else:
            scaler.step(sam)
        scaler.update()
    assert p.item() == 0.0


def _fail() -> None:
    raise RuntimeError("out of luck")


def test_float16_gradients_are_not_unscaled() -> None:
    p = one(1.0, dtype=torch.float16)
    sam, scaler = SAM([p], SGD, lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    sam.first_step(zero_grad=True)
    scaler.scale(p.sum()).backward()
    with pytest.raises(GradientError, match="Keep the parameters in float32"):
        scaler.step(sam)
    assert p.item() == 1.0


# --- batch norm ----------------------------------------------------------------------------------


class Normed(nn.Module):
    """A model with batch norm of several kinds."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4, momentum=momentum)
        self.no_statistics = nn.BatchNorm1d(4, track_running_stats=False)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.no_statistics(self.norm(self.first(x)).tanh()))
        return output


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_freeze_batch_norm(training: bool, momentum: float | None) -> None:
    model = Normed(momentum).double()
    for step in range(2):
        model(data(step)[0])
    model.train(training)
    expected = copy.deepcopy(model)(data(2)[0])
    before = statistics(model)
    with freeze_batch_norm(model), freeze_batch_norm(model.norm):
        assert same_bits(model(data(2)[0]).detach(), expected.detach())
    assert same_bits(statistics(model), before)
    assert list(before) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="out of luck"), freeze_batch_norm(model):
        _fail()
    assert model.norm.track_running_stats
    assert not model.no_statistics.track_running_stats
    model.train()
    model(data(3)[0])
    assert not same_bits(statistics(model), before)


@pytest.mark.parametrize("known", ["params", "base"])
def test_closure_counts_the_first_pass_alone_in_batch_norm(known: str) -> None:
    model = Normed().double()
    twin = copy.deepcopy(model)
    sam = SAM(model, SGD, lr=0.1) if known == "params" else SAM(None, SOAP(model))
    train(model, sam, 1)
    twin(data(0)[0])
    assert same_bits(statistics(model), statistics(twin))
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of data")
        return closure_of(model, 0)()

    with pytest.raises(RuntimeError, match="out of data"):
        sam.step(closure)
    assert model.norm.track_running_stats


def test_model_that_is_not_known_is_left_alone() -> None:
    model = Normed().double()
    twin = copy.deepcopy(model)
    train(model, SAM(model.parameters(), SGD, lr=0.0), 1)
    for _ in range(2):
        twin(data(0)[0])
    assert model.norm.num_batches_tracked == twin.norm.num_batches_tracked == 2


# --- the batch size ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closure", "by hand", "cleared by the model", "set to zero"])
def test_batch_size_is_that_of_one_pass(how: str) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    sam = SAM(model, SIRFShampoo, rho=0.4, **SETTINGS)
    base: Any = sam.base_optimizer
    for step in range(3):
        if how == "closure":
            train(model, sam, 1, start=step)
        else:
            sam.zero_grad()
            loss_of(model, step).backward()
            sam.first_step(zero_grad=how == "by hand")
            if how == "cleared by the model":
                model.zero_grad()
            elif how == "set to zero":
                sam.zero_grad(set_to_none=False)
            loss_of(model, step).backward()
            sam.second_step()
        assert base.batch_size == 6
    reference = SIRFShampoo(twin, **SETTINGS, batch_size=6)
    names = [name for name, _ in twin.named_parameters()]
    train_by_hand(twin, reference, [(names, 0.4, True)], 3)
    assert_close(values(model), values(twin), 1e-9)


# --- bad input -----------------------------------------------------------------------------------


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
        "base_optimizer takes a class of optimizers or an instance, got <function"),
    "base that is another class": (
        lambda: SAM([P], nn.Linear), StructPrecondError,  # type: ignore[arg-type]
        "base_optimizer takes a class of optimizers or an instance, got <class"),
    "base that is a name": (
        lambda: SAM([P], "sgd"), StructPrecondError,  # type: ignore[arg-type]
        "got 'sgd'. Pass the class, as in SAM(params, torch.optim.SGD, lr=0.1)."),
    "class without params": (
        lambda: SAM(None, SGD, lr=0.1), StructPrecondError,
        "params is None, but the base optimizer is a class."),
    "instance and params": (
        lambda: SAM([P], _sgd()), StructPrecondError,
        "base_optimizer is an instance of SGD, which has its parameters, but params is a list."),
    "instance and keywords": (
        lambda: SAM(None, _sgd(), lr=0.1, rho=0.1), StructPrecondError,
        "base_optimizer is an instance of SGD, so the arguments ['lr'] cannot be passed on."),
    "a tensor": (
        lambda: SAM(P, SGD), StructPrecondError,
        "params takes parameters, named parameters, group dicts or a model, got a Parameter."),
    "a number": (
        lambda: SAM(3, SGD), StructPrecondError, "got a int."),  # type: ignore[arg-type]
    "SAM around SAM": (
        lambda: SAM(None, SAM([P], SGD)), StructPrecondError, "base_optimizer is a SAM, which"),
    "SAM around the class SAM": (
        lambda: SAM([P], SAM), StructPrecondError, "base_optimizer is a SAM, which"),
    "base with a rho of its own": (
        lambda: SAM([P], torch.optim.Adadelta), StructPrecondError,
        "Adadelta has hyperparameters ['rho'] of its own"),
    "base that makes groups of its own": (
        lambda: SAM([{"params": [P, one(1.0)], "rho": 1}], Splitting, lr=0.1), StructPrecondError,
        "Splitting made 2 param groups of 1"),
    "unknown keyword": (
        lambda: SAM([P], SGD, momentom=0.9), TypeError, "momentom"),
    "unknown keyword of a structured base": (
        lambda: SAM([P], SOAP, epsilon=0.9), TypeError, "epsilon"),
    "unknown key of a structured base's group": (
        lambda: SAM([{"params": [P], "roh": 1}], SOAP), HyperparameterError, "['roh']"),
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
