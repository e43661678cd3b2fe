"""Ranks meet in the first step: no rank waits while an optimizer is built."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from structprecond import SOAP, SIRFShampoo, describe
from structprecond.core.agreement import facts_of
from structprecond.core.follow import Follower
from structprecond.errors import LostRankError
from tests.distributed import layouts, pool
from tests.distributed.test_faults import build, outcome, step
from tests.helpers import same_bits

make = partial(SOAP, lr=1e-3, rounding="stochastic")

# --- construction --------------------------------------------------------------------------------


def build_on_one_rank(rank: int, setup: str, late: bool) -> bool:
    """Build an optimizer and look at it on rank 0 alone, before or after the model is sharded."""
    model = layouts.mlp()
    mesh: Any = dist.group.WORLD if setup == "replicated" else None
    optimizer = SOAP(model) if late and rank == 0 else None
    placed = DistributedDataParallel(model) if setup == "ddp" else layouts.LAYOUTS[setup](model)
    if rank == 0:
        optimizer = optimizer or SOAP(placed, mesh=mesh)
        optimizer.zero_grad()
        assert "SOAP" in str(describe(optimizer))
    return hasattr(optimizer, "team") and optimizer.team.has_met  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("setup", "late"), [("ddp", False), ("replicated", False), ("fsdp", False), ("fsdp", True)]
)
def test_no_rank_waits_for_others_before_the_first_step(setup: str, late: bool) -> None:
    start = time.monotonic()
    assert pool.run(2, build_on_one_rank, setup, late, group_s=20) == [False, False]
    assert time.monotonic() - start < 15


# --- the seed ------------------------------------------------------------------------------------


def resume(rank: int, setup: str, steps: int) -> list[list[Tensor]]:
    """Resume after some steps on ranks with other seeds; return both ends."""
    model, optimizer = build(setup, make)
    for number in range(steps):
        step(model, optimizer, number)
    saved = optimizer.state_dict()
    torch.manual_seed(7 + rank)
    other, resumed = build(setup, make)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    for number in range(steps, steps + 3):
        step(model, optimizer, number)
        step(other, resumed, number)
    return [layouts.full_params(model), layouts.full_params(other)]


@pytest.mark.parametrize("setup", ["ddp", "fsdp"])
def test_seeds_of_a_checkpoint_replace_those_of_ranks_that_have_not_met(setup: str) -> None:
    for end, resumed in pool.run(2, resume, setup, 2):
        assert same_bits(end, resumed)


def save_before_a_step(rank: int) -> Any:
    # seeds may take 64 bits, and those of other ranks do not matter
    torch.manual_seed(2**64 - 5 if rank == 0 else rank)
    model, optimizer = build("ddp", make)
    saved = optimizer.state_dict()
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    return saved, layouts.full_params(model)


def test_ranks_use_the_seed_of_the_first_as_one_process_does_also_after_loading() -> None:
    (saved, end), (_, other) = pool.run(2, save_before_a_step)
    torch.manual_seed(2**64 - 5)
    for loads in (False, True):
        model = layouts.mlp()
        optimizer = make(model)
        if loads:
            names = {key.removeprefix("module."): value for key, value in saved.items()}
            optimizer.load_state_dict(names)
        step(model, optimizer, 0)
        step(model, optimizer, 1)
        assert same_bits(layouts.full_params(model), end)
        assert same_bits(end, other)


# --- ranks that do not know of each other --------------------------------------------------------


def wrap_too_late(rank: int, counted: bool) -> list[str]:
    """Wrap a model after its optimizer was built; return what steps warn of."""
    model = layouts.mlp(dtype=torch.float64 if counted else torch.bfloat16)
    late = SIRFShampoo(model, lr=1e-3) if counted else make(model)
    wrapped = DistributedDataParallel(model)
    early = SIRFShampoo(wrapped, lr=1e-3) if counted else make(wrapped)
    found = []
    for optimizer in (late, late, early):
        optimizer.zero_grad()
        x = torch.ones(4, layouts.DIMS[0], dtype=next(model.parameters()).dtype)
        wrapped(x).square().mean().backward()
        try:
            optimizer.step()  # the pool makes warnings errors
            found.append("nothing")
        except UserWarning as warning:
            found.append(str(warning))
    assert late.global_step == 2
    return found


@pytest.mark.parametrize("counted", [False, True])
def test_optimizers_built_before_the_model_is_wrapped_warn_once_where_ranks_would_differ(
    counted: bool,
) -> None:
    what = "the counted batch size" if counted else "stochastic rounding"
    for late, again, early in pool.run(2, wrap_too_late, counted):
        assert "2 ranks" in late
        assert what in late
        assert "build the optimizer from the wrapped model" in late
        assert [again, early] == ["nothing", "nothing"]


# --- what ranks compare --------------------------------------------------------------------------


class Tag:
    """An object whose `repr` shows an address."""


def test_objects_and_the_number_of_an_accelerator_are_no_difference_between_ranks() -> None:
    def facts(device: str) -> str:
        lr = torch.empty((), device=device)
        group = {"lr": lr, "betas": (0.9, lr), "tags": [Tag(), {"a": Tag()}], "tag": Tag()}
        return repr(facts_of([group], torch.tensor(0)))

    assert facts("meta:0") == facts("meta:1")
    assert "0.9" in facts("meta:0")


def test_an_error_of_other_ranks_is_raised_at_once() -> None:
    follower = Follower([], [], {})
    with pytest.raises(LostRankError), follower.refusing(quiet=True):
        raise LostRankError("rank 1 has stopped")


# --- counted samples -----------------------------------------------------------------------------


def fix_after_a_failure(rank: int) -> int:
    model, optimizer = build("ddp", partial(SIRFShampoo, lr=0.01, nonfinite="raise"))
    x = torch.ones(3 + rank, layouts.DIMS[0], dtype=torch.float64)
    model(x).square().mean().backward()
    next(model.parameters()).grad.fill_(torch.inf)
    assert outcome(optimizer.step).startswith("GradientError")
    optimizer.batch_size = 5
    step(model, optimizer, 0)
    return int(optimizer.state_dict()["state"][0]["batch_size"])


def test_the_count_of_a_failed_step_does_not_replace_a_fixed_batch_size() -> None:
    assert pool.run(2, fix_after_a_failure) == [5, 5]
