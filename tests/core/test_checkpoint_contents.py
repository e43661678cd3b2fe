"""A checkpoint holds tensors and plain values, and shares no memory with the optimizer."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    PerParameter,
    SIRFShampoo,
)
from tests.helpers import (
    by_pickle,
    mlp,
    same_bits,
    saved_bytes,
    sirf,
    snapshot,
    through_a_file,
    train,
)

# --- what is in a checkpoint ---------------------------------------------------------------------


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(k) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return type(value) in (bool, int, float, str, type(None), Tensor)


class CustomRule(PerParameter):
    """A grouping whose class exists only here."""


def test_checkpoints_contain_tensors_and_plain_values_only() -> None:
    model = mlp()
    optimizer = sirf(
        model,
        T=lambda step: True,
        structures={1: "diagonal", 2: ("hierarchical1_1", "dense")},
        preconditioner_dtypes={1: None, 2: (torch.bfloat16, torch.float32)},
        combine_params=(CustomRule(),),
    )
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    assert _plain(saved)
    assert set(saved) == {"state", "param_groups"}
    assert same_bits(through_a_file(saved), saved)


@pytest.mark.parametrize("number", [np.float64(0.25), np.float32(0.25)])
def test_numpy_numbers_are_saved_as_plain_ones(number: Any) -> None:
    # numpy schedules put such numbers into param groups; torch.load refuses them
    model = mlp()
    optimizer = sirf(model)
    optimizer.param_groups[0]["lr"] = number
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["lr"] == 0.25
    assert _plain(saved)


def test_state_dict_has_torchs_layout() -> None:
    model = mlp()
    groups = [{"params": model[4:].parameters()}, {"params": model[:4].parameters()}]
    optimizer = sirf(model, groups)
    reference = torch.optim.SGD(
        [{"params": model[4:].parameters()}, {"params": model[:4].parameters()}], lr=0.1
    )
    saved = optimizer.state_dict()
    for mine, theirs in zip(
        saved["param_groups"], reference.state_dict()["param_groups"], strict=True
    ):
        assert mine["params"] == theirs["params"]
    places = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in saved["state"].items():
        assert same_bits(entry, dict(optimizer.state[places[i]]))


def test_state_dict_shares_no_memory_with_the_optimizer() -> None:
    model = mlp()
    optimizer = sirf(model, lr=torch.tensor(0.1))
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    train(model, optimizer, 2, start=2)
    optimizer.param_groups[0]["lr"].fill_(0.5)
    assert same_bits(saved, kept)
    before = snapshot(model, optimizer)
    for entry in saved["state"].values():
        for tensor in entry.values():
            tensor.fill_(1)
    saved["param_groups"][0]["lr"].fill_(7.0)
    assert same_bits(snapshot(model, optimizer), before)


def test_loading_neither_changes_nor_keeps_the_callers_dict() -> None:
    model = mlp()
    optimizer = sirf(model, lr=torch.tensor(0.1))
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    ids = [(id(saved["state"][i]), id(entry["step"])) for i, entry in saved["state"].items()]
    fresh_model = mlp()
    fresh = sirf(fresh_model, lr=torch.tensor(0.3))
    fresh.load_state_dict(saved)
    assert same_bits(saved, kept)
    assert ids == [(id(saved["state"][i]), id(e["step"])) for i, e in saved["state"].items()]
    train(fresh_model, fresh, 2)
    fresh.param_groups[0]["lr"].fill_(0.5)
    assert same_bits(saved, kept)


def test_one_unit_does_not_drag_its_stack_into_the_file() -> None:
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(30))
    optimizer = sirf(model, batch_size=1)
    assert optimizer.buckets[0].rows == 30
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        for tensor in entry.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
    # two factors, two momenta, one buffer, and the zip
    assert len(saved_bytes(saved["state"][0])) < 5 * 16 * 16 * 4 + 8192


@pytest.mark.parametrize("dumps", [pickle.dumps, saved_bytes])
def test_pickled_optimizer_writes_every_stack_once(dumps: Callable[[Any], bytes]) -> None:
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(30))
    optimizer = sirf(model, batch_size=1)
    state = sum(t.nbytes for bucket in optimizer.buckets for t in bucket.named_tensors().values())
    parameters = sum(p.nbytes for p in model.parameters())
    assert len(dumps(optimizer)) < 1.2 * (state + parameters) + 60_000


# --- attributes beside state ---------------------------------------------------------------------


def _through_load(model: nn.Module, optimizer: SIRFShampoo) -> SIRFShampoo:
    fresh = SIRFShampoo(mlp(), structures={1: "none", 2: ("dense", "hierarchical1_1")})
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    return fresh


WAYS: dict[str, Callable[[nn.Module, SIRFShampoo], SIRFShampoo]] = {
    "load": _through_load,
    "deepcopy": lambda model, optimizer: copy.deepcopy(optimizer),
    "pickle": lambda model, optimizer: by_pickle(optimizer),
}


def _dense(value: Any) -> Any:
    """Convert tuples of structured matrices to lists of dense tensors."""
    if isinstance(value, list | tuple):
        return [_dense(entry) for entry in value]
    return value.to_dense() if hasattr(value, "to_dense") else value


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_state_attributes_survive_every_way_of_copying(
    way: Callable[[nn.Module, SIRFShampoo], SIRFShampoo],
) -> None:
    model = mlp()
    optimizer = sirf(model, structures={1: "none", 2: ("dense", "hierarchical1_1")})
    train(model, optimizer, 3)
    expected = {name: _dense(getattr(optimizer, name)) for name in optimizer.STATE_ATTRIBUTES}
    names = {"global_step", "batch_size", "preconditioner", "preconditioner_momenta"}
    assert set(expected) == names
    assert (expected["global_step"], expected["batch_size"]) == (3, 6)
    other = way(model, optimizer)
    for name, value in expected.items():
        assert same_bits(_dense(getattr(other, name)), value), name
    train(model, optimizer, 1)
    assert same_bits(_dense(other.preconditioner), expected["preconditioner"])
