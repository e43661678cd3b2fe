"""Strategies with random probes: numbers depend on the row and its update, and resume."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structprecond import (
    Hyperparameter,
    SplitHeads,
    State,
    StepContext,
    Strategy,
    StructuredOptimizer,
)
from structprecond.testing.table import Usage
from tests.helpers import set_grads, values


@dataclass
class Probes(State):
    """The last random numbers."""

    probe: Tensor


@dataclass(frozen=True)
class NoisyStrategy(Strategy[Probes]):
    """Gradient descent with noise as large as the gradient."""

    hyperparameters = {"lr": Hyperparameter(0.1, lambda v: v >= 0, "at least 0")}  # noqa: RUF012
    structures = ()

    def init(self, like: Tensor, structures: Any, dtypes: Any) -> Probes:
        return Probes(torch.zeros_like(like))

    def update(
        self, state: Probes, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        state.probe.copy_(ctx.randn(*grad.shape[1:]))
        return grad * (1 + 0.1 * state.probe)


noisy = partial(StructuredOptimizer, strategy=NoisyStrategy())
TestNoisy = Usage(noisy, {}).contract()


def _probes(optimizer: StructuredOptimizer) -> dict[str, Tensor]:
    entries: dict[Any, Any] = optimizer.state
    return {optimizer.name_of(p): e["probe"].clone() for p, e in entries.items() if "probe" in e}


def _net(*names: str) -> Any:
    return nn.ParameterDict({name: torch.zeros(40, 30) for name in names})


def test_numbers_are_standard_normal_and_differ_by_row_and_update() -> None:
    model = _net("a", "b")
    optimizer = noisy(model)
    drawn = []
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
        drawn += list(_probes(optimizer).values())
    for i, probe in enumerate(drawn):
        assert abs(probe.mean()) < 0.1
        assert abs(probe.std() - 1) < 0.1
        assert not any(torch.equal(probe, other) for other in drawn[:i])


def test_numbers_do_not_depend_on_other_rows_or_their_order() -> None:
    models = [_net("a", "b", "c"), _net("c", "a"), _net("a")]
    seen = []
    for model in models:
        optimizer = noisy(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        seen.append(_probes(optimizer)["a"])
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_a_row_that_pauses_goes_on_with_its_own_numbers() -> None:
    model = _net("a", "b")
    twin = copy.deepcopy(model)
    pausing, steady = noisy(model), noisy(twin)
    for step in range(4):
        for net, optimizer in ((model, pausing), (twin, steady)):
            for p in net.values():
                p.grad = torch.ones_like(p)
            if net is model and step in (1, 2):
                net["b"].grad = None
            optimizer.step()
        if step == 1:
            second = _probes(steady)["b"]
    assert torch.equal(_probes(pausing)["a"], _probes(steady)["a"])
    assert torch.equal(_probes(pausing)["b"], second)


def test_seeds_follow_those_of_torch_and_leave_its_numbers_alone() -> None:
    drawn = []
    for seed in (0, 1, 0):
        model = _net("a")
        torch.manual_seed(seed)
        expected = torch.Generator().manual_seed(seed)
        optimizer = noisy(model)
        set_grads(list(model.parameters()), 0)
        optimizer.step()
        drawn.append(_probes(optimizer)["a"])
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_rows_of_one_unit_draw_different_numbers() -> None:
    p = nn.Parameter(torch.zeros(8, 6))
    model = nn.ParameterDict({"qkv": p})
    optimizer = noisy(model, combine_params=(SplitHeads("qkv", 2),))
    set_grads([p], 0)
    optimizer.step()
    first, second = optimizer.state[p]["probe"]
    assert not torch.equal(first, second)


def test_seeds_of_a_checkpoint_replace_those_of_a_fresh_optimizer() -> None:
    model = _net("a")
    optimizer = noisy(model)
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    torch.manual_seed(5)
    other = copy.deepcopy(model)
    resumed = noisy(other)
    resumed.load_state_dict(optimizer.state_dict())
    for net, opt in ((model, optimizer), (other, resumed)):
        set_grads(list(net.parameters()), 1)
        opt.step()
    assert torch.equal(values(model)[0], values(other)[0])
