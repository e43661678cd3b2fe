"""Rows keep their turns among staggered refreshes, whatever is added, changed or loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import SIRFShampoo, SIRFShampooStrategy, StructuredOptimizer
from tests.helpers import SETTINGS, matrices, mlp, same_bits, set_grads, through_a_file, values


def _build(model: Any, params: Any = None, refresh: Any = "staggered", **kwargs: Any) -> Any:
    return StructuredOptimizer(
        model,
        params,
        strategy=SIRFShampooStrategy(),
        hyperparameters={**SETTINGS, "T": 4, **kwargs},
        refresh=refresh,
        batch_size=6,
    )


def _go_on(model: nn.Module, optimizer: Any, steps: Sequence[int]) -> dict[str, list[int]]:
    """Make steps; return in which of them each parameter was refreshed."""
    own = {p for group in optimizer.param_groups for p in group["params"]}
    names = {p: n for n, p in model.named_parameters() if p in own}
    refreshed: dict[str, list[int]] = {name: [] for name in names.values()}
    for step in steps:
        set_grads([p for _, p in sorted(model.named_parameters())], step)
        before = {p: optimizer.state[p]["preconditioner.0.mat"].clone() for p in names}
        optimizer.step()
        for p, name in names.items():
            if not torch.equal(optimizer.state[p]["preconditioner.0.mat"], before[p]):
                refreshed[name].append(step)
    return refreshed


def test_added_group_moves_no_turns_and_takes_the_free_ones() -> None:
    model = nn.ModuleDict({"a": matrices(2), "b": matrices(2)})
    optimizer = _build(model, model["a"].parameters())
    before = _go_on(model, optimizer, range(5))
    assert before == {"a.0": [0, 4], "a.1": [3]}
    optimizer.add_param_group({"params": model["b"].parameters()})
    after = _go_on(model, optimizer, range(5, 17))
    assert after["a.0"] == [8, 12, 16]
    assert after["a.1"] == [7, 11, 15]
    assert sorted(steps[0] % 4 for steps in after.values()) == [0, 1, 2, 3]


def test_turns_of_the_others_stay_to_the_bit_when_a_group_is_added() -> None:
    model = nn.ModuleDict({"a": matrices(3), "b": matrices(3)})
    optimizer = _build(model, model["a"].parameters())
    twin, reference = copy.deepcopy((model, optimizer))
    for step in range(20):
        for m, o in ((model, optimizer), (twin, reference)):
            set_grads(list(m["a"].parameters()), step)
            if step == 5 and o is optimizer:
                # costlier: they would come first
                o.add_param_group({"params": model["b"].parameters()})
            if o is optimizer and step >= 5:
                set_grads(list(m["b"].parameters()), step + 100)
            o.step()
    assert same_bits(values(model["a"]), values(twin["a"]))


def test_rows_that_are_behind_take_free_turns_too() -> None:
    """Turns count each row's own updates: offsets alone do not tell which are free."""
    model = nn.ModuleDict({"a": matrices(2), "b": matrices(2)})
    optimizer = _build(model, model["a"].parameters())
    for start in (6, 7, 8, 9):
        m, o = copy.deepcopy((model, optimizer))
        _go_on(m, o, range(start))
        o.add_param_group({"params": m["b"].parameters()})
        after = _go_on(m, o, range(start, start + 8))
        assert sorted(steps[0] % 4 for steps in after.values()) == [0, 1, 2, 3], start


def test_changed_interval_moves_only_the_rows_of_its_group() -> None:
    model = nn.ModuleDict({"a": matrices(2), "b": matrices(2)})
    groups = [{"params": model[key].parameters()} for key in "ab"]
    optimizer = _build(model, groups)
    before = _go_on(model, optimizer, range(8))
    optimizer.param_groups[1]["T"] = 3
    after = _go_on(model, optimizer, range(8, 20))
    for name in ("a.0", "a.1"):
        assert [s % 4 for s in before[name]] == [before[name][0]] * 2
        assert {s % 4 for s in after[name]} == {before[name][0]}
    first, second = after["b.0"], after["b.1"]
    for steps in (first, second):
        assert steps == list(range(steps[0], 20, 3))
    assert first[0] % 3 != second[0] % 3
    # back at the old interval, the free turns are taken
    optimizer.param_groups[1]["T"] = 4
    again = _go_on(model, optimizer, range(20, 28))
    assert sorted(steps[0] % 4 for steps in again.values()) == [0, 1, 2, 3]


def test_removed_rows_move_no_turns() -> None:
    model = matrices(4)
    optimizer = _build(model)
    before = _go_on(model, optimizer, range(4))
    optimizer.param_groups[0]["params"].pop(0)
    after = _go_on(model, optimizer, range(4, 12))
    assert all({s % 4 for s in after[n]} == {before[n][0]} for n in after if n != "0")


# --- checkpoints and copies ----------------------------------------------------------------------


def _grown(model: Any, steps: int) -> Any:
    """Return an optimizer to which a group was added after some steps."""
    optimizer = _build(model, model["a"].parameters())
    _go_on(model, optimizer, range(steps))
    optimizer.add_param_group({"params": model["b"].parameters()})
    return optimizer


def _model() -> Any:
    return nn.ModuleDict({"b": matrices(3), "a": matrices(2)})


@pytest.mark.parametrize("order", ["together", "later", "other order", "after steps"])
@pytest.mark.parametrize("steps", [0, 5], ids=["before its first step", "after steps"])
def test_resumed_run_goes_on_to_the_bit_however_its_groups_were_added(
    steps: int, order: str
) -> None:
    model = _model()
    optimizer = _grown(model, 5)
    _go_on(model, optimizer, range(5, 5 + steps))
    saved, weights = through_a_file(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    other = _model()
    other.load_state_dict(weights)
    if order == "later":
        fresh = _grown(other, 0)
    elif order == "after steps":
        fresh = _grown(other, 3)
        fresh.param_groups[0]["T"] = 3
        _go_on(other, fresh, range(2))
        other.load_state_dict(weights)
    else:
        keys = "ba" if order == "other order" else "ab"
        fresh = _build(other, [{"params": other[key].parameters()} for key in keys])
    fresh.load_state_dict(saved)
    for m, o in ((model, optimizer), (other, fresh)):
        _go_on(m, o, range(10, 22))
    assert same_bits(values(other), values(model))


def test_copies_keep_turns() -> None:
    model = _model()
    optimizer = _grown(model, 5)
    _go_on(model, optimizer, range(5, 9))
    twin, clone = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (twin, clone)):
        _go_on(m, o, range(9, 12))
        o.param_groups[1]["T"] = 2
        _go_on(m, o, range(12, 20))
    assert same_bits(values(twin), values(model))


def test_checkpoint_of_synchronous_refreshes_is_staggered_anew() -> None:
    model = matrices(4)
    optimizer = _build(model, refresh="synchronous")
    assert _go_on(model, optimizer, range(4)) == {str(i): [0] for i in range(4)}
    fresh = _build(model)
    fresh.load_state_dict(optimizer.state_dict())
    refreshed = _go_on(model, fresh, range(4, 12))
    assert sorted(steps[0] % 4 for steps in refreshed.values()) == [0, 1, 2, 3]


def test_synchronous_rows_have_no_offset() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, T=3, batch_size=6)
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    assert {int(optimizer.state[p]["phase_offset"]) for p in model.parameters()} == {-1}
