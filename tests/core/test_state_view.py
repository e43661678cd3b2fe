"""`optimizer.state` shows views of the stacks that may be read, written and copied."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    SplitHeads,
    StructPrecondError,
    StructuredOptimizer,
)
from tests.helpers import (
    COPIERS,
    SETTINGS,
    assert_close,
    dense_units,
    mlp,
    same_bits,
    snapshot,
    train,
    train_dense,
    values,
)

COUNTERS = ("step", "skipped", "failed", "initialized", "overdue", "phase_offset", "seed")


def test_state_shows_one_unit_per_entry_under_stable_names_from_the_start() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(3, 4)).double()
    given: Any = {2: ("dense", "hierarchical1_1")}
    rules = (LinearWeightBias(),)
    optimizer = SIRFShampoo(model, combine_params=rules, structures=given)
    owners = [p for p, entry in optimizer.state.items() if "step" in entry]
    assert [id(p) for p in owners] == [id(model[0].weight), id(model[1].weight)]
    # torch's tools expect every parameter to have some state
    assert set(optimizer.state[model[1].bias]) == {"global_step", "batch_size"}
    shapes = {name: tuple(t.shape) for name, t in optimizer.state[model[1].weight].items()}
    matrices = {
        "0.mat": (4, 4), "1.a": (1, 1), "1.b": (1, 3), "1.c": (2,), "1.d": (1, 2), "1.e": (1, 1)
    }  # fmt: skip
    kinds = ("preconditioner", "preconditioner_momenta")
    expected: dict[str, tuple[int, ...]] = {
        f"{kind}.{name}": shape for kind in kinds for name, shape in matrices.items()
    }
    counters: dict[str, tuple[int, ...]] = dict.fromkeys(
        [*COUNTERS, "global_step", "batch_size"], ()
    )
    assert shapes == {**expected, **counters, "momentum_buffer": (4, 4)}


def test_state_entries_alias_the_stacks_and_no_other_unit() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, structures="dense")
    for entry in optimizer.state.values():
        entry["momentum_buffer"].fill_(3.0)
        entry["preconditioner.0.mat"].fill_(2.0)
    for bucket in optimizer.buckets:
        state: Any = bucket.state
        assert state.momentum_buffer.eq(3.0).all()
        assert state.preconditioner[0].to_dense().eq(2.0).all()
    own = optimizer.state[model[2].weight]["momentum_buffer"].zero_()
    assert not own.any()
    assert optimizer.state[model[4].weight]["momentum_buffer"].eq(3.0).all()


def test_state_of_a_stacked_unit_has_a_row_per_problem() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).double()
    rules = (SplitHeads("*.weight", heads=2), PerParameter())
    optimizer = SIRFShampoo(model, combine_params=rules)
    entry = optimizer.state[model[1].weight]
    assert entry["momentum_buffer"].shape == (2, 2, 4)
    assert entry["preconditioner.0.mat"].shape == (2, 2, 2)
    assert entry["step"].shape == (2,)
    factors = dict(zip(optimizer.state, optimizer.preconditioner, strict=True))
    assert [f.shape for f in factors[model[1].weight] if f] == [(2, 2, 2), (2, 4, 4)]


def _assign(entry: dict[str, Tensor], name: str, value: Tensor) -> None:
    entry[name] = value


def _update(entry: dict[str, Tensor], name: str, value: Tensor) -> None:
    entry.update({name: value})


def _unite(entry: dict[str, Tensor], name: str, value: Tensor) -> None:
    entry |= {name: value}


def _replace(optimizer: StructuredOptimizer, p: Tensor, name: str, value: Tensor) -> None:
    optimizer.state[p] = {**optimizer.state[p], name: value}


def _replace_all(optimizer: StructuredOptimizer, p: Tensor, name: str, value: Tensor) -> None:
    plain = {q: {k: t.clone() for k, t in entry.items()} for q, entry in optimizer.state.items()}
    plain[p][name] = value
    optimizer.state = defaultdict(dict, plain)


WRITERS: dict[str, Callable[[StructuredOptimizer, Tensor, str, Tensor], None]] = {
    "one name": lambda o, p, name, value: _assign(o.state[p], name, value),
    "update": lambda o, p, name, value: _update(o.state[p], name, value),
    "union": lambda o, p, name, value: _unite(o.state[p], name, value),
    "one entry": _replace,
    "all of state": _replace_all,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_written_state_takes_effect_on_the_next_step(
    write: Callable[[StructuredOptimizer, Tensor, str, Tensor], None],
) -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, **SETTINGS), dense_units(twin)
    train(model, optimizer, 2)
    train_dense(twin, dense, 2)
    (problem,) = next(unit for unit in dense if unit.params[0] is twin[4].weight).problems
    problem.buf = torch.full((4, 4), 0.5).double()
    write(optimizer, model[4].weight, "momentum_buffer", torch.full((4, 4), 0.5))  # float32
    train(model, optimizer, 2, start=2)
    train_dense(twin, dense, 2, start=2)
    assert_close(values(model), values(twin))
    shown = optimizer.state[model[4].weight]
    assert_close(shown["momentum_buffer"], problem.buf)
    index = [name for name, _ in model.named_parameters()].index("4.weight")
    assert_close(optimizer.state_dict()["state"][index]["momentum_buffer"], problem.buf)


def _drop(optimizer: StructuredOptimizer, p: Tensor) -> None:
    del optimizer.state[p]


def _clear(optimizer: StructuredOptimizer, p: Tensor) -> None:
    optimizer.state.clear()


def _empty(optimizer: StructuredOptimizer, p: Tensor) -> None:
    optimizer.state[p] = {}


def _reshape(optimizer: StructuredOptimizer, p: Tensor) -> None:
    entry = optimizer.state[p]
    optimizer.state[p] = {**entry, "momentum_buffer": torch.zeros(16)}


def _delete_name(optimizer: StructuredOptimizer, p: Tensor) -> None:
    del optimizer.state[p]["momentum_buffer"]


@pytest.mark.parametrize("damage", [_drop, _clear, _empty, _reshape, _delete_name])
def test_removed_or_misshapen_state_raises_and_names_the_unit(
    damage: Callable[[StructuredOptimizer, Tensor], None],
) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    train(model, optimizer, 1)
    before = values(model)

    def damage_and_step() -> None:
        damage(optimizer, model[4].weight)
        optimizer.step()

    with pytest.raises((StructPrecondError, TypeError), match=r"4\.weight|0\.weight"):
        damage_and_step()
    assert same_bits(values(model), before)


def test_writing_an_unknown_name_or_another_shape_raises() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    entry = optimizer.state[model[0].weight]
    before = snapshot(model, optimizer)
    with pytest.raises(StructPrecondError, match=r"0\.weight"):
        entry["exp_avg"] = torch.zeros(4, 3)
    with pytest.raises(StructPrecondError, match=r"0\.weight"):
        entry["momentum_buffer"] = torch.zeros(3, 4)
    with pytest.raises(StructPrecondError, match=r"0\.weight"):
        entry.update({"momentum_buffer": torch.ones(4, 3), "exp_avg": torch.zeros(4, 3)})
    assert same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize("copier", COPIERS)
def test_state_can_be_copied_by_itself(copier: Callable[[Any], Any]) -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    train(model, optimizer, 2)
    backup = [copier(entry) for entry in optimizer.state.values()]
    before = [{k: t.clone() for k, t in entry.items()} for entry in optimizer.state.values()]
    train(model, optimizer, 2, start=2)
    assert same_bits([dict(entry) for entry in backup], before)
