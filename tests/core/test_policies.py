"""Policies, against formulas for one matrix, whatever the strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    SOAP,
    CapRMS,
    CautiousDecay,
    CautiousUpdate,
    CheckpointError,
    Hyperball,
    HyperparameterError,
    KLShampoo,
    MatchRMS,
    Move,
    Muon,
    Policy,
    SIRFShampoo,
    State,
    StepContext,
    Strategy,
    StructPrecondError,
    StructuredOptimizer,
    describe,
)
from structprecond.core.strategy import Hyperparameter, nonnegative

LR, DECAY, SHEAR = 0.1, 0.5, 1.0


@dataclass
class NoState(State):
    pass


@dataclass(frozen=True)
class Sheared(Strategy[NoState]):
    """The direction is the gradient plus a constant, so that signs differ from the gradient's."""

    decays: str = "before"

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(LR),
        "weight_decay": nonnegative(DECAY),
    }
    structures = ()

    def init(self, like: Tensor, structures: Any, dtypes: Any) -> NoState:
        return NoState()

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[Any, Any]:
        factor = 1 - hp["lr"] * hp["weight_decay"]
        return {"before": (factor, 1.0), "after": (1.0, factor), "inside": (1.0, 1.0)}[self.decays]

    def update(self, state: NoState, grad: Tensor, hp: Any, ctx: StepContext) -> Tensor:
        return grad.add_(SHEAR)  # overwrites its gradients, as strategies may


def matrices(dtype: torch.dtype = torch.float64, rows: int = 3) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 5, dtype=dtype)) for _ in range(rows)]
    for i, p in enumerate(params):
        p.grad = torch.randn_like(p) * 2.0**i
    return params


