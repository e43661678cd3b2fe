"""Gradients that overflow skip their units, and everything stays finite."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    KLSOAP,
    SOAP,
    AdamW,
    GradientError,
    KLShampoo,
    Muon,
    Shampoo,
    SIRFShampoo,
    StructuredOptimizer,
)
from structprecond.core.bucket import Bucket
from structprecond.core.step import Plan
from tests.every_strategy import MAKERS, Make
from tests.helpers import matrices, same_bits, set_grads, snapshot

HUGE = (1e10, 1e15, 1e19, 1e25, 3e38)
TINY = (1e-20, 1e-30, 1e-44)
ROBUST: dict[str, Any] = {
    **MAKERS,
    "Shampoo coupled Newton": partial(Shampoo, root="coupled_newton", precondition_frequency=3),
    "Shampoo Newton-DB": partial(
        Shampoo, root="newton_db", exponent=0.25, precondition_frequency=3
    ),
}


def _numbers(optimizer: StructuredOptimizer) -> Iterator[Tensor]:
    for bucket in optimizer.buckets:
        yield from bucket.params
        yield from bucket.state.named_tensors().values()


def _all_finite(optimizer: StructuredOptimizer) -> bool:
    numbers = [t.flatten() for t in _numbers(optimizer) if t.is_floating_point()]
    return bool(torch.cat(numbers).isfinite().all())


@pytest.mark.parametrize("make", ROBUST.values(), ids=ROBUST.keys())
@pytest.mark.parametrize("size", HUGE + TINY)
@pytest.mark.filterwarnings("ignore:The gradients of .* are too large to compute with")
def test_everything_stays_finite_and_training_goes_on(make: Make, size: float) -> None:
    for when in ((0,), (5,), (5, 6, 7)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(12, 5), nn.Linear(5, 5))
        optimizer = make(model)
        for step in range(11):
            set_grads(list(model.parameters()), step)
            for p in model.parameters():
                if step in when:
                    assert p.grad is not None
                    p.grad.sign_().mul_(size)
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.step()
            assert _all_finite(optimizer), (when, step)
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        # a second moment of 1e37 may make steps too small to see, as in torch's AdamW
        assert size >= 1e10 or all(moved)
        assert optimizer.failed == 0
        assert size > 1e16 or optimizer.skipped == 0


@pytest.mark.parametrize("make", [SOAP, KLSOAP, KLShampoo, Shampoo, AdamW])
def test_a_gradient_that_overflows_is_as_one_that_is_not_finite(make: Make) -> None:
    results = []
    for value in (3e38, torch.nan):
        model = matrices()
        optimizer = make(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(9):
                set_grads(list(model), step)
                if step in (4, 5):
                    assert model[1].grad is not None
                    model[1].grad.fill_(value)
                optimizer.step()
        assert len(caught) == 1
        assert re.match("The gradients of 1 are .* at step 4", str(caught[0].message))
        assert caught[0].filename == __file__
        results.append({**snapshot(model, optimizer), "groups": None})
        assert optimizer.skipped == 2 == int(optimizer.state[model[1]]["skipped"])
    assert same_bits(*results)


def test_large_gradients_that_do_no_harm_are_used() -> None:
    # without epsilon and decay, SOAP does not see the scale
    moves = []
    for scale in (1.0, 1e12):
        p = nn.Parameter(torch.zeros(4, 4))
        optimizer = SOAP([p], lr=0.01, eps=0.0, weight_decay=0.0, precondition_frequency=2)
        for step in range(6):
            set_grads([p], step)
            assert p.grad is not None
            p.grad.mul_(scale)
            optimizer.step()
        assert optimizer.skipped == 0
        moves.append(p.detach())
    assert torch.allclose(moves[0], moves[1], rtol=1e-3)


def test_overflow_depends_on_the_strategy_and_the_step() -> None:
    # the momentum of 1e30 is finite, but the factors from its squares are not
    p = nn.Parameter(torch.zeros(4))
    optimizer = SIRFShampoo([p], batch_size=1, lr=1e-33, T=lambda step: step == 1)
    p.grad = torch.full_like(p, 1e30)
    optimizer.step()
    assert optimizer.skipped == 0
    assert p[0].item() == pytest.approx(-1e-3)
    with pytest.warns(UserWarning, match="too large to compute with"):
        optimizer.step()
    assert optimizer.skipped == 1
    p.grad.fill_(1.0)
    optimizer.step()
    assert (optimizer.global_step, int(optimizer.state[p]["step"])) == (3, 2)


def test_gradients_whose_own_squares_are_finite_may_overflow_too() -> None:
    # the eigenvalues of 1e-12 magnify gradients 1e6 times before they are squared
    model = matrices()
    optimizer = KLShampoo(model, init_factor=1e-12, clamping=False)
    for step in range(4):
        set_grads(list(model), step)
        if step == 1:
            model[3].grad.fill_(1e14)
            with pytest.warns(UserWarning, match="gradients of 3 are too large"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.skipped == 1
    assert all(t.isfinite().all() for t in _numbers(optimizer))


def test_overflow_raises_where_that_is_wanted_and_changes_nothing() -> None:
    model = matrices()
    optimizer = KLSOAP(model, nonfinite="raise")
    for step in range(3):
        set_grads(list(model), step)
        optimizer.step()
    model[2].grad.fill_(1e30)
    before = snapshot(model, optimizer)
    with pytest.raises(GradientError, match=r"gradients of 2 are too large .* step 3; nothing"):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)


def test_overflow_is_let_through_where_checks_are_ignored() -> None:
    model = matrices()
    optimizer = AdamW(model, nonfinite="ignore")
    set_grads(list(model), 0)
    model[2].grad.fill_(3e38)
    optimizer.step()
    assert optimizer.skipped == 0
    assert optimizer.state[model[2]]["exp_avg_sq"].isinf().all()


def test_parameters_of_half_precision_do_not_overflow() -> None:
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    q = nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    optimizer = Muon([{"params": [("p", p)]}, {"params": [("q", q)]}], lr=1e6)
    p.grad, q.grad = torch.full_like(p, 6e4), torch.full_like(q, 1e-4)
    with pytest.warns(UserWarning, match=r"p .*too large"):
        optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("maximize", [False, True])
def test_a_trial_with_large_gradients_leaves_the_gradients_as_they_are(maximize: bool) -> None:
    models = []
    for nonfinite in ("skip", "ignore"):
        model = matrices()
        optimizer = SOAP(model, eps=0.0, weight_decay=0.0, maximize=maximize, nonfinite=nonfinite)
        for step in range(4):
            set_grads(list(model), step)
            for p in model:
                assert p.grad is not None
                p.grad.mul_(1e12)  # too large to be sure, but not too large
            optimizer.step()
        assert optimizer.skipped == 0
        models.append(model)
    for p, q in zip(*models, strict=True):
        assert torch.equal(p, q)


def test_what_stands_in_the_rows_of_frozen_units_does_not_matter() -> None:
    model = matrices()
    optimizer = AdamW(model)
    set_grads(list(model), 0)
    model[1].grad = None
    # uninitialized memory holds NaN then
    torch.use_deterministic_algorithms(True)
    try:
        optimizer.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert optimizer.skipped == 0
    assert optimizer.state[model[0]]["step"] == 1
    assert optimizer.state[model[1]]["step"] == 0


def test_stacks_of_gradients_are_freed_as_soon_as_they_were_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stacks: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    gather, apply = Bucket.gather_grads, Plan.apply

    def watched_gather(bucket: Bucket, live: Any) -> Tensor:
        stack = gather(bucket, live)
        stacks.append(weakref.ref(stack))
        return stack

    def watched_apply(plan: Plan) -> list[str]:
        failed = apply(plan)
        alive.append(sum(stack() is not None for stack in stacks))
        return failed

    params = [nn.Parameter(torch.randn(n, 2)) for n in (2, 3, 4)]
    optimizer = AdamW(params)
    set_grads(params, 0)
    monkeypatch.setattr(Bucket, "gather_grads", watched_gather)
    monkeypatch.setattr(Plan, "apply", watched_apply)
    optimizer.step()
    assert alive == [2, 1, 0]
    assert [stack() for stack in stacks] == [None] * 3


def test_gradients_that_the_stack_cannot_hold_are_skipped() -> None:
    model = matrices()
    optimizer = AdamW(model)
    model.double()  # the state stays in float32
    set_grads(list(model), 0)
    model[2].grad.fill_(1e50)
    before = [p.detach().clone() for p in model]
    with pytest.warns(UserWarning, match="gradients of 2 are too large"):
        optimizer.step()
    assert optimizer.skipped == 1
    assert [bool(torch.equal(p, q)) for p, q in zip(model, before, strict=True)] == [
        False, False, True, False,
    ]  # fmt: skip
