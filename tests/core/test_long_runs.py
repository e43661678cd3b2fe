"""Memory does not grow from step to step, and counters stay correct."""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    SOAP,
    KLShampoo,
    KLShampooStrategy,
    Muon,
    Shampoo,
    SIRFShampoo,
    StructuredOptimizer,
    describe,
)
from tests.every_strategy import Make, every_strategy
from tests.helpers import SETTINGS, backward, mlp, set_grads

long = pytest.mark.parametrize("steps", [100, pytest.param(1000, marks=pytest.mark.slow)])
WARM_UP = 40
SHARED = ("global_step", "batch_size")


def _step(model: Any, optimizer: StructuredOptimizer, step: int) -> None:
    """Make a step in which some gradients are missing and some are not finite."""
    params = list(model.parameters())
    set_grads(params, step)
    if _lacks(step):
        params[step % len(params)].grad = None
    if _is_bad(step):
        params[step // 5 % len(params)].grad.mul_(torch.nan)
    optimizer.step()


def _lacks(step: int) -> bool:
    return step % 3 == 1


def _is_bad(step: int) -> bool:
    return step % 15 == 0


@pytest.fixture
def only_new_objects() -> None:
    """Let the garbage collector, and `_living_tensors`, look only at what the test makes."""
    gc.collect()
    gc.freeze()


counts_objects = pytest.mark.usefixtures("only_new_objects")


def _living_tensors() -> int:
    # several rounds free what other tests left, since finalizers free more
    for _ in range(10):
        if not gc.collect():
            break
    # `isinstance` would ask proxies for their class
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def _size(root: Any) -> tuple[int, int]:
    """Return the bytes of an object's tensors and the number of its containers' entries."""
    numbers = entries = 0
    seen: set[int] = set()
    open_objects = [root]
    while open_objects:
        each = open_objects.pop()
        if id(each) in seen or isinstance(each, type | nn.Module):
            continue
        seen.add(id(each))
        if isinstance(each, Tensor):
            numbers += each.untyped_storage().nbytes()
            continue
        held: list[Any] = []
        if isinstance(each, dict):
            held = [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple | set | frozenset):
            held = list(each)
        entries += len(held)
        open_objects += held
        if hasattr(each, "__dict__") and not callable(each):
            open_objects.append(vars(each))
    return numbers, entries


@counts_objects
@pytest.mark.filterwarnings("ignore:The gradients of")
@every_strategy
@long
def test_nothing_grows_and_counters_stay_right(make: Make, steps: int) -> None:
    model = mlp(torch.float32)
    optimizer = make(model)
    for step in range(WARM_UP):
        _step(model, optimizer, step)
    before = (_size(optimizer), describe(optimizer).state_bytes, _living_tensors())
    for step in range(WARM_UP, steps):
        _step(model, optimizer, step)
    # with as many gradients as before
    assert _lacks(steps - 1) == _lacks(WARM_UP - 1)
    assert (_size(optimizer), describe(optimizer).state_bytes, _living_tensors()) == before
    _check_counters(model, optimizer, steps)


def _check_counters(model: nn.Module, optimizer: StructuredOptimizer, steps: int) -> None:
    """Check the counters after steps by `_step`."""
    params = list(model.parameters())
    place = {p: i for i, p in enumerate(params)}
    assert optimizer.global_step == steps
    assert optimizer.failed == 0
    skipped = 0
    for bucket in optimizer.buckets:
        for unit, span in zip(bucket.units, bucket.spans, strict=True):
            places = {place[p] for p in unit.params}
            live = [s for s in range(steps) if not (_lacks(s) and s % len(params) in places)]
            bad = [s for s in live if _is_bad(s) and s // 5 % len(params) in places]
            kind, factored = type(bucket.strategy), any(bucket.key.structures)
            first = getattr(bucket.strategy, "skip_first", False) or (
                issubclass(kind, KLShampooStrategy) and factored
            )
            assert set(bucket.counters.step[span].tolist()) == {len(live) - len(bad) - first}
            assert set(bucket.counters.skipped[span].tolist()) == {len(bad)}
            skipped += len(bad)
    assert optimizer.skipped == skipped > 0


def _bytes_of_state(optimizer: StructuredOptimizer) -> int:
    entries = (dict(entry) for entry in optimizer.state.values())
    return sum(t.nbytes for entry in entries for n, t in entry.items() if n not in SHARED)


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_description_predicts_the_bytes_of_the_state(make: Make, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        predicted = describe(make(mlp(dtype))).state_bytes
    model = mlp(dtype)
    optimizer = make(model)
    assert _bytes_of_state(optimizer) == describe(optimizer).state_bytes == predicted
    for step in range(6):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    assert _bytes_of_state(optimizer) == describe(optimizer).state_bytes == predicted
    loaded = make(mlp(dtype))
    loaded.load_state_dict(optimizer.state_dict())
    assert _bytes_of_state(loaded) == predicted


@counts_objects
def test_counting_batch_sizes_leaves_nothing_behind() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)

    def go_on(steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            if step % 5 == 4:
                model(torch.ones(3, 3, dtype=torch.float64))  # never gets a gradient
            backward(model, step)
            optimizer.step()

    go_on(range(20))
    before, hooks = _living_tensors(), len(model._forward_hooks)
    go_on(range(20, 220))
    assert _living_tensors() == before
    assert len(model._forward_hooks) == hooks == 1


@counts_objects
def test_optimizers_that_are_gone_leave_nothing_behind() -> None:
    model = mlp(torch.float32)

    def use() -> None:
        optimizer = SIRFShampoo(model, **SETTINGS)
        backward(model, 0)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        model.zero_grad()

    use()
    before = _living_tensors()
    for _ in range(5):
        use()
    assert _living_tensors() == before
    assert not model._forward_hooks


LARGE: dict[str, Make] = {
    "SOAP": partial(SOAP, precondition_frequency=10, refresh="staggered"),
    "KLShampoo": partial(KLShampoo, precondition_frequency=10),
    "Shampoo": partial(Shampoo, precondition_frequency=20),
    "SIRFShampoo": partial(SIRFShampoo, batch_size=4, T=10),
    "Muon": Muon,
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE)
def test_process_does_not_grow(make: Make) -> None:
    model: Any = nn.Sequential(nn.Linear(192, 192), nn.Linear(192, 192))
    optimizer = make(model)
    limit = 20 * model[0].weight.nbytes  # one lost matrix per step is twice as much

    def go_on(steps: int) -> int:
        for step in range(steps):
            set_grads(list(model.parameters()), step)
            optimizer.step()
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = go_on(21)
    assert go_on(40) - before < limit


@counts_objects
def test_the_measures_notice_what_grows() -> None:
    """Each measure notices one more tensor."""
    model = mlp()
    optimizer: Any = SOAP(model)
    size, tensors = _size(optimizer), _living_tensors()
    optimizer.buckets[0].units.append([torch.ones(10)])
    assert _size(optimizer)[0] == size[0] + 40
    assert _size(optimizer)[1] == size[1] + 2
    assert _living_tensors() == tensors + 1
