"""Taking over torch's AdamW, against torch's AdamW that goes on."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import AdamW, LinearWeightBias, Muon, load_adamw
from structprecond.errors import CheckpointError

SETTINGS: dict[str, Any] = {"lr": 0.05, "betas": (0.8, 0.95), "weight_decay": 0.1}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))


def train(model, optimizer, steps, first=0):
    for i in range(first, first + steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        optimizer.step()


def trained(named=False, **more):
    model = network()
    params = model.named_parameters() if named else model.parameters()
    optimizer = torch.optim.AdamW(params, **SETTINGS, **more)
    train(model, optimizer, 5)
    return model, optimizer


@pytest.mark.parametrize("named", [False, True])
def test_adamw_goes_on_as_torch_does(named):
    model, optimizer = trained(named)
    ours = copy.deepcopy(model)
    made = AdamW(ours, **SETTINGS)
    names = load_adamw(made, optimizer.state_dict())
    assert names == [name for name, _ in model.named_parameters()]
    train(model, optimizer, 5, first=5)
    train(ours, made, 5, first=5)
    for p, q in zip(model.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-6)


def test_the_adamw_part_of_muon_is_loaded_and_the_rest_starts_anew():
    model, optimizer = trained()
    made = Muon(model)
    names = load_adamw(made, optimizer.state_dict())
    assert names == ["0.bias", "2.bias", "4.weight", "4.bias"]
    for name in names:
        p = model.get_parameter(name)
        assert torch.equal(made.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])
        assert torch.equal(made.state[p]["exp_avg_sq"], optimizer.state[p]["exp_avg_sq"])
        assert int(made.state[p]["step"]) == 5
    assert int(made.state[model[0].weight]["step"]) == 0
    assert not made.state[model[0].weight]["momentum_buffer"].any()


def test_parameters_without_state_start_anew():
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS)
    train(model, optimizer, 2)
    model[0].requires_grad_(True)
    made = AdamW(model)
    assert "0.weight" not in load_adamw(made, optimizer.state_dict())
    assert int(made.state[model[0].weight]["step"]) == 0


def refusal(optimizer, state_dict):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError) as caught:
        load_adamw(optimizer, state_dict)
    after = optimizer.state_dict()["state"]
    for i, entries in before["state"].items():
        assert all(torch.equal(after[i][key], tensor) for key, tensor in entries.items())
    return str(caught.value)


def test_what_does_not_fit_is_refused_and_changes_nothing():
    model, optimizer = trained()
    state = optimizer.state_dict()
    assert "Expected the state dict" in refusal(AdamW(model), {"model": 1})
    assert "4 parameters without names" not in refusal(AdamW(model[:3]), state)
    assert "has 6 parameters without names, the optimizer 4" in refusal(AdamW(model[:3]), state)
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    assert "shape (6, 4) in the checkpoint, (5, 4)" in refusal(AdamW(other), state)
    sgd = torch.optim.SGD(model.parameters(), momentum=0.9)
    train(model, sgd, 1)
    assert "not the state of AdamW" in refusal(AdamW(model), sgd.state_dict())
    grouped = AdamW(model, combine_params=(LinearWeightBias(),))
    assert "one unit with other parameters" in refusal(grouped, state)
    model, amsgrad = trained(amsgrad=True)
    assert "amsgrad" in refusal(AdamW(model), amsgrad.state_dict())
    _, named = trained(named=True)
    assert "no parameter called" in refusal(
        AdamW(nn.Sequential(nn.Identity(), model)), named.state_dict()
    )