def grad_of(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad


def rms(tensor: Tensor) -> float:
    return math.sqrt(sum(x * x for x in tensor.flatten().tolist()) / tensor.numel())


def decayed_after(direction: Tensor, p: Tensor) -> Tensor:
    return (p - LR * direction) * (1 - LR * DECAY)


def decayed_before(direction: Tensor, p: Tensor) -> Tensor:
    return p * (1 - LR * DECAY) - LR * direction


Rule = Callable[[Tensor, Tensor], Tensor]


def matched(p: Tensor, grad: Tensor, decay: Rule) -> Tensor:
    D = grad + SHEAR
    return decay(D * 0.2 / rms(D), p)


def capped(p: Tensor, grad: Tensor, decay: Rule) -> Tensor:
    D = grad + SHEAR
    return decay(D * min(1.0, 2.0 / rms(D)), p)


def cautious_update(p: Tensor, grad: Tensor, decay: Rule) -> Tensor:
    D = grad + SHEAR
    M = (D * grad > 0).double()
    assert 0 < M.mean() < 1
    return decay(D * M / M.mean(), p)


def cautious_decay(p: Tensor, grad: Tensor, decay: Rule) -> Tensor:
    D = grad + SHEAR
    return torch.where(D * p > 0, decay(D, p), p - LR * D)


def hyperball(p: Tensor, grad: Tensor, decay: Rule) -> Tensor:
    D = grad + SHEAR
    moved = p - LR * D * p.norm() / D.norm()
    return moved * p.norm() / moved.norm()


def in_order(p: Tensor, grad: Tensor, decay: Rule) -> Tensor:
    D = grad + SHEAR
    M = (D * grad > 0).double()
    D = D * M / M.mean()
    return decay(D * 0.2 / rms(D), p)


def in_other_order(p: Tensor, grad: Tensor, decay: Rule) -> Tensor:
    D = grad + SHEAR
    M = (D * grad > 0).double()
    D = D * 0.2 / rms(D)
    return decay(D * M / M.mean(), p)


RULES: dict[str, tuple[tuple[Policy, ...], Callable[..., Tensor]]] = {
    "match": ((MatchRMS(0.2),), matched),
    "cap": ((CapRMS(2.0),), capped),
    "cautious update": ((CautiousUpdate(),), cautious_update),
    "cautious decay": ((CautiousDecay(),), cautious_decay),
    "hyperball": ((Hyperball(),), hyperball),
    "in order": ((CautiousUpdate(), MatchRMS(0.2)), in_order),
    "in the other order": ((MatchRMS(0.2), CautiousUpdate()), in_other_order),
}


@pytest.mark.parametrize("decays", ["before", "after"])
@pytest.mark.parametrize("name", RULES)
def test_stacked_rows_follow_the_formulas(name: str, decays: str) -> None:
    policies, rule = RULES[name]
    params = matrices()
    decay = decayed_before if decays == "before" else decayed_after
    expected = [rule(p.detach(), grad_of(p), decay) for p in params]
    StructuredOptimizer(params, strategy=Sheared(decays), policies=policies).step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
def test_low_precision_rounds_the_exact_result_once(name: str, rounding: Any) -> None:
    policies, rule = RULES[name]
    params = matrices(torch.bfloat16)
    grads = [grad_of(p).double() for p in params]
    expected = [
        rule(p.detach().double(), g, decayed_before) for p, g in zip(params, grads, strict=True)
    ]
    optimizer = StructuredOptimizer(
        params, strategy=Sheared(), policies=policies, rounding=rounding
    )
    optimizer.step()
    for p, value in zip(params, expected, strict=True):
        got = p.detach().double()
        if rounding == "kahan":
            got = got + optimizer.state[p]["compensation"]
        # half a unit in the last place of bfloat16, a whole one at random, none with compensation
        unit = {"nearest": 2.0**-8, "stochastic": 2.0**-7, "kahan": 2.0**-16}[rounding]
        torch.testing.assert_close(got, value, rtol=unit * 1.001, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rms_is_exact_for_any_scale(dtype: torch.dtype) -> None:
    """Squares of such entries leave the range of the dtype."""
    largest = 1e30 if dtype == torch.float32 else 1e300
    params = [nn.Parameter(torch.zeros(8, 8, dtype=dtype)) for _ in range(4)]
    for p, scale in zip(params, (largest, 1.0, 1 / largest, 0.0), strict=True):
        p.grad = torch.randn_like(p) * scale
    optimizer = StructuredOptimizer(
        params, strategy=Plain(), policies=(MatchRMS(0.5),), nonfinite="ignore"
    )
    optimizer.step()
    found = [rms(p.detach().double()) for p in params]
    assert found[:3] == pytest.approx([0.5] * 3, rel=1e-6)
    assert found[3] == 0


@dataclass(frozen=True)
class Plain(Sheared):
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {"lr": nonnegative(1.0)}

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[Any, Any]:
        return 1.0, 1.0

    def update(self, state: NoState, grad: Tensor, hp: Any, ctx: StepContext) -> Tensor:
        return grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [SOAP, Muon])
def test_hyperball_keeps_the_norm_over_1000_steps(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Linear(4, 2)).to(dtype)
    optimizer = make(model, lr=0.02, weight_decay=0.1, policies=(Hyperball(),))
    own = {p for row in optimizer.buckets if row.policy_numbers for p in row.params}
    assert len(own) >= 2
    before = {p: p.detach().double().norm() for p in own}
    start = {p: p.detach().clone() for p in own}
    for _ in range(1000):
        model(torch.randn(16, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for p in own:
        assert float(p.detach().double().norm() / before[p] - 1) == pytest.approx(0, abs=1e-6)
        assert (p - start[p]).norm() > 0.1 * start[p].norm()


def test_hyperball_leaves_rows_that_start_at_zero_to_the_strategy() -> None:
    params = matrices()
    params[1].data.zero_()
    expected = decayed_before(grad_of(params[1]) + SHEAR, params[1].detach())
    optimizer = StructuredOptimizer(params, strategy=Sheared(), policies=(Hyperball(),))
    optimizer.step()
    torch.testing.assert_close(params[1].detach(), expected)
    again = decayed_before(grad_of(params[1]) + SHEAR, params[1].detach())
    optimizer.step()
    torch.testing.assert_close(params[1].detach(), again)


def test_hyperball_takes_the_norm_at_the_first_update_of_each_row() -> None:
    params = matrices()
    optimizer = StructuredOptimizer(params, strategy=Sheared(), policies=(Hyperball(),))
    late = params[2].grad
    params[2].grad = None
    optimizer.step()
    params[2].data.mul_(3)
    norm, params[2].grad = params[2].norm().item(), late
    optimizer.step()
    assert params[2].norm().item() == pytest.approx(norm, rel=1e-12)
    assert optimizer.state[params[2]]["initial_norm"].item() == pytest.approx(norm, rel=1e-12)


def test_muon_with_spectral_scale_is_matched_exactly() -> None:
    """A polar factor has the same singular values everywhere; its scale does not matter."""
    params = {}
    for scale in ("spectral", "match_rms_adamw"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))
        optimizer = Muon(model, lr=0.1, scale_mode=scale, policies=(MatchRMS(0.2),))
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
        params[scale] = [p.detach() for p in model.parameters()]
    for p, q in zip(*params.values(), strict=True):
        torch.testing.assert_close(p, q)


# --- who has which -------------------------------------------------------------------------------


def test_a_sequence_is_for_the_main_strategy_and_a_dict_for_each() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2))
    cases: list[tuple[Any, tuple[str, ...], tuple[str, ...]]] = [
        ((MatchRMS(0.3),), ("MatchRMS(rms=0.3)",), ()),
        ({"adamw": (CautiousDecay(),)}, (), ("CautiousDecay()",)),
        ({"muon": Hyperball(), "adamw": [CapRMS()]}, ("Hyperball()",), ("CapRMS()",)),
    ]
    for given, muon, adamw in cases:
        rows = describe(Muon(model, policies=given)).rows
        assert {row.policies for row in rows if row.strategy == "MuonStrategy"} == {muon}
        assert {row.policies for row in rows if row.strategy == "AdamWStrategy"} == {adamw}


def test_a_param_group_has_its_own() -> None:
    params = matrices()
    groups = [{"params": params[:1], "policies": (MatchRMS(0.2),)}, {"params": params[1:]}]
    expected = [matched(params[0].detach(), grad_of(params[0]), decayed_before)]
    expected += [decayed_before(grad_of(p) + SHEAR, p.detach()) for p in params[1:]]
    StructuredOptimizer(groups, strategy=Sheared()).step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value)


