"""Every strategy survives resume, copies, missing gradients and low precision."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from dataclasses import fields
from inspect import getdoc, signature
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import SOAP, Shampoo, StructuredOptimizer, StructureError
from structprecond.testing.table import Usage
from tests import processes
from tests.every_strategy import OPTIMIZERS, PROTOCOL, Make, every_strategy, strategy_of
from tests.helpers import by_pickle, same_bits, through_a_file, values

FACTORED = {
    name: usage
    for name, usage in PROTOCOL.items()
    if "preconditioner_dtypes" in signature(usage.optimizer).parameters
}
every_usage = pytest.mark.parametrize("usage", PROTOCOL.values(), ids=PROTOCOL)


def _model() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 5))


def _train(model: Any, optimizer: StructuredOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@every_strategy
def test_resume_is_bit_equal(make: Make) -> None:
    model = _model()
    optimizer = make(model)
    _train(model, optimizer, range(7))
    weights, state = through_a_file([model.state_dict(), optimizer.state_dict()])
    resumed = _model()
    again = make(resumed)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    _train(model, optimizer, range(7, 27))
    _train(resumed, again, range(7, 27))
    assert same_bits(values(model), values(resumed))


@every_strategy
@pytest.mark.parametrize("copier", [copy.deepcopy, by_pickle])
def test_copies_go_on_alike(make: Make, copier: Callable[[Any], Any]) -> None:
    model = _model()
    optimizer = make(model)
    _train(model, optimizer, range(5))
    other, other_optimizer = copier((model, optimizer))
    _train(model, optimizer, range(5, 12))
    assert not same_bits(values(model), values(other))
    _train(other, other_optimizer, range(5, 12))
    assert same_bits(values(model), values(other))


@every_usage
def test_a_unit_that_starts_late_is_as_one_that_starts_afresh(usage: Usage) -> None:
    if usage.settings.get("refresh") == "staggered":
        pytest.skip("turns depend on the other units, by design")
    # two layers of one shape, which share a stack; the second is frozen at first
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    alone = nn.Sequential(copy.deepcopy(model[1]))
    model[1].requires_grad_(False)
    together, fresh = usage.make(model), usage.make(alone)
    grads = [[torch.randn(5, 5).double(), torch.randn(5).double()] for _ in range(14)]
    for step, pair in enumerate(grads):
        if step == 4:
            model[1].requires_grad_(True)
        before = [p.detach().clone() for p in model[1].parameters()]
        for layer in model:
            for p, grad in zip(layer.parameters(), pair, strict=True):
                p.grad = grad.clone() if p.requires_grad else None
        together.step()
        if step < 4:
            frozen = zip(model[1].parameters(), before, strict=True)
            assert all(torch.equal(p, q) for p, q in frozen)
            continue
        for p, grad in zip(alone.parameters(), pair, strict=True):
            p.grad = grad.clone()
        fresh.step()
        for p, q in zip(model[1].parameters(), alone.parameters(), strict=True):
            assert (p - q).norm() <= 1e-5 * q.norm()


@every_strategy
def test_bfloat16_parameters_train_with_float32_state(make: Make) -> None:
    model = _model().to(torch.bfloat16)
    optimizer = make(model)
    _train(model, optimizer, range(12))
    assert all(p.isfinite().all() for p in model.parameters())
    for entry in optimizer.state.values():
        assert all(t.dtype == torch.float32 for t in entry.values() if t.is_floating_point())


@pytest.mark.parametrize("usage", FACTORED.values(), ids=FACTORED)
def test_factors_can_be_stored_in_bfloat16(usage: Usage) -> None:
    model, reference = _model(), _model()
    half = usage.make(model, preconditioner_dtypes=torch.bfloat16)
    full = usage.make(reference)
    assert sum(t.dtype == torch.bfloat16 for e in half.state.values() for t in e.values()) > 0
    _train(model, half, range(7))
    _train(reference, full, range(7))
    start, moved, expected = (
        torch.cat([p.detach().flatten() for p in m.parameters()])
        for m in (_model(), model, reference)
    )
    assert moved.isfinite().all()
    # only roughly the same: rounded factors have 3 digits, and the first few gradients leave
    # some directions undetermined
    assert torch.cosine_similarity(moved - start, expected - start, dim=0) > 0.5


@every_strategy
def test_a_nonfinite_gradient_leaves_its_unit_alone(make: Make) -> None:
    model = _model()
    optimizer = make(model)
    _train(model, optimizer, range(4))
    unit = [model[3].weight, model[3].bias]
    before = [p.detach().clone() for p in unit]
    state = {name: t.clone() for name, t in optimizer.state[unit[0]].items()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for p in unit:
        p.grad.fill_(torch.inf)
    with pytest.warns(UserWarning, match="not finite"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(unit, before, strict=True))
    after = optimizer.state[unit[0]]
    counters = {"skipped", "global_step"}
    assert all(torch.equal(after[n], t) for n, t in state.items() if n not in counters)
    assert int(after["skipped"]) == 1


@every_strategy
def test_gradients_are_not_touched(make: Make) -> None:
    model = _model()
    optimizer = make(model)
    for step in range(4):
        grads = [torch.randn_like(p) for p in model.parameters()]
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.clone()
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        assert step == optimizer.global_step - 1


@every_usage
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_is_as_good_as_a_number(
    usage: Usage, shape: tuple[int, ...]
) -> None:
    model, other = _model(), _model()
    lr: float = usage.settings["lr"]
    _train(model, usage.make(model), range(6))
    _train(other, usage.make(other, lr=torch.full(shape, lr)), range(6))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


@every_strategy
def test_order_of_registration_does_not_matter(make: Make) -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(4, 3, dtype=torch.float64) for name in "abc"}
    grads = [{name: torch.randn_like(w) for name, w in weights.items()} for _ in range(9)]
    models = []
    for order in ("abc", "cab"):
        model = nn.ParameterDict({name: weights[name].clone() for name in order})
        model._parameters = {name: model._parameters[name] for name in order}
        optimizer = make(model)
        for step in grads:
            for name, p in model.items():
                p.grad = step[name].clone()
            optimizer.step()
        models.append(model)
    assert list(models[0]._parameters) != list(models[1]._parameters)
    for name in weights:
        assert (models[0][name] - models[1][name]).norm() < 1e-10


def _check_that_settings_of_precision_stay(setting: str) -> None:
    if setting == "legacy":
        torch.set_float32_matmul_precision("medium")
    else:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    model = nn.Linear(3, 2)
    optimizer = SOAP(model, precondition_frequency=1)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    if setting == "legacy":
        assert torch.get_float32_matmul_precision() == "medium"
    else:
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("setting", ["legacy", "new"])
def test_decompositions_run_in_full_precision_whatever_the_settings(setting: str) -> None:
    # in a separate process: torch does not go back from the new settings to the old ones
    processes.result_of(_check_that_settings_of_precision_stay, setting)


def test_staggered_shampoo_preconditions_every_row_from_the_start_step() -> None:
    params = [nn.Parameter(torch.randn(4, 3)) for _ in range(4)]
    optimizer = Shampoo(params, refresh="staggered", precondition_frequency=10)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    for p in params:
        assert not torch.equal(optimizer.state[p]["inverse_roots.0.mat"], torch.eye(4))


@pytest.mark.parametrize(
    "settings", [{"root": "newton_db"}, {"root": "coupled_newton", "exponent": 0.4}]
)
def test_roots_that_cannot_be_taken_are_refused_at_construction(settings: Any) -> None:
    with pytest.raises(StructureError, match=r"cannot compute the inverse root.*'eigh'"):
        Shampoo([nn.Parameter(torch.zeros(4, 3, 2))], **settings)


def test_clipping_ignores_entries_without_a_second_moment() -> None:
    p = nn.Parameter(torch.zeros(8, 4))
    optimizer = SOAP([p], clip_rms=5.0, structures={2: ("none", "dense")}, lr=0.01)
    for step in range(30):
        before = p.detach().clone()
        p.grad = 10 * torch.randn(8, 4)
        if step < 5:
            p.grad[6:] = 0.0
        optimizer.step()
    assert (p - before).norm() > 1e-3
    assert (optimizer.state[p]["exp_avg_sq"] > 0).all()


@pytest.mark.parametrize("optimizer", [o for o in OPTIMIZERS if "__init__" in vars(o)])
def test_defaults_are_the_documented_ones(optimizer: Any) -> None:
    name, strategy = optimizer.__name__, strategy_of(optimizer)
    arguments = (getdoc(optimizer) or "").split("Args:\n")[1].split("\nRaises:")[0]
    own = {f.name: f.default for f in fields(strategy)}
    own |= {key: h.default for key, h in strategy.hyperparameters.items()}
    # the update rules alone: a ball of radius 1, and Muon's learning rate
    for argument, other in {"Scion": {"radius": 1.0}, "NorMuon": {"lr": 3e-4}}.get(
        name, {}
    ).items():
        assert own.pop(argument) == other
    compared = 0
    for entry in re.split(r"\n(?=    \w+:)", arguments):
        if found := re.match(r"\s*(\w+): .*Default:\s(.*)\.\s*$", entry, re.DOTALL):
            argument, text = found[1], found[2].partition(", ")[0]
            text = found[2] if text.startswith("(") else text.strip("`")
            try:
                documented = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                continue
            given = signature(optimizer).parameters[argument].default
            if argument not in ("params", "preconditioner_dtypes", "combine_params"):
                assert given == documented, argument
                assert own.get(argument, documented) == documented, argument
                compared += argument in own
    assert compared >= 3
