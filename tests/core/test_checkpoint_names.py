"""Parameters are matched by name: names that repeat, joint units, and torch's own state dicts."""

from __future__ import annotations

import copy
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from structprecond import (
    SOAP,
    AdamW,
    CheckpointError,
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    StructPrecondError,
)
from tests.helpers import (
    SETTINGS,
    assert_refused,
    mlp,
    same_bits,
    set_grads,
    sirf,
    through_a_file,
    train,
    values,
)


def _step(optimizer: Any, params: list[Any], steps: int = 3) -> None:
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()


# --- names that repeat ---------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_equal_names_of_actor_and_critic_are_matched_by_order(groups: int) -> None:
    def build() -> tuple[list[Any], Any]:
        actor, critic = nn.Linear(3, 2), nn.Linear(3, 2)
        both = [*actor.named_parameters(), *critic.named_parameters()]
        given = [{"params": both[:2]}, {"params": both[2:], "lr": 0.1}]
        return [p for _, p in both], SOAP(both if groups == 1 else given)

    params, optimizer = build()
    _step(optimizer, params)
    others, fresh = build()
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params, others, strict=True):
        assert same_bits(dict(fresh.state[q]), dict(optimizer.state[p]))
    assert not torch.equal(fresh.state[others[0]]["exp_avg"], fresh.state[others[2]]["exp_avg"])


def test_names_that_repeat_another_number_of_times_do_not_fit() -> None:
    def build(*names: str) -> Any:
        return AdamW([(name, nn.Parameter(torch.ones(3))) for name in names])

    with pytest.raises(CheckpointError, match=r"(?s)a: not in the checkpoint.*b: not in the opt"):
        build("a", "a", "b").load_state_dict(build("a", "b", "b").state_dict())


def test_groups_in_another_order_are_matched_by_names() -> None:
    def build(*order: int) -> tuple[Any, Any]:
        model = mlp()
        groups = [
            {"params": model[:2].parameters(), "lr": 0.5},
            {"params": model[2:4].parameters(), "lr": 0.25},
            {"params": model[4:].parameters()},
        ]
        return model, sirf(model, [groups[i] for i in order])

    model, optimizer = build(0, 1, 2)
    train(model, optimizer, 3)
    fresh_model, fresh = build(2, 0, 1)
    fresh_model.load_state_dict(model.state_dict())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [group["lr"] for group in fresh.param_groups] == [SETTINGS["lr"], 0.5, 0.25]
    train(model, optimizer, 2, start=3)
    train(fresh_model, fresh, 2, start=3)
    assert same_bits(values(fresh_model), values(model))


# --- joint units and torch.distributed.checkpoint ------------------------------------------------


class Net(nn.Module):
    """Layers whose parameters are registered in a given order."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        for layer in self.layers:
            own = dict(layer.named_parameters())
            for name in own:
                delattr(layer, name)
            for name in sorted(own, key=lambda name: name != first):
                layer.register_parameter(name, own[name])


JOINT = (LinearWeightBias(), PerParameter())


@pytest.mark.parametrize("way", ["own", "nested", "flat", "full"])
@pytest.mark.parametrize("rules", [None, JOINT], ids=["apart", "joint"])
@pytest.mark.parametrize("first", ["weight", "bias"])
def test_parameters_are_matched_by_name_in_any_order(first: str, rules: Any, way: str) -> None:
    options = StateDictOptions(
        full_state_dict=way == "full", flatten_optimizer_state_dict=way == "flat"
    )

    def build(first: str) -> tuple[Any, Any]:
        model = Net(first)
        return model, SOAP(model, combine_params=rules, betas=(0.9, 0.95))

    model, optimizer = build("weight")
    _step(optimizer, [p for _, p in sorted(model.named_parameters())])
    other, fresh = build(first)
    if way == "own":
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        saved = get_optimizer_state_dict(model, optimizer, options=options)
        set_optimizer_state_dict(other, fresh, saved, options=options)
    mine = dict(model.named_parameters())
    for name, p in other.named_parameters():
        assert same_bits(dict(fresh.state[p]), dict(optimizer.state[mine[name]])), name
    assert fresh.param_groups[0]["betas"] == (0.9, 0.95)
    assert fresh.param_groups[0]["param_names"] == [name for name, _ in other.named_parameters()]
    other.load_state_dict(model.state_dict())
    for m, o in ((model, optimizer), (other, fresh)):
        _step(o, [p for _, p in sorted(m.named_parameters())])
    assert all(torch.equal(p, mine[name]) for name, p in other.named_parameters())


# --- numbers -------------------------------------------------------------------------------------


NUMBERS = [
    np.array(0.25), np.float64(0.25), np.float32(0.25), Fraction(1, 4),
    Decimal("0.25"),
]  # fmt: skip


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers_of_any_kind_become_plain_ones_at_construction(number: Any) -> None:
    model = mlp()
    for optimizer in (
        SOAP(model, lr=number, betas=(number, 0.5)),
        SOAP(model, [{"params": model.parameters(), "lr": number, "betas": (number, 0.5)}]),
    ):
        group = optimizer.param_groups[0]
        assert (type(group["lr"]), group["lr"]) == (float, 0.25)
        assert [type(beta) for beta in group["betas"]] == [float, float]
        _step(optimizer, list(model.parameters()))
        fresh = SOAP(mlp(), lr=1.0)
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
        assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["betas"]) == (0.25, (0.25, 0.5))


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_numbers_that_save_also_load(number: Any) -> None:
    optimizer = sirf(mlp())
    optimizer.param_groups[0]["lr"] = number
    fresh = sirf(mlp())
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert (type(fresh.param_groups[0]["lr"]), fresh.param_groups[0]["lr"]) == (float, 0.25)


@pytest.mark.parametrize("number", [np.int64(3), np.array(3)], ids=repr)
def test_integers_stay_integers(number: Any) -> None:
    optimizer = SOAP(mlp(), precondition_frequency=number)
    assert type(optimizer.param_groups[0]["precondition_frequency"]) is int


@pytest.mark.parametrize("number", [np.ones(2), Decimal("nan"), Fraction(-1, 4), np.array("x")])
def test_other_values_are_refused(number: Any) -> None:
    with pytest.raises(StructPrecondError, match="lr must be"):
        SOAP(mlp(), lr=number)
    assert_refused(lambda model: SOAP(model, lr=number), "lr must be")


@pytest.mark.parametrize("saved_as", [torch.float64, float])
@pytest.mark.parametrize("loaded_as", [torch.float64, float])
def test_learning_rate_keeps_its_digits(saved_as: Any, loaded_as: Any) -> None:
    def build(kind: Any, value: float) -> SIRFShampoo:
        return sirf(mlp(), lr=value if kind is float else torch.tensor(value, dtype=kind))

    optimizer, fresh = build(saved_as, 0.1), build(loaded_as, 0.3)
    kept = copy.copy(fresh.param_groups[0]["lr"])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    loaded = fresh.param_groups[0]["lr"]
    assert type(loaded) is type(kept)
    assert float(loaded) == 0.1
