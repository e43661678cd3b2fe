"""Parameters that a model replaces are followed by name or refused, and never left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from structprecond import (
    SAM,
    SOAP,
    AdamW,
    GroupError,
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    StructPrecondError,
)
from tests.helpers import SETTINGS, mlp, same_bits, set_grads, sirf, train, values


def _assigned(model: Any) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def _module_replaced(model: Any) -> None:
    other = nn.Linear(4, 4).double()
    other.load_state_dict(model[2].state_dict())
    model[2] = other


def _child_replaced(model: Any) -> None:
    model[2] = torch.compile(model[2], backend="eager")  # other modules, the same parameters


def _registered(model: Any) -> None:
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())


SWAPS = [_assigned, _module_replaced, _child_replaced, _registered]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("rules", [None, (LinearWeightBias(), PerParameter())])
@pytest.mark.parametrize("swap", SWAPS)
def test_replaced_parameters_go_on_with_their_state_to_the_bit(
    swap: Callable[[Any], None], rules: Any, when: int
) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, combine_params=rules, **SETTINGS)
    train(model, optimizer, when)
    twin, reference = copy.deepcopy((model, optimizer))
    swap(model)
    train(model, optimizer, 3, start=when)
    train(twin, reference, 3, start=when)
    assert same_bits(values(model), values(twin))
    params = list(model.parameters())
    assert set(optimizer.state) == set(params)
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True))
    mine, theirs = optimizer.state_dict(), reference.state_dict()
    assert same_bits(mine, theirs)


def test_conversion_to_new_parameters_is_followed() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    train(model, optimizer, 2)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.float()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    before = values(model)
    train(model, optimizer, 1)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_new_parameters_may_be_in_the_groups_already() -> None:
    """Some trainers replace the model's parameters, and put the new ones into the groups."""
    model = mlp()
    optimizer = sirf(model)
    train(model, optimizer, 2)
    twin, reference = copy.deepcopy((model, optimizer))
    _assigned(model)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    train(model, optimizer, 2, start=2)
    train(twin, reference, 2, start=2)
    assert same_bits(values(model), values(twin))


def test_gradients_of_new_parameters_are_cleared_before_the_first_step() -> None:
    model = mlp()
    optimizer = sirf(model)
    _assigned(model)
    set_grads(list(model.parameters()), 0)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_both_passes_of_sam_see_new_parameters() -> None:
    model = mlp()
    sam = SAM(model, AdamW, lr=0.01)
    twin, reference = copy.deepcopy((model, sam))
    _assigned(model)
    for m, o in ((model, sam), (twin, reference)):
        for step in range(2):
            o.zero_grad()
            set_grads(list(m.parameters()), step)
            o.first_step()
            set_grads(list(m.parameters()), step + 5)
            o.second_step()
    assert same_bits(values(model), values(twin))


def test_state_is_loaded_into_new_parameters() -> None:
    model = mlp()
    optimizer = sirf(model)
    train(model, optimizer, 3)
    fresh_model = mlp()
    fresh = sirf(fresh_model)
    fresh_model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    fresh.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2, start=3)
    train(fresh_model, fresh, 2, start=3)
    assert same_bits(values(model), values(fresh_model))


def test_copies_follow_their_own_model() -> None:
    model, optimizer = copy.deepcopy((model := mlp(), sirf(model)))
    _assigned(model)
    before = values(model)
    train(model, optimizer, 1)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# --- several names, other places -----------------------------------------------------------------


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x).tanh())
        return out


def _step(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().mean().backward()
    optimizer.step()


def test_tied_parameters_are_followed_if_they_are_tied_again() -> None:
    model = Tied()
    optimizer = AdamW(model)
    _step(model, optimizer)
    _assigned(model)
    assert model.first.weight is not model.second.weight
    before = values(model)
    with pytest.raises(GroupError, match=r"first\.weight was shared by .*second\.weight.*Tie them"):
        _step(model, optimizer)
    assert same_bits(values(model), before)
    model.second.weight = model.first.weight
    _step(model, optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=False))