def test_a_group_with_its_own_strategy_inherits_only_what_is_named_for_it() -> None:
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    groups: list[dict[str, Any]] = [
        {"params": list(layers[0].parameters())},
        {"params": list(layers[1].parameters()), "strategy": "adamw"},
    ]
    expected: list[tuple[Any, tuple[str, ...]]] = [
        ((MatchRMS(0.3),), ()),
        ({"soap": (MatchRMS(0.3),)}, ()),
    ]
    for given, theirs in expected:
        optimizer = SOAP(nn.ModuleList(layers), [dict(group) for group in groups], policies=given)
        rows = describe(optimizer).rows
        assert {row.policies for row in rows if row.group == 0} == {("MatchRMS(rms=0.3)",)}
        assert {row.policies for row in rows if row.group == 1} == {theirs}


def test_bad_policies_are_refused() -> None:
    model = nn.Linear(3, 2)
    bad: list[tuple[Any, str]] = [
        (MatchRMS, "Did you pass a class"),
        ((MatchRMS,), "Did you pass a class"),
        ("MatchRMS", "sequence of policies"),
        ((MatchRMS(0.1), CapRMS(), MatchRMS(0.2)), "MatchRMS more than once"),
        ({"muon": (CapRMS(),)}, "names of the strategies in use: 'soap'"),
    ]
    for given, message in bad:
        with pytest.raises(StructPrecondError, match=message):
            SOAP(model, policies=given)
    numbers: list[Any] = [0.0, -1.0, math.inf, math.nan, "1"]
    for number in numbers:
        with pytest.raises(HyperparameterError, match="rms"):
            MatchRMS(number)
        with pytest.raises(HyperparameterError, match="rms"):
            CapRMS(number)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: SIRFShampoo(model, policies=(CautiousDecay(),)),
        lambda model: StructuredOptimizer(
            model, strategy=Sheared("inside"), policies=(CautiousDecay(),)
        ),
        lambda model: StructuredOptimizer(model, strategy=Plain(), policies=(CautiousDecay(),)),
    ],
)
def test_cautious_decay_needs_a_decay_that_it_can_change(make: Any) -> None:
    with pytest.raises(StructPrecondError, match="CautiousDecay changes decoupled weight decay"):
        make(nn.Linear(3, 2))


# --- policies of one's own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Fails(Policy):
    initial: ClassVar[Mapping[str, float]] = {"calls": 0.0}

    def apply(self, move: Move, kept: Mapping[str, Tensor]) -> None:
        kept["calls"].add_(1)
        if bool((move.params.detach() > 1e3).any()):
            raise RuntimeError("too large")
        if bool((move.params.detach() < -1e3).any()):
            move.direction = move.direction[:, :1]


@pytest.mark.parametrize(("value", "message"), [(2e3, "too large"), (-2e3, "Fails.apply has to")])
def test_a_policy_that_fails_changes_nothing(value: float, message: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = KLShampoo(model, policies=(Fails(),), precondition_frequency=1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
    with torch.no_grad():
        next(iter(model[1].parameters()))[0, 0] = value
    before = [p.detach().clone() for p in model.parameters()]
    state = {n: t.clone() for b in optimizer.buckets for n, t in b.named_tensors().items()}
    with pytest.raises((RuntimeError, StructPrecondError), match=message):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    after = {n: t for b in optimizer.buckets for n, t in b.named_tensors().items()}
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert after["calls"].max() >= 1


@dataclass(frozen=True)
class Halfway(Policy):
    """Goes half as far; what the projection compares with must be the old parameters."""

    def apply(self, move: Move, kept: Mapping[str, Tensor]) -> None:
        move.projections.append(lambda moved: (moved + move.params) / 2)


def test_projections_see_the_parameters_before_the_move() -> None:
    params = matrices()
    expected = [(p.detach() + decayed_before(grad_of(p) + SHEAR, p.detach())) / 2 for p in params]
    StructuredOptimizer(params, strategy=Sheared(), policies=(Halfway(),)).step()
    for p, value in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), value)


# --- checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_name_the_policies_and_refuse_others() -> None:
    def trained(policies: Any) -> SOAP:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = SOAP(model, policies=policies)
        for _ in range(3):
            model(torch.randn(3, 4)).square().sum().backward()
            optimizer.step()
        return optimizer

    saved = trained((MatchRMS(0.3), Hyperball())).state_dict()
    assert saved["param_groups"][0]["policies"] == ("MatchRMS(rms=0.3)", "Hyperball()")
    trained([MatchRMS(0.3), Hyperball()]).load_state_dict(saved)
    with pytest.raises(CheckpointError, match=r"policies is .*MatchRMS"):
        trained((MatchRMS(0.2), Hyperball())).load_state_dict(saved)
    with pytest.raises(CheckpointError, match="unexpected initial_norm"):
        trained((MatchRMS(0.3),)).load_state_dict(saved)
    older = trained(None).state_dict()
    for group in older["param_groups"]:
        del group["policies"]
    trained(None).load_state_dict(older)
