"""What every strategy has to survive: resume, copies, gradients that come and go, low precision."""

from __future__ import annotations

import ast
import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from inspect import getdoc, signature
from typing import Any

import pytest
import torch
from torch import nn

import structprecond
from structprecond import (
    KLSOAP,
    LARS,
    SOAP,
    AdamW,
    KLShampoo,
    LinearWeightBias,
    Muon,
    NorMuon,
    PerParameter,
    Scion,
    Shampoo,
    SIRFShampoo,
    StructuredOptimizer,
    StructureError,
)

Make = Callable[[nn.Module], StructuredOptimizer]
BLOCKS: Any = {1: "none", 2: ("dense", "block3diagonal"), 4: "dense"}
MAKERS: dict[str, Make] = {
    "SIRF": partial(SIRFShampoo, batch_size=4, lr=0.05, T=2),
    "SOAP": partial(SOAP, lr=0.02, precondition_frequency=3),
    "SOAP staggered": partial(SOAP, lr=0.02, precondition_frequency=3, refresh="staggered"),
    "SOAP options": partial(
        SOAP, lr=0.02, precondition_frequency=2, skip_first=False, transport=True, clip_rms=2.0
    ),
    "SOAP blocks": partial(SOAP, lr=0.02, structures=BLOCKS, precondition_1d=True),
    "SOAP merged": partial(SOAP, lr=0.02, merge_dims=True, max_precond_dim=12),
    "KL-Shampoo": partial(KLShampoo, lr=0.01, precondition_frequency=3),
    "KL-SOAP": partial(KLSOAP, lr=0.01, precondition_frequency=3, structures=BLOCKS),
    "Shampoo": partial(Shampoo, lr=0.02, precondition_frequency=3, start_preconditioning_step=2),
    "Shampoo staggered": partial(
        Shampoo, lr=0.02, precondition_frequency=4, refresh="staggered", grafting="rmsprop"
    ),
    "Shampoo joint": partial(
        Shampoo, lr=0.02, grafting="sgd", combine_params=(LinearWeightBias(), PerParameter())
    ),
    "Muon": partial(Muon, lr=0.02, nesterov=True),
    "Muon l2": partial(Muon, lr=0.02, weight_decay_method="l2", after_weight_update=torch.tanh),
    "NorMuon": partial(NorMuon, lr=0.02),
    "Scion": partial(Scion, lr=0.01, radius=1.0, head_radius=1.0),
    "LARS": partial(LARS, lr=0.5, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1),
    "AdamW": partial(AdamW, lr=0.02),
}
FACTORED = {
    name: make
    for name, make in MAKERS.items()
    if "preconditioner_dtypes" in signature(make.func).parameters  # type: ignore[attr-defined]
}
every_strategy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def _model() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 5))


def _train(model: Any, optimizer: StructuredOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def _same(first: Any, second: Any) -> bool:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(p, q) for p, q in pairs)


@every_strategy
def test_resume_is_bit_equal(make: Make) -> None:
    model = _model()
    optimizer = make(model)
    _train(model, optimizer, range(7))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    resumed = _model()
    again = make(resumed)
    weights, state = torch.load(file)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    _train(model, optimizer, range(7, 27))
    _train(resumed, again, range(7, 27))
    assert _same(model, resumed)


@every_strategy
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alike(make: Make, copier: Callable[[Any], Any]) -> None:
    model = _model()
    optimizer = make(model)
    _train(model, optimizer, range(5))
    other, other_optimizer = copier((model, optimizer))
    _train(model, optimizer, range(5, 12))
    assert not _same(model, other)
    _train(other, other_optimizer, range(5, 12))
    assert _same(model, other)


@every_strategy
def test_a_unit_that_starts_late_is_as_one_that_starts_afresh(make: Make) -> None:
    if make in (MAKERS["SOAP staggered"], MAKERS["Shampoo staggered"]):
        pytest.skip("turns depend on the other units, by design")
    # two layers of one shape, so that they share a stack; the second one is frozen at first
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    alone = nn.Sequential(copy.deepcopy(model[1]))
    model[1].requires_grad_(False)
    together, fresh = make(model), make(alone)
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


@pytest.mark.parametrize("make", FACTORED.values(), ids=FACTORED.keys())
def test_factors_can_be_stored_in_bfloat16(make: Make) -> None:
    model, reference = _model(), _model()
    half = make.func(model, **{**make.keywords, "preconditioner_dtypes": torch.bfloat16})  # type: ignore[attr-defined]
    full = make(reference)
    assert sum(t.dtype == torch.bfloat16 for e in half.state.values() for t in e.values()) > 0
    _train(model, half, range(7))
    _train(reference, full, range(7))
    start, moved, expected = (
        torch.cat([p.detach().flatten() for p in m.parameters()])
        for m in (_model(), model, reference)
    )
    assert moved.isfinite().all()
    # roughly the same way: rounded factors have 3 digits, and the first few gradients leave
    # directions open, which chance decides
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


@every_strategy
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_learning_rate_is_as_good_as_a_number(make: Make, shape: tuple[int, ...]) -> None:
    model, other = _model(), _model()
    lr: float = make.keywords["lr"]  # type: ignore[attr-defined]
    _train(model, make(model), range(6))
    _train(other, make(other, lr=torch.full(shape, lr)), range(6))  # type: ignore[call-arg]
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


@pytest.mark.parametrize("setting", ["legacy", "new"])
def test_decompositions_run_in_full_precision_whatever_the_settings(setting: str) -> None:
    # in a process of its own: torch refuses to go back from the new settings to the old ones
    script = f"""
import torch
from torch import nn
from structprecond import SOAP
if {setting!r} == "legacy":
    torch.set_float32_matmul_precision("medium")
else:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
model = nn.Linear(3, 2)
optimizer = SOAP(model, precondition_frequency=1)
for _ in range(4):
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
if {setting!r} == "legacy":
    assert torch.get_float32_matmul_precision() == "medium"
else:
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", script], check=True)


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


@pytest.mark.parametrize(
    "name",
    "AdamW KLShampoo LARS Muon NorMuon SIRFShampoo SOAP Scion Shampoo".split(),
)
def test_defaults_are_the_documented_ones(name: str) -> None:
    optimizer = getattr(structprecond, name)
    strategy = getattr(structprecond, f"{name}Strategy")
    arguments = (getdoc(optimizer) or "").split("Args:\n")[1].split("\nRaises:")[0]
    own = {f.name: f.default for f in fields(strategy)}
    own |= {key: h.default for key, h in strategy.hyperparameters.items()}
    # the rules by themselves: a ball of radius 1, and Muon's learning rate
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
