"""SAM shares param groups and state with its base."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, Optimizer

from structprecond import (
    SAM,
)
from tests.helpers import (
    assert_close,
    mlp,
    same_bits,
    values,
)
from tests.sharpness.helpers import BASES, Groups, one, square, train, train_by_hand


@pytest.mark.parametrize("base", ["SGD", "AdamW", "SIRFShampoo"])
def test_shares_groups_state_and_defaults_also_after_loading(base: str) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    sam = SAM(model, cls, rho=0.4, **kwargs)
    for _ in range(2):
        assert sam.param_groups is sam.base_optimizer.param_groups
        assert sam.state is sam.base_optimizer.state
        assert sam.defaults is sam.base_optimizer.defaults
        assert not {"rho", "adaptive"} & set(sam.defaults)
        train(model, sam, 1)
        sam.load_state_dict(sam.state_dict())
    sam.param_groups[0]["lr"] = 0.0
    before = values(model)
    train(model, sam, 1)
    if base != "AdamW":
        assert same_bits(values(model), before)


def test_state_may_be_reset() -> None:
    model = mlp()
    sam = SAM(model, SGD, lr=0.1, momentum=0.9)
    train(model, sam, 2)
    sam.state = type(sam.state)(dict)
    assert not sam.base_optimizer.state


def test_is_an_optimizer_with_all_its_parts() -> None:
    sam = SAM([one(1.0)], SGD, lr=0.1)
    plain = SGD([one(1.0)], lr=0.1)
    assert isinstance(sam, Optimizer)
    missing = [name for name in vars(plain) if not hasattr(sam, name)]
    assert missing in ([], ["_warned_capturable_if_run_uncaptured"])


@pytest.mark.parametrize("base", ["SGD", "SOAP"])
def test_add_param_group(base: str) -> None:
    cls, kwargs = BASES[base]
    model = square()
    twin = copy.deepcopy(model)
    params, own = dict(model.named_parameters()), dict(twin.named_parameters())
    names = list(params)
    sam = SAM([params[n] for n in names[:2]], cls, rho=0.4, **kwargs)
    sam.add_param_group({"params": [params[n] for n in names[2:5]], "rho": 0.2, "lr": 0.01})
    sam.add_param_group({"params": [params[n] for n in names[5:]], "adaptive": False})
    groups: Groups = [(names[:2], 0.4, True), (names[2:5], 0.2, True), (names[5:], 0.4, False)]
    assert [(g["rho"], g["adaptive"]) for g in sam.param_groups] == [g[1:] for g in groups]
    reference = cls([own[n] for n in names[:2]], **kwargs)
    reference.add_param_group({"params": [own[n] for n in names[2:5]], "lr": 0.01})
    reference.add_param_group({"params": [own[n] for n in names[5:]]})
    train(model, sam, 3)
    train_by_hand(twin, reference, groups, 3)
    assert_close(values(model), values(twin), 1e-9)


def test_group_that_was_added_to_the_base_gets_the_defaults() -> None:
    p, q = one(0.0), one(0.0)
    sam = SAM([p], SGD, rho=0.5, adaptive=False, lr=0.1)
    sam.base_optimizer.add_param_group({"params": [q]})
    p.grad, q.grad = torch.tensor([3.0]), torch.tensor([4.0])
    sam.first_step()
    assert_close(torch.tensor([p.item(), q.item()]), torch.tensor([0.3, 0.4]), 1e-6)


@pytest.mark.parametrize("manual", [False, True])
def test_group_added_between_the_passes(manual: bool) -> None:
    p, q = one(1.0, grad=[1.0]), one(1.0)
    sam = SAM([p], SGD, rho=0.5, lr=1.0)
    sam.first_step()
    sam.add_param_group({"params": [q]})
    p.grad = q.grad = torch.ones(1)
    sam.second_step()
    assert (p.item(), q.item()) == (0.0, 0.0)
