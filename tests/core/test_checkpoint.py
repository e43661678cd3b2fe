"""A checkpoint restores training bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR

from structprecond import (
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    SIRFShampooStrategy,
    SplitHeads,
    StructuredOptimizer,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    backward,
    by_pickle,
    mlp,
    same_bits,
    set_grads,
    sirf,
    snapshot,
    through_a_file,
    train,
    values,
)

STRUCTURES: dict[str, Any] = {
    name: name
    for name in (
        "dense",
        "diagonal",
        "block3diagonal",
        "hierarchical2_1",
        "triltoeplitz",
        "triutoeplitz",
        "triltopleftdiag",
        "trilbottomrightdiag",
        "triutopleftdiag",
        "triubottomrightdiag",
        "none",
    )
} | {"mixed": {1: "diagonal", 2: ("block3diagonal", "none"), 4: "dense"}}


def continue_training(
    model: nn.Module, optimizer: StructuredOptimizer, steps: int, start: int
) -> list[Any]:
    """Train on, and return everything after every step."""
    snapshots = []
    for step in range(start, start + steps):
        train(model, optimizer, 1, start=step)
        snapshots.append(snapshot(model, optimizer))
    return snapshots


# --- restoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("structures", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_training_resumes_to_the_bit(structures: Any) -> None:
    model = mlp()
    optimizer = sirf(model, structures=structures, T=2)
    train(model, optimizer, 5)
    weights, saved = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    expected = continue_training(model, optimizer, 20, start=5)

    fresh_model = mlp()  # other values, on which nothing may depend
    fresh = sirf(fresh_model, structures=structures, T=2)
    fresh_model.load_state_dict(weights)
    fresh.load_state_dict(saved)
    actual = continue_training(fresh_model, fresh, 20, start=5)
    for a, e in zip(actual, expected, strict=True):
        for key in ("params", "shown", "stacks", "counters"):
            assert same_bits(a[key], e[key]), key


@pytest.mark.parametrize("rule", [LinearWeightBias(), SplitHeads("*.weight", heads=2)])
def test_training_with_joint_and_split_parameters_resumes_to_the_bit(rule: Any) -> None:
    kwargs: dict[str, Any] = {"combine_params": (rule, PerParameter()), "structures": "dense"}
    model = mlp()
    optimizer = sirf(model, **kwargs)
    train(model, optimizer, 5)
    weights, saved = copy.deepcopy(model.state_dict()), through_a_file(optimizer.state_dict())
    expected = continue_training(model, optimizer, 20, start=5)
    fresh_model = mlp()
    fresh = sirf(fresh_model, **kwargs)
    fresh_model.load_state_dict(weights)
    fresh.load_state_dict(saved)
    actual = continue_training(fresh_model, fresh, 20, start=5)
    assert same_bits([a["params"] for a in actual], [e["params"] for e in expected])


def test_schedulers_groups_and_step_counts_of_single_units_resume_to_the_bit(
    tmp_path: Path,
) -> None:
    def build() -> tuple[Any, SIRFShampoo, LambdaLR]:
        model = mlp()
        groups = [{"params": model[4:].parameters()}, {"params": model[:4].parameters(), "lr": 0.2}]
        optimizer = sirf(model, groups, T=lambda step: step % 3 == 0)
        return model, optimizer, LambdaLR(optimizer, [lambda e: 0.9**e, lambda e: 1 / (1 + e)])

    def go(model: Any, optimizer: SIRFShampoo, scheduler: LambdaLR, steps: range) -> list[Tensor]:
        for step in steps:
            optimizer.zero_grad()
            backward(model, step)
            if step < 7:
                model[2].weight.grad = None  # late, and overdue for a refresh
            optimizer.step()
            scheduler.step()
        return values(model)

    model, optimizer, scheduler = build()
    go(model, optimizer, scheduler, range(5))
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({key: part.state_dict() for key, part in parts.items()}, tmp_path / "checkpoint.pt")
    expected = go(model, optimizer, scheduler, range(5, 15))
    model, optimizer, scheduler = build()
    saved = torch.load(tmp_path / "checkpoint.pt")
    for key, part in {"model": model, "optimizer": optimizer, "scheduler": scheduler}.items():
        part.load_state_dict(saved[key])
    assert optimizer.param_groups[1]["lr"] == 0.2 / 6
    assert same_bits(go(model, optimizer, scheduler, range(5, 15)), expected)


@pytest.mark.parametrize("copier", ["checkpoint", "deepcopy", "pickle"])
def test_staggered_refreshes_resume_to_the_bit(copier: str) -> None:
    def build(model: nn.Module) -> StructuredOptimizer:
        return StructuredOptimizer(
            model,
            strategy=SIRFShampooStrategy(),
            hyperparameters={**SETTINGS, "T": 3},
            refresh="staggered",
            batch_size=6,
        )

    model = mlp()
    optimizer = build(model)
    for step in range(4):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    if copier == "checkpoint":
        other: Any = copy.deepcopy(model)
        fresh: Any = build(other)
        fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        pair = (model, optimizer)
        other, fresh = copy.deepcopy(pair) if copier == "deepcopy" else by_pickle(pair)
    for step in range(4, 12):
        for m, o in ((model, optimizer), (other, fresh)):
            set_grads(list(m.parameters()), step)
            o.step()
        assert same_bits(values(other), values(model))


@pytest.mark.filterwarnings("ignore:The gradients of")
def test_skipped_steps_are_remembered() -> None:
    model = mlp()
    optimizer = sirf(model, batch_size=6)
    set_grads(list(model.parameters()), 0)
    model[0].bias.grad[0] = torch.nan
    optimizer.step()
    fresh = sirf(mlp(), batch_size=6)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    assert fresh.skipped == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_state_of_low_precision_parameters_stays_float32(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    optimizer = sirf(model, batch_size=6)
    for step in range(4):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    floating = {
        t.dtype
        for entry in saved["state"].values()
        for t in entry.values()
        if t.is_floating_point()
    }
    assert floating == {torch.float32}
    fresh_model = copy.deepcopy(model)
    fresh = sirf(fresh_model, batch_size=6)
    fresh.load_state_dict(saved)
    # bits beyond the dtype of the parameters are kept
    buffer = fresh.state[fresh_model[0].weight]["momentum_buffer"]
    assert not torch.equal(buffer, buffer.to(dtype).float())
    for step in range(4, 10):
        for m, o in ((model, optimizer), (fresh_model, fresh)):
            set_grads(list(m.parameters()), step)
            o.step()
    assert same_bits(snapshot(fresh_model, fresh)["stacks"], snapshot(model, optimizer)["stacks"])
    assert same_bits(values(fresh_model), values(model))


def test_state_is_loaded_into_the_dtypes_of_the_optimizer() -> None:
    model = mlp()
    optimizer = sirf(model)
    train(model, optimizer, 3)
    fresh_model = mlp()
    fresh = sirf(fresh_model, preconditioner_dtypes=torch.float32)
    fresh.load_state_dict(optimizer.state_dict())
    entry = fresh.state[fresh_model[0].weight]
    original = optimizer.state[model[0].weight]
    assert entry["preconditioner.0.mat"].dtype == torch.float32
    assert_close(entry["preconditioner.0.mat"].double(), original["preconditioner.0.mat"], 1e-7)
    assert fresh.param_groups[0]["preconditioner_dtypes"] is torch.float32
    optimizer.load_state_dict(fresh.state_dict())
    assert optimizer.param_groups[0]["preconditioner_dtypes"] is None


def test_parameters_are_matched_by_name_when_they_are_registered_in_another_order() -> None:
    class Net(nn.Module):
        def __init__(self, names: str) -> None:
            super().__init__()
            for name in names:
                self.add_module(name, nn.Linear(3, 3).double())

    model, other = Net("abc"), Net("cab")
    optimizer, fresh = sirf(model, batch_size=2), sirf(other, batch_size=2)
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert list(mine) != list(theirs)
    for name, p in mine.items():
        assert same_bits(dict(fresh.state[theirs[name]]), dict(optimizer.state[p])), name


def test_parameters_without_names_are_matched_by_order() -> None:
    model, other = mlp(), mlp()
    optimizer, fresh = (
        SIRFShampoo(m.parameters(), batch_size=6, **SETTINGS) for m in (model, other)
    )
    train(model, optimizer, 3)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(dict(fresh.state[q]), dict(optimizer.state[p]))


# --- torch.distributed.checkpoint ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("flat", "rule", "frozen"),
    [
        (False, PerParameter(), False),
        # flattened groups return with the keys of live groups
        (True, PerParameter(), False),
        # torch requires an entry for every parameter
        (False, LinearWeightBias(), False),
        # torch leaves out the state of frozen parameters
        (False, PerParameter(), True),
    ],
    ids=["nested", "flat", "joint parameters", "frozen parameters"],
)
def test_state_dicts_by_parameter_name_restore_training(
    flat: bool, rule: Any, frozen: bool
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def build() -> tuple[Any, SIRFShampoo]:
        model = mlp()
        model[2].requires_grad_(not frozen)
        groups = [{"params": model[4:].parameters()}, {"params": model[:4].parameters()}]
        return model, sirf(model, groups, combine_params=(rule, PerParameter()))

    model, optimizer = build()
    train(model, optimizer, 3)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    weights = copy.deepcopy(model.state_dict())
    fresh_model, fresh = build()
    fresh_model.load_state_dict(weights)
    set_optimizer_state_dict(fresh_model, fresh, saved, options=options)
    train(model, optimizer, 3, start=3)
    train(fresh_model, fresh, 3, start=3)
    assert same_bits(values(fresh_model), values(model))
