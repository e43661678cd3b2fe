"""SAM works with the schedulers, averages and hooks of torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, StepLR
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from structprecond import (
    SAM,
)
from tests.helpers import (
    assert_close,
    data,
    loss_of,
    mlp,
    values,
)
from tests.sharpness.helpers import BASES, one, train

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
