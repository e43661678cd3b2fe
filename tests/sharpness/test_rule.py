"""SAM follows the papers: golden trajectories, and an independent dense computation."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from structprecond import (
    SAM,
    HyperparameterError,
    StructuredOptimizer,
)
from tests import golden
from tests.helpers import (
    assert_close,
    values,
)
from tests.sharpness.helpers import BASES, Groups, build, one, square, train, train_by_hand


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
