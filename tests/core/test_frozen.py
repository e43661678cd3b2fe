"""Frozen parameters have no state, and cost nothing, until they are thawed."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import SOAP, AdamW, Muon, SIRFShampoo, describe
from structprecond.errors import CheckpointError
from tests.every_strategy import MAKERS
from tests.helpers import mlp, same_bits, set_grads, values

COUNTERS = {"global_step", "batch_size"}


class Adapted(nn.Module):
    """A frozen layer with a low-rank adapter, as in LoRA."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down = nn.Linear(width, 2, bias=False)
        self.up = nn.Linear(2, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


def _bytes(optimizer: Any) -> int:
    return sum(t.nbytes for bucket in optimizer.buckets for t in bucket.named_tensors().values())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_adapters_on_a_frozen_base_have_the_state_of_adapters_alone(
    make: Callable[..., Any],
) -> None:
    model, adapters = nn.Sequential(*(Adapted(12) for _ in range(3))), nn.ModuleDict()
    for i, layer in enumerate(model):
        parts: Any = {"down": layer.down, "up": layer.up}
        adapters[str(i)] = nn.ModuleDict(parts)
    optimizer, alone = make(model), make(adapters)
    assert _bytes(optimizer) == _bytes(alone) > 0
    for name, p in model.named_parameters():
        assert (set(optimizer.state[p]) == COUNTERS) == ("base" in name)
    before = [p.clone() for p in model.parameters()]
    set_grads([p for p in model.parameters() if p.requires_grad], 0)
    for _ in range(2):
        optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [p.requires_grad for p in model.parameters()]
    assert _bytes(optimizer) == _bytes(alone)


def test_a_frozen_base_that_would_not_fit_into_memory_is_no_matter() -> None:
    # a dense factor of the long axis would take 16 TB
    base = nn.Parameter(torch.zeros(2_000_000, 1), requires_grad=False)
    optimizer = SIRFShampoo([("base", base), ("w", nn.Parameter(torch.zeros(3, 2)))], batch_size=1)
    assert _bytes(optimizer) < 1000


def test_thawing_one_of_many_layers_gives_state_to_that_one() -> None:
    model: Any = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5))).requires_grad_(False)
    optimizer = SOAP(model)
    assert optimizer.buckets == []
    model[3].requires_grad_(True)
    set_grads(list(model[3].parameters()), 0)
    optimizer.step()
    live = {unit.label for bucket in optimizer.buckets for unit in bucket.units}
    assert live == {"3.weight", "3.bias"}
    assert {unit.unit.label for unit in optimizer.frozen_units} == {
        f"{i}.{name}" for i in (0, 1, 2, 4) for name in ("weight", "bias")
    }
    assert bool(optimizer.state[model[3].weight]["initialized"])
    shown = str(describe(optimizer))
    assert shown.count("(frozen)") == 2
    assert "0.weight (+3) (frozen)" in shown


def test_a_thawed_layer_trains_as_in_an_optimizer_of_its_own() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    alone = copy.deepcopy(model[2]).requires_grad_(True)
    optimizer, fresh = SOAP(model, lr=0.1), SOAP(alone, lr=0.1)
    for step in range(6):
        if step == 2:
            model[2].requires_grad_(True)
        set_grads([p for p in model.parameters() if p.requires_grad], step)
        optimizer.step()
        if step >= 2:
            for p, q in zip(alone.parameters(), model[2].parameters(), strict=True):
                p.grad = q.grad
            fresh.step()
    # equal up to rounding: alone in a stack here, with others there
    for p, q in zip(alone.parameters(), model[2].parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-12


def _saved(model: nn.Module, optimizer: Any) -> list[Any]:
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    return list(torch.load(file))


@pytest.mark.parametrize("thawed_at", [0, 2, 9])
def test_a_run_resumes_whatever_was_thawed_before_it_was_saved(thawed_at: int) -> None:
    def build() -> tuple[Any, Any]:
        model = mlp()
        model[2].requires_grad_(False)
        return model, SOAP(model, lr=0.1, precondition_frequency=2)

    def train(model: Any, optimizer: Any, steps: range) -> None:
        for step in steps:
            model[2].requires_grad_(step >= thawed_at)
            set_grads([p for p in model.parameters() if p.requires_grad], step)
            optimizer.step()

    model, optimizer = build()
    train(model, optimizer, range(5))
    resumed, again = build()
    weights, state = _saved(model, optimizer)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(model, optimizer, range(5, 12))
    train(resumed, again, range(5, 12))
    assert same_bits(values(model), values(resumed))


def test_state_of_a_layer_that_was_frozen_when_it_was_saved_stays_fresh() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = AdamW(model)
    set_grads([p for p in model.parameters() if p.requires_grad], 0)
    optimizer.step()
    thawed = copy.deepcopy(model).requires_grad_(True)
    other = AdamW(thawed)
    other.load_state_dict(optimizer.state_dict())
    assert other.state[thawed[0].weight]["step"] == 0
    assert other.state[thawed[2].weight]["step"] == 1
    set_grads(list(thawed.parameters()), 1)
    other.step()
    with pytest.raises(CheckpointError, match=r"0\.weight: missing"):
        other.load_state_dict(optimizer.state_dict())


def test_a_refused_checkpoint_thaws_nothing() -> None:
    model = mlp()
    whole = SOAP(model)
    set_grads(list(model.parameters()), 0)
    whole.step()
    saved = whole.state_dict()
    damaged = copy.deepcopy(saved)
    damaged["state"][2]["exp_avg"] = torch.zeros(7)
    frozen = mlp()
    frozen[0].requires_grad_(False)
    optimizer = SOAP(frozen)
    stacks, size = list(optimizer.buckets), _bytes(optimizer)
    with pytest.raises(CheckpointError, match="exp_avg is"):
        optimizer.load_state_dict(damaged)
    assert [r.unit.label for r in optimizer.frozen_units] == ["0.weight", "0.bias"]
    assert (optimizer.buckets, _bytes(optimizer)) == (stacks, size)
    assert set(optimizer.state[frozen[0].weight]) == COUNTERS
    optimizer.load_state_dict(saved)
    assert not optimizer.frozen_units
    for i, p in enumerate(frozen.parameters()):
        assert same_bits(dict(optimizer.state[p]), saved["state"][i])


def test_copies_keep_frozen_units_apart() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = Muon(model)
    twin, other = copy.deepcopy((model, optimizer))
    twin[2].requires_grad_(True)
    set_grads(list(twin.parameters()), 0)
    before = [p.clone() for p in twin[2].parameters()]
    other.step()
    assert not any(torch.equal(p, q) for p, q in zip(twin[2].parameters(), before, strict=True))
    assert other.frozen_units == []
    assert len(optimizer.frozen_units) == 2
