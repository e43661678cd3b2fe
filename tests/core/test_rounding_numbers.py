"""The random numbers of stochastic rounding: uniform, independent, and those of a row's update."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import LARS, SOAP, SplitHeads
from structprecond.core.rounding import row_keys, uniform
from tests.helpers import set_grads, values

SEEDS = torch.tensor([0, 1, 2, 3, 5 << 32, 1 << 62, 123456789123456789, 2**63 - 1])
DIMS = torch.Size([100, 250])


def _mixed(x: int) -> int:
    """Return lowbias32 of a number, in the unbounded integers of Python."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def _expected(seed: int, t: int, place: int) -> float:
    key = _mixed(_mixed(_mixed(seed % 2**32) ^ (seed >> 32)) ^ t)
    return (_mixed(_mixed(place) ^ key) >> 8) / 2**24


def _numbers(t: int = 1) -> Tensor:
    return uniform(row_keys(SEEDS, t), DIMS)


@pytest.mark.parametrize("t", [1, 2, 100_000])
def test_numbers_are_the_published_hash_of_seed_update_and_place(t: int) -> None:
    drawn = _numbers(t).flatten(1)
    for row, seed in enumerate(SEEDS.tolist()):
        for place in (0, 1, 2, 999, 24_999):
            assert drawn[row, place].item() == _expected(seed, t, place)


def test_rows_at_different_updates_draw_what_they_would_alone() -> None:
    updates = torch.arange(1, len(SEEDS) + 1)
    drawn = uniform(row_keys(SEEDS, updates.double()), DIMS)
    for row, t in enumerate(updates.tolist()):
        assert torch.equal(drawn[row], _numbers(t)[row])


def _too_uneven(counts: Tensor) -> bool:
    """Return whether counts are further from equal ones than 6 standard deviations of chi^2."""
    mean = counts.sum() / counts.numel()
    chi2, freedom = ((counts - mean) ** 2 / mean).sum().item(), counts.numel() - 1
    return abs(chi2 - freedom) > 6 * (2 * freedom) ** 0.5


def test_the_numbers_of_each_row_are_uniform() -> None:
    drawn = _numbers()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for row in drawn:
        assert not _too_uneven(torch.histc(row, 100, 0, 1))
    # the last 8 of 24 bits as well
    assert not _too_uneven(torch.histc((drawn * 2**16).frac(), 256, 0, 1))


NEIGHBOURS: dict[str, Any] = {
    "rows": lambda: (_numbers()[:-1], _numbers()[1:]),
    "updates": lambda: (_numbers(1), _numbers(2)),
    "updates that differ in a high bit": lambda: (_numbers(1), _numbers(1 + 2**20)),
    "columns": lambda: (_numbers()[..., :-1], _numbers()[..., 1:]),
    "columns two apart": lambda: (_numbers()[..., :-2], _numbers()[..., 2:]),
    "lines": lambda: (_numbers()[:, :-1], _numbers()[:, 1:]),
    "row and update": lambda: (_numbers(1)[1:], _numbers(2)[:-1]),
}


@pytest.mark.parametrize("pair", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_neighbours_are_independent(pair: Any) -> None:
    first, second = (drawn.flatten() for drawn in pair())
    cells = (first * 16).floor() * 16 + (second * 16).floor()
    assert not _too_uneven(torch.histc(cells, 256, 0, 256))


# --- in steps ------------------------------------------------------------------------------------


def _net(*names: str) -> nn.ParameterDict:
    return nn.ParameterDict({name: torch.ones(12, 8, dtype=torch.bfloat16) for name in names})


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.3)
        optimizer.step()


def test_rows_round_alike_however_they_are_stacked() -> None:
    seen = []
    for names in (("a", "b", "c"), ("c", "a"), ("a",)):
        model = _net(*names)
        _step(model, LARS(model, lr=1e-3, rounding="stochastic"), 5)
        seen.append(model["a"].detach().clone())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert len(seen[0].unique()) > 1


def test_parameters_heads_and_steps_round_differently() -> None:
    model = _net("a", "b")
    optimizer = LARS(model, lr=1e-3, rounding="stochastic", combine_params=(SplitHeads("*", 2),))
    moved = []
    for _ in range(2):
        for p in model.values():
            p.data.fill_(1.0)
        _step(model, optimizer)
        moved += [half for p in model.values() for half in p.detach().clone().chunk(2)]
    for i, part in enumerate(moved):
        assert not any(torch.equal(part, other) for other in moved[:i])


def test_a_resumed_run_repeats_the_bits() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).bfloat16()
    optimizer = SOAP(model, lr=1e-3, rounding="stochastic")
    for step in range(4):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    torch.manual_seed(77)  # as in a new process
    other = copy.deepcopy(model)
    resumed = SOAP(other, lr=1e-3, rounding="stochastic")
    resumed.load_state_dict(optimizer.state_dict())
    for step in range(4, 8):
        for net, opt in ((other, resumed), (model, optimizer)):
            set_grads(list(net.parameters()), step)
            opt.step()
    assert all(map(torch.equal, values(model), values(other)))


def test_rounding_leaves_torchs_random_numbers_alone_and_follows_its_seed() -> None:
    ends = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = _net("a")
        optimizer = LARS(model, lr=1e-3, rounding="stochastic")
        before = torch.get_rng_state()
        _step(model, optimizer)
        assert torch.equal(torch.get_rng_state(), before)
        ends.append(model["a"].detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
