"""Wrong input that would fail late, halfway or not at all is refused before any change."""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    SOAP,
    AdamW,
    AdamWStrategy,
    KLShampoo,
    LinearWeightBias,
    PerParameter,
    Shampoo,
    State,
    StepContext,
    Strategy,
    StructPrecondError,
    StructuredOptimizer,
)
from structprecond.core.strategy import nonnegative
from tests.helpers import mlp, net, same_bits, set_grads, values


def _data(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], None]:
    def damage(model: Any, optimizer: Any) -> None:
        p = model[2].weight
        p.grad.data = change(p.grad.data)

    return damage


def _resized(*shape: int) -> Callable[[Any, Any], None]:
    def damage(model: Any, optimizer: Any) -> None:
        p = model[2].weight
        p.grad = None
        p.data = torch.ones(shape, dtype=p.dtype)
        p.grad = torch.ones(shape, dtype=p.dtype)

    return damage


def _resized_alone(model: Any, optimizer: Any) -> None:
    model[2].weight.data = torch.ones(5, 4, dtype=torch.float64)


def _group(**changes: Any) -> Callable[[Any, Any], None]:
    return lambda model, optimizer: optimizer.param_groups[0].update(changes)


STEPS: dict[str, Callable[[Any, Any], None]] = {
    "grad of another shape": _data(lambda g: g[:, :2]),
    "grad with more rows": _data(lambda g: torch.cat([g, g])),
    "grad without axes": _data(lambda g: g[0, 0]),
    "grad of one row": _data(lambda g: g[0]),
    "grad of integers": _data(lambda g: g.long()),
    "complex grad": _data(lambda g: g * 1j),
    "parameter of another shape": _resized(5, 4),
    "parameter transposed": _resized(2, 8),
    "parameter of another shape, old grad": _resized_alone,
    "lr text": _group(lr="x"),
    "lr NaN": _group(lr=math.nan),
    "lr negative": _group(lr=-1.0),
    "betas": _group(betas=(0.1, 0.2, 0.3)),
    "interval": _group(precondition_frequency=0),
}


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("damage", STEPS.values(), ids=STEPS)
def test_a_step_that_cannot_be_made_changes_nothing(
    damage: Callable[[Any, Any], None], joint: bool
) -> None:
    model = mlp()
    rules = (LinearWeightBias(), PerParameter()) if joint else (PerParameter(),)
    optimizer = SOAP(model, precondition_frequency=1, combine_params=rules)
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    set_grads(list(model.parameters()), 3)
    damage(model, optimizer)
    before = [t.clone() for b in optimizer.buckets for t in b.named_tensors().values()]
    params = values(model)
    with pytest.raises(StructPrecondError):
        optimizer.step()
    after = [t for b in optimizer.buckets for t in b.named_tensors().values()]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert same_bits(values(model), params)
    assert optimizer.global_step == 3


ARGUMENTS: dict[str, Callable[[Any], Any]] = {
    "data_format without merge_dims": lambda m: SOAP(m, data_format="foo"),
    "clip_rms": lambda m: SOAP(m, clip_rms="x"),
    "init_factor": lambda m: KLShampoo(m, init_factor="x"),
    "init_factor inf": lambda m: KLShampoo(m, init_factor=math.inf),
    "start step None": lambda m: Shampoo(m, start_preconditioning_step=None),
    "start step 1.5": lambda m: Shampoo(m, start_preconditioning_step=1.5),
    "exponent": lambda m: Shampoo(m, exponent="x"),
    "combine_params number": lambda m: AdamW(m, combine_params=3),
    "combine_params alone in a group": lambda m: AdamW(
        [{"params": list(m.parameters()), "combine_params": PerParameter()}]
    ),
    "param_names too short": lambda m: AdamW(
        [{"params": list(m.parameters()), "param_names": ["a"]}]
    ),
    "hyperparameters number": lambda m: StructuredOptimizer(
        m, strategy=AdamWStrategy(), hyperparameters=3
    ),
    "params=names": lambda m: AdamW(m, ["0.weight"]),
    "params=module": lambda m: AdamW(m, [m[0]]),
    "order that no tensor has": lambda m: SOAP(
        m, structures={-1: "dense", 1: "dense", 2: "dense", 3: "dense"}
    ),
    "float8 parameter": lambda m: AdamW(
        [nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn), requires_grad=False)]
    ),
    "sparse parameter": lambda m: AdamW([nn.Parameter(torch.eye(3).to_sparse())]),
    "lazy parameter": lambda m: AdamW(nn.LazyLinear(3)),
}


@pytest.mark.parametrize("make", ARGUMENTS.values(), ids=ARGUMENTS)
def test_argument_is_refused(make: Callable[[Any], Any]) -> None:
    with pytest.raises(StructPrecondError):
        make(net())


@dataclass
class _Shadowing(State):
    step: torch.Tensor


@dataclass(frozen=True)
class _Shadow(Strategy[_Shadowing]):
    hyperparameters = {"lr": nonnegative(0.1)}  # noqa: RUF012

    def init(self, like: torch.Tensor, structures: Any, dtypes: Any) -> _Shadowing:
        return _Shadowing(torch.zeros_like(like))

    def update(
        self, state: _Shadowing, grad: torch.Tensor, hp: Any, ctx: StepContext
    ) -> torch.Tensor:
        return grad


def test_a_state_may_not_shadow_a_counter() -> None:
    with pytest.raises(StructPrecondError, match=r"fields called step, .* the core uses"):
        StructuredOptimizer(net(), strategy=_Shadow())


def test_names_of_the_user_may_be_alike() -> None:
    params = [nn.Parameter(torch.randn(3, 2)) for _ in range(2)]
    optimizer = AdamW([("w", p) for p in params])
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, before, strict=True))
