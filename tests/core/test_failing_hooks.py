"""What a hook or a strategy of the user's own returns or raises wrongly changes nothing."""

# mypy: disable-error-code="arg-type,return-value"
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    SOAP,
    AdamW,
    AdamWStrategy,
    DiagonalMatrix,
    Muon,
    MuonStrategy,
    NorMuonStrategy,
    OrthogonalizedMomentumStrategy,
    SIRFShampoo,
    SOAPStrategy,
    StructPrecondError,
    StructuredOptimizer,
)
from tests.helpers import same_bits, set_grads, snapshot


def model() -> Any:
    """Return a model whose matrices form three buckets, and whose biases form more."""
    torch.manual_seed(0)
    sizes = [(3, 4), (4, 4), (4, 4), (4, 2), (2, 3)]
    return nn.Sequential(*[nn.Linear(n, m) for n, m in sizes])


def _raise(value: Tensor) -> Any:
    raise LookupError("no such layer")


WRONG: dict[str, tuple[Callable[[Tensor], Any], type[Exception], str]] = {
    "fewer columns": (
        lambda t: t[..., :1], StructPrecondError, r"got \(1, 2, 1\) of torch.float32"
    ),
    "one matrix": (lambda t: t[0], StructPrecondError, r"shape \(1, 2, 4\), got \(2, 4\)"),
    "a number": (lambda t: 1.0, StructPrecondError, r"got 1\.0"),
    "nothing": (lambda t: None, StructPrecondError, "got None"),
    "a list": (lambda t: t.tolist(), StructPrecondError, r"got \[\["),
    "integers": (lambda t: t.long(), StructPrecondError, "got .* of torch.int64"),
    "flags": (lambda t: t > 0, StructPrecondError, "got .* of torch.bool"),
    "complex numbers": (lambda t: t * 1j, StructPrecondError, "got .* of torch.complex64"),
    "float8": (
        lambda t: t.to(torch.float8_e5m2), StructPrecondError, "got .* of torch.float8_e5m2"
    ),
    "on another device": (lambda t: t.to("meta"), StructPrecondError, "got .* on meta"),
    "sparse": (lambda t: t.to_sparse(), StructPrecondError, "got .* torch.sparse_coo"),
    "an error": (_raise, LookupError, "no such layer"),
}  # fmt: skip


class Switch:
    """Does nothing to a tensor, until it is told to: then only to the last bucket of matrices."""

    def __init__(self) -> None:
        self.wrong: Callable[[Tensor], Any] | None = None
        self.calls = 0

    def __call__(self, *tensors: Tensor) -> Any:
        self.calls += 1
        wrong = self.wrong if tensors[-1].shape[-2:] == (2, 4) else None
        return tensors[-1] if wrong is None else wrong(tensors[-1])


SWITCH = Switch()


@dataclass(frozen=True)
class OwnFunction(OrthogonalizedMomentumStrategy):
    """Orthogonalizes by the switch."""

    def scaled_orthogonalize_fn(self, update: Tensor) -> Tensor:
        return SWITCH(update).clone() if SWITCH.wrong is None else SWITCH(update)


@dataclass(frozen=True)
class OwnUpdate(SOAPStrategy):
    """Lets the switch see the direction of another strategy, which has updated its state."""

    def update(self, state: Any, grad: Tensor, hp: Any, ctx: Any) -> Tensor:
        return SWITCH(super().update(state, grad, hp, ctx))


@dataclass(frozen=True)
class OwnConstraint(AdamWStrategy):
    """Lets the switch constrain the parameters."""

    def constraint(self) -> Callable[[Tensor], Tensor]:
        return SWITCH


MAKERS: dict[str, Callable[[nn.Module], StructuredOptimizer]] = {
    "before": lambda m: Muon(m, before_weight_update=SWITCH),
    "after": lambda m: Muon(m, after_weight_update=SWITCH, weight_decay_method="l2"),
    "before, in NorMuon": lambda m: StructuredOptimizer(
        m, strategy=NorMuonStrategy(before_weight_update=SWITCH)
    ),
    "own function": lambda m: StructuredOptimizer(m, strategy=OwnFunction(nesterov=True)),
    "own update": lambda m: StructuredOptimizer(
        m, strategy=OwnUpdate(skip_first=False), hyperparameters={"precondition_frequency": 1}
    ),
    "own constraint": lambda m: StructuredOptimizer(m, strategy=OwnConstraint()),
    "own update on a route": lambda m: StructuredOptimizer(
        m, strategy={"default": AdamWStrategy(), "matrix": OwnUpdate(skip_first=False)}
    ),
}


CASES = [
    (kind, name, at)
    for kind in MAKERS
    for name in WRONG
    for at in (0, 3)
    if kind == "after" or name in ("one matrix", "an error")
]