def test_new_parameter_under_one_of_two_names_is_refused_until_it_is_added() -> None:
    model = Tied()
    optimizer = AdamW(model)
    model.second.weight = nn.Parameter(torch.randn(3, 3))
    with pytest.raises(GroupError, match=r"holds another parameter in second\.weight"):
        _step(model, optimizer)
    optimizer.add_param_group({"params": [model.second.weight]})
    before = values(model)
    _step(model, optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_tying_two_trained_parameters_is_refused_until_one_is_removed() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    optimizer = AdamW(model)
    old = model[1].weight
    model[1].weight = model[0].weight
    with pytest.raises(GroupError, match=r"1\.weight was replaced.*1\.weight is tied now"):
        _step(model, optimizer)
    assert optimizer.param_groups[0]["params"].pop(1) is old
    _step(model, optimizer)


def test_one_new_parameter_for_two_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    optimizer = AdamW(model)
    model[0].weight = model[1].weight = nn.Parameter(torch.randn(3, 3))
    with pytest.raises(GroupError, match=r"in place of 0\.weight and 1\.weight"):
        _step(model, optimizer)


def test_inserted_layer_is_no_replacement() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = AdamW(model)
    _step(model, optimizer)
    model.insert(0, nn.Linear(3, 3))
    optimizer.add_param_group({"params": model[0].parameters()})
    before = values(model)
    _step(model, optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_parameters_that_move_to_other_names_stay() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = AdamW(model)
    prune.random_unstructured(model[0], "weight", amount=0.3)  # weight_orig
    before = values(model)
    _step(model, optimizer)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# --- refused -------------------------------------------------------------------------------------


def _other_head(model: Any) -> None:
    model[6] = nn.Linear(4, 7).double()


def _integers(model: Any) -> None:
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model[2].weight = p


def _no_values(model: Any) -> None:
    model[2] = nn.Linear(4, 4, device="meta").double()


def _lazy(model: Any) -> None:
    model[2] = nn.LazyLinear(4)


def _reparametrized(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model[2])


def _removed(model: Any) -> None:
    model[2] = nn.Identity()


LOST: dict[str, tuple[Callable[[Any], None], str]] = {
    "another shape": (_other_head, r"6\.weight was replaced.*shape \(7, 4\), expected \(2, 4\)"),
    "integers": (_integers, r"2\.weight was replaced.*int8"),
    "no values": (_no_values, r"2\.(weight|bias).*on meta"),
    "lazy": (_lazy, r"2\.weight was replaced.*no shape yet"),
    "reparametrized": (_reparametrized, r"2\.weight is no longer a parameter of the model"),
    "removed": (_removed, r"2\.weight is no longer a parameter.*Remove it from param_groups"),
}


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize(("change", "message"), LOST.values(), ids=LOST)
def test_parameters_that_cannot_be_followed_are_named(
    change: Callable[[Any], None], message: str, stale: bool
) -> None:
    model = mlp()
    optimizer = SOAP(model)
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    if not stale:
        optimizer.zero_grad()
    kept = {p: p.detach().clone() for p in model.parameters()}
    tensors = copy.deepcopy([b.named_tensors() for b in optimizer.buckets])
    change(model)
    optimizer.zero_grad()
    for p in model.parameters():
        if p.is_floating_point() and not nn.parameter.is_lazy(p):
            p.grad = torch.ones_like(p)
    with pytest.raises(StructPrecondError, match=f"(?s){message}"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in kept.items())
    assert same_bits([b.named_tensors() for b in optimizer.buckets], tensors)


def test_removed_layer_may_be_taken_out_of_the_groups() -> None:
    model = mlp()
    optimizer = sirf(model)
    train(model, optimizer, 1)
    model[2] = nn.Identity()
    own = set(model.parameters())
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if p in own]
    before = values(model)
    train(model, optimizer, 1)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_layers_trained_outside_the_model_go_on() -> None:
    model = mlp()
    optimizer = AdamW(model)
    layer, model[2] = model[2], nn.Identity()
    for step in range(3):
        set_grads([*model.parameters(), *layer.parameters()], step)
        before = layer.weight.detach().clone()
        optimizer.step()
        assert not torch.equal(layer.weight, before)
    layer.weight.grad = None
    with pytest.raises(GroupError, match=r"2\.weight is no longer"):
        optimizer.step()


def test_frozen_parameters_may_leave() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = AdamW(model)
    model[2] = nn.Identity()
    for step in range(2):
        before = values(model)
        set_grads(list(model.parameters()), step)
        optimizer.step()
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert optimizer.global_step == 2


def test_ten_steps_without_any_gradient_warn_once() -> None:
    model = mlp()
    optimizer = AdamW(model.parameters())
    _assigned(model)  # not known to the optimizer: it has no model
    set_grads(list(model.parameters()), 0)
    for _ in range(9):
        optimizer.step()
    with pytest.warns(UserWarning, match="None of the 8 parameters had a gradient in 10 steps"):
        optimizer.step()
    for _ in range(10):
        optimizer.step()


def test_model_that_is_changed_behind_its_modules_is_looked_at_after_an_idle_step() -> None:
    model = mlp()
    optimizer = AdamW(model)
    for module in model:
        module.__dict__["_parameters"] = copy.deepcopy(dict(module._parameters))
    before = values(model)
    for step in range(2):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("why", ["frozen", "empty", "the model is known"])
def test_other_idle_steps_do_not_warn(why: str) -> None:
    model = mlp().requires_grad_(why != "frozen")
    params: list[Any] = list(model.parameters())
    if why == "empty":
        params = [nn.Parameter(torch.ones(0, 3))]
        set_grads(params, 0)
    optimizer = AdamW(model if why == "the model is known" else params)
    for _ in range(11):
        optimizer.step()
