"""SAM changes nothing if a closure, the base or the perturbation raises."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from structprecond import (
    SAM,
    GradientError,
    StructPrecondError,
)
from tests.helpers import (
    loss_of,
    mlp,
    same_bits,
    values,
)
from tests.sharpness.helpers import BASES, bits, one, train


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
    with pytest.raises(GradientError, match=r"shape \(3,\) .* expected a dense, real one"):
        (sam.first_step if which == 1 else sam.second_step)()
    assert dense.item() == 1.0
    assert same_bits(odd.detach().real.clone(), torch.ones(3))
    with pytest.raises(StructPrecondError, match="no first step is pending"):
        sam.step()