@pytest.mark.parametrize(("kind", "name", "at"), CASES)
def test_a_step_that_fails_changes_nothing_and_can_be_made_again(
    kind: str, name: str, at: int
) -> None:
    SWITCH.wrong = None
    make, (wrong, error, message) = MAKERS[kind], WRONG[name]
    ends = []
    for fails in (False, True):
        net = model()
        optimizer = make(net)
        for step in range(at + 2):
            set_grads(list(net.parameters()), step)
            if step == 2:
                net[0].weight.grad = None  # some rows of a bucket
            if fails and step == at:
                before = snapshot(net, optimizer)
                SWITCH.wrong = wrong
                with pytest.raises(error, match=f"(?s){message}"):
                    optimizer.step()
                SWITCH.wrong = None
                assert same_bits(snapshot(net, optimizer), before)
            optimizer.step()
        end = snapshot(net, optimizer)
        ends.append([end[key] for key in ("params", "stacks", "counters")])
    assert same_bits(*ends)


@pytest.mark.parametrize("bad", [torch.nan, 1e30])
def test_units_that_were_skipped_in_a_failing_step_are_not_counted(bad: float) -> None:
    SWITCH.wrong = None
    net = model()
    optimizer = Muon(net, before_weight_update=SWITCH)
    set_grads(list(net.parameters()), 0)
    net[1].weight.grad[0, 0] = bad
    before = snapshot(net, optimizer)
    SWITCH.wrong = lambda update: None
    warned = pytest.warns(UserWarning, match=r"1\.weight") if bad != bad else nullcontext()
    with warned, pytest.raises(StructPrecondError, match="before_weight_update has to return"):
        optimizer.step()
    SWITCH.wrong = None
    assert same_bits(snapshot(net, optimizer), before)
    assert optimizer.skipped == 0


def test_a_hook_may_return_other_floating_point_numbers() -> None:
    def cast(*tensors: Tensor) -> Tensor:
        return tensors[-1].to(dtypes[len(ends)])

    ends: list[Any] = []
    dtypes = (torch.float32, torch.float64)
    for _ in dtypes:
        net = model()
        optimizer = Muon(net, before_weight_update=cast, after_weight_update=cast)
        set_grads(list(net.parameters()), 0)
        optimizer.step()
        ends.append(snapshot(net, optimizer)["params"])
    assert same_bits(*ends)


def test_an_own_function_may_return_a_transpose() -> None:
    @dataclass(frozen=True)
    class Transposed(OrthogonalizedMomentumStrategy):
        def scaled_orthogonalize_fn(self, update: Tensor) -> Tensor:
            return update.mT.contiguous().mT

    p = nn.Parameter(torch.ones(2, 3, 4))
    optimizer = StructuredOptimizer(
        [p], strategy=Transposed(), hyperparameters={"lr": 1.0, "momentum": 0.0, "weight_decay": 0}
    )
    p.grad = torch.arange(24.0).view(2, 3, 4)
    optimizer.step()
    assert torch.equal(p, 1 - p.grad)


@dataclass(eq=False)
class OwnStructure(DiagonalMatrix):
    """Fails where it is told to."""

    def outer_matmat(self, mat: Tensor, /) -> Tensor:
        if SWITCH.wrong is not None and mat.shape[-2] == 2:
            raise LookupError("no product")
        return super().outer_matmat(mat)


def test_an_own_structure_that_fails_changes_nothing() -> None:
    SWITCH.wrong = None
    net = model()
    optimizer = SIRFShampoo(net, structures=OwnStructure, batch_size=2, beta2=0.5)
    for step in range(2):
        set_grads(list(net.parameters()), step)
        optimizer.step()
    before = snapshot(net, optimizer)
    SWITCH.wrong = _raise
    with pytest.raises(LookupError, match="no product"):
        optimizer.step()
    SWITCH.wrong = None
    assert same_bits(snapshot(net, optimizer), before)


MAKE_HOOKED = partial(Muon, before_weight_update=lambda params, update: update)


@pytest.mark.parametrize(
    ("make", "copies"), [(AdamW, False), (SOAP, False), (Muon, False), (MAKE_HOOKED, True)]
)
def test_only_steps_with_other_code_copy_the_state(
    make: Any, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model()
    optimizer = make(net)
    expected = {id(b) for b in optimizer.buckets if copies and isinstance(b.strategy, MuonStrategy)}
    copied: set[int] = set()
    clone = Tensor.clone

    def seen(tensor: Tensor, **keywords: Any) -> Tensor:
        copied.add(id(tensor))
        return clone(tensor, **keywords)

    set_grads(list(net.parameters()), 0)
    monkeypatch.setattr(Tensor, "clone", seen)
    optimizer.step()
    for bucket in optimizer.buckets:
        state = {id(t) for t in bucket.state.named_tensors().values()}
        assert state <= copied if id(bucket) in expected else not state & copied
