"""A rank that stops, or fails where the others cannot know: they raise, and nothing hangs."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from structprecond import SOAP, StructuredOptimizer
from structprecond.core.exchange import Exchange
from structprecond.core.step import Plan
from structprecond.core.transfer import Arrival
from tests.distributed import layouts, pool
from tests.distributed.test_faults import SETUPS, assert_matches, build, outcome, seen, step
from tests.helpers import same_bits

GROUP_S = 2.0
"""The time limit of the process group, in seconds."""
OWNED = {setup: world for setup, world in SETUPS.items() if setup != "ddp"}


def make(model: Any, mesh: Any) -> StructuredOptimizer:
    return SOAP(model, lr=0.01, mesh=mesh)


def at_first(owner: Any, name: str, before: Callable[[], None]) -> Callable[[], None]:
    """Do something before the first call of a method; return what undoes that."""
    method = getattr(owner, name)

    def call(*args: Any) -> Any:
        setattr(owner, name, method)
        before()
        return method(*args)

    setattr(owner, name, call)
    return lambda: setattr(owner, name, method)


# --- ranks that stop -----------------------------------------------------------------------------


def sleep() -> None:
    time.sleep(1.5 * GROUP_S)


def die() -> None:
    os._exit(1)


def lose(rank: int, setup: str, stop: Callable[[], None], late: bool) -> Any:
    """Let rank 1 stop before a step, or late in it; return what two steps then raise, and when."""
    model, optimizer = build(setup, make)
    for number in range(2):
        step(model, optimizer, number)
    layouts.set_grads(model, 2)
    if rank == 1 and not late:
        stop()
        return None
    if rank == 1:
        undo = at_first(Exchange, "spread", stop)
        outcome(optimizer.step)
        undo()
        return None
    found = []
    for _ in range(2):
        start = time.monotonic()
        found.append((outcome(optimizer.step), time.monotonic() - start))
    return found


def assert_lost(found: Any, late: bool) -> None:
    """Check that a rank noticed in time, and said whom it lost."""
    (first, took), (second, again) = found
    what = "the parameters of 0.weight" if late else "the decision about the step"
    assert_matches(rf"LostRankError: Rank \d did not get {what}.* from the ranks .*1", first)
    assert_matches(r"LostRankError: Rank \d did not get ", second)
    assert took < GROUP_S + 3
    assert again < GROUP_S + 3


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("setup", ["replicated", "fsdp"])
def test_a_rank_that_does_not_answer_is_named_within_the_time_limit(setup: str, late: bool) -> None:
    answers = pool.run(2, lose, setup, sleep, late, group_s=GROUP_S)
    assert_lost(answers[0], late)


def test_a_replica_that_does_not_answer_is_named_within_the_time_limit() -> None:
    answers = pool.run(2, lose, "ddp", sleep, False, group_s=GROUP_S)
    assert_lost(answers[0], late=False)


def notice(rank: int, setup: str, late: bool) -> None:
    found = lose(rank, setup, die, late)
    assert_lost(found, late)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("setup", ["replicated", "tensor_parallel"])
def test_a_rank_that_dies_is_named_and_leaves_no_process_behind(setup: str, late: bool) -> None:
    before = {p.pid for p in multiprocessing.active_children()}
    own = pool.Pool(SETUPS[setup])
    with pytest.raises(pool.RankFailedError) as raised:
        own.run(notice, setup, late, group_s=GROUP_S)
    # the other ranks found what they should
    assert str(raised.value) == "rank 1: the process died"
    assert {p.pid for p in multiprocessing.active_children()} <= before


# --- interrupts ----------------------------------------------------------------------------------


def interrupt(rank: int, waits: int) -> tuple[str, list[bool], list[bool], str]:
    """Interrupt rank 1 in a step, while it waits for an exchange.

    Args:
        rank: The rank.
        waits: How many exchanges it gets before.

    Returns:
        What that raises, which parameters are as before and which as after an undisturbed step, and
        what another step raises.
    """
    model, optimizer = build("fsdp", make)
    twin, other = build("fsdp", make)
    for number in range(2):
        step(model, optimizer, number)
        step(twin, other, number)
    before = layouts.full_params(model)
    step(twin, other, 2)
    layouts.set_grads(model, 2)
    left, wait = waits, Arrival.wait

    def stop(arrival: Arrival) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt
        wait(arrival)

    raised = "nothing"
    # copies that nothing was written to hold NaN
    torch.use_deterministic_algorithms(True)
    try:
        with mock.patch.object(Arrival, "wait", stop if rank == 1 else wait):
            optimizer.step()
    except KeyboardInterrupt:
        raised = "KeyboardInterrupt"
    finally:
        torch.use_deterministic_algorithms(False)
    ends = layouts.full_params(model)
    old = [torch.equal(p, q) for p, q in zip(ends, before, strict=True)]
    new = [torch.equal(p, q) for p, q in zip(ends, layouts.full_params(twin), strict=True)]
    return raised, old, new, outcome(optimizer.step)


def test_a_rank_that_is_interrupted_sends_what_the_others_wait_for() -> None:
    exchanges = 2 * 3  # of matrices and of vectors, each of several sizes
    for waits in (0, 1, exchanges):
        answers = pool.run(2, interrupt, waits)
        assert [raised for raised, *_ in answers] == ["nothing", "KeyboardInterrupt"]
        for _, old, new, later in answers:
            # what the interrupted rank owns has not moved, if it was interrupted early
            assert all(a or b for a, b in zip(old, new, strict=True))
            assert any(new)
            assert all(new) == (waits == exchanges)
            assert_matches("DistributedError: The ranks differ in the number of steps", later)


# --- errors that others cannot know of -----------------------------------------------------------


def no_memory() -> None:
    raise torch.OutOfMemoryError("out of memory")


def run_out_of_memory(rank: int, setup: str, name: str) -> Any:
    """Let rank 0 run out of memory; return what two steps raise, and whether ranks agree."""
    model, optimizer = build(setup, make)
    for number in range(2):
        step(model, optimizer, number)
    layouts.set_grads(model, 2)
    before = seen(model, optimizer)
    undo = at_first(Plan if name == "apply" else Exchange, name, no_memory)
    if rank != 0:
        undo()
    first = outcome(optimizer.step)
    undo()
    unchanged = same_bits(seen(model, optimizer), before)
    ends = layouts.full_params(model)
    return first, outcome(optimizer.step), unchanged, ends


LATE = [("ddp", "apply"), *((setup, name) for setup in OWNED for name in ("apply", "spread"))]


@pytest.mark.parametrize(("setup", "name"), LATE)
def test_if_one_rank_fails_late_the_others_finish_and_raise_in_the_next_step(
    setup: str, name: str
) -> None:
    answers = pool.run(SETUPS[setup], run_out_of_memory, setup, name)
    for rank, (first, second, _, ends) in enumerate(answers):
        assert_matches("nothing" if rank else "OutOfMemoryError: out of memory", first)
        assert_matches("DistributedError: The ranks differ in the number of steps", second)
        assert all(end.isfinite().all() for end in ends)
        # what has been spread is the same on all ranks of a replica
        if setup != "ddp":
            assert same_bits(ends, answers[rank // 2 * 2 if setup == "hsdp" else 0][3])


@pytest.mark.parametrize("setup", OWNED)
def test_if_one_rank_lacks_memory_for_copies_all_raise_and_nothing_changes(setup: str) -> None:
    answers = pool.run(SETUPS[setup], run_out_of_memory, setup, "allocate")
    for rank, (first, second, unchanged, _) in enumerate(answers):
        own = "OutOfMemoryError: out of memory"
        assert_matches(f"DistributedError: Rank 0 cannot .*{own}" if rank else own, first)
        assert second == "nothing"
        assert unchanged
