"""What one rank cannot do, no rank does: all raise, nothing changes, and training can go on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from structprecond import (
    SOAP,
    Hyperparameter,
    Muon,
    PerParameter,
    SIRFShampoo,
    SplitHeads,
    State,
    StepContext,
    Strategy,
    StructuredOptimizer,
)
from structprecond.core.boxes import local
from tests.distributed import layouts, pool
from tests.helpers import same_bits

Undo = Callable[[], None]
Fault = Callable[[Any, StructuredOptimizer], Undo]

# --- set-ups -------------------------------------------------------------------------------------

SETUPS = {"ddp": 2, "replicated": 2, "fsdp": 2, "hsdp": 4, "tensor_parallel": 4}
"""Where each fault is tried, with the number of ranks."""


def place(setup: str, model: nn.Module) -> tuple[nn.Module, Any]:
    """Return a model as a set-up places it, and the mesh of its optimizer."""
    if setup == "ddp":
        return DistributedDataParallel(model), None
    return layouts.LAYOUTS[setup](model), dist.group.WORLD if setup == "replicated" else None


def build(setup: str, make: Any) -> tuple[Any, StructuredOptimizer]:
    model, mesh = place(setup, layouts.mlp())
    return model, make(model, mesh=mesh)


def bare(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def step(model: Any, optimizer: StructuredOptimizer, number: int) -> None:
    layouts.set_grads(model, number)
    optimizer.step()


def seen(model: nn.Module, optimizer: StructuredOptimizer) -> list[Any]:
    """Copy what this rank holds, whatever a step may change; seeds are learned once for all."""
    params = [local(p).clone() for p in model.parameters()]
    state = [
        {k: t.clone() for k, t in b.named_tensors().items() if k != "seed"}
        for b in optimizer.buckets
    ]
    return [params, state, optimizer.global_step, optimizer.skipped, optimizer.failed]


def outcome(function: Callable[[], Any]) -> str:
    """Return what a function raised; warnings are ignored."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def spoil(p: Any) -> None:
    """Let this rank's part of a gradient be infinite, if it has any entries."""
    local(p.grad).view(-1)[-1:] = torch.inf


# --- faults --------------------------------------------------------------------------------------


def gradient_is_missing(model: Any, optimizer: StructuredOptimizer) -> Undo:
    p = bare(model)[2].weight
    grad, p.grad = p.grad, None
    return lambda: setattr(p, "grad", grad)


def group_has(key: str, value: Any, model: Any, optimizer: StructuredOptimizer) -> Undo:
    (group,) = optimizer.param_groups
    old, group[key] = group[key], value
    return lambda: group.__setitem__(key, old)


def gradient_is_unusable(model: Any, optimizer: StructuredOptimizer) -> Undo:
    p = bare(model)[2].weight
    grad = p.grad
    if isinstance(grad, DTensor):
        mesh, ones = grad.device_mesh, torch.ones(p.shape, dtype=p.dtype)
        p.grad = DTensor.from_local(ones, mesh, [Replicate()] * mesh.ndim)
    else:
        p.grad = grad.to_sparse()
    return lambda: setattr(p, "grad", grad)


def another_step_was_made(model: Any, optimizer: StructuredOptimizer) -> Undo:
    optimizer._global_step += 1

    def undo() -> None:
        optimizer._global_step -= 1

    return undo


def never(step: int) -> bool:
    return False


def always(step: int) -> bool:
    return True


def fail(step: int) -> bool:
    raise LookupError("no interval")


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "a missing gradient": (
        gradient_is_missing,
        r"DistributedError: The ranks differ in the units without a gradient, .*rank 0 has \[\], "
        r"rank 1 has \['(module\.)?2\.weight'\]",
        "",
    ),
    "an invalid lr": (
        partial(group_has, "lr", -1.0),
        "DistributedError: Rank 1 cannot make the step, so no rank does: HyperparameterError: lr",
        "HyperparameterError: lr",
    ),
    "another lr": (
        partial(group_has, "lr", 0.02),
        r"DistributedError: The ranks differ in param group 0, .*rank 0 has lr: 0\.01, "
        r"rank 1 has lr: 0\.02",
        "",
    ),
    "another number of steps": (
        another_step_was_made,
        "DistributedError: The ranks differ in the number of steps, .*rank 0 has 2, rank 1 has 3",
        "",
    ),
    "a gradient that is sparse or misplaced": (
        gradient_is_unusable,
        r"DistributedError: Rank 1 cannot make .*GradientError: .*2\.weight",
        r"GradientError: .*2\.weight",
    ),
    "another interval by a callable": (
        partial(group_has, "precondition_frequency", always),
        "DistributedError: The ranks differ in the refresh intervals, .*rank 1 has",
        "",
    ),
    "a callable that fails": (
        partial(group_has, "precondition_frequency", fail),
        "DistributedError: Rank 1 cannot make the step, .*LookupError: no interval",
        "LookupError: no interval",
    ),
}
"""What goes wrong on rank 1: what does it, and what other ranks and rank 1 then raise."""


def suffer(rank: int, setup: str) -> list[Any]:
    """Let each fault happen in turn; return what each raised, and whether it changed anything."""
    make = partial(SOAP, lr=0.01, precondition_frequency=never)
    model, optimizer = build(setup, make)
    for number in range(2):
        step(model, optimizer, number)
    found = []
    for fault, _, _ in FAULTS.values():
        layouts.set_grads(model, 2)
        before = seen(model, optimizer)
        undo = fault(model, optimizer) if rank == 1 else None
        raised = outcome(optimizer.step)
        if undo is not None:
            undo()
        found.append((raised, same_bits(seen(model, optimizer), before)))
    # nothing is left of the faults
    twin, other = build(setup, make)
    for number in range(2):
        step(twin, other, number)
    for number in range(2, 4):
        step(model, optimizer, number)
        step(twin, other, number)
    return [found, same_bits(layouts.full_params(model), layouts.full_params(twin))]


@pytest.mark.parametrize("setup", SETUPS)
def test_a_fault_on_one_rank_raises_on_all_and_changes_nothing(setup: str) -> None:
    answers = pool.run(SETUPS[setup], suffer, setup)
    for rank, (found, repaired) in enumerate(answers):
        assert repaired
        for (_, others, own), (raised, unchanged) in zip(FAULTS.values(), found, strict=True):
            assert_matches(own if own and rank == 1 else others, raised)
            assert unchanged, raised


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s)^{pattern}"):
        raise RuntimeError(text)


# --- owners that differ --------------------------------------------------------------------------


def own_differently(rank: int) -> list[str]:
    """Let each rank find other owners; return what steps raise."""
    sizes = (16, 96), (96, 16), (16, 160), (64, 64), (48, 48)
    model = nn.Sequential(*[nn.Linear(n, m, bias=False) for n, m in sizes]).double()
    layouts.fsdp(model)
    optimizer = SOAP(model, lr=0.01, precondition_frequency=1000 if rank else 1)
    layouts.set_grads(model, 0)
    (group,) = optimizer.param_groups
    found = [outcome(optimizer.step)]
    group["precondition_frequency"] = 10
    return [*found, outcome(optimizer.step)]


def test_ranks_that_find_other_owners_all_raise() -> None:
    for first, second in pool.run(2, own_differently):
        assert_matches(
            "DistributedError: The ranks differ in param group 0, .* rank 0 has "
            "precondition_frequency: 1, rank 1 has precondition_frequency: 1000",
            first,
        )
        assert_matches("DistributedError: The ranks differ in what has owners", second)


def add_a_group_late(rank: int) -> list[Any]:
    """Add a group on one rank, and then on the other; return what steps raise, and the end."""
    model = layouts.fsdp(layouts.mlp())
    params = list(model.parameters())
    optimizer = SOAP(model, [{"params": params[:4]}], lr=0.01)
    step(model, optimizer, 0)
    found = []
    for late in (0, 1):
        if rank == late:
            optimizer.add_param_group({"params": params[4:]})
        layouts.set_grads(model, 1)
        found.append(outcome(optimizer.step))
    return [*found, layouts.full_params(model)]


def test_a_group_that_only_some_ranks_have_lets_all_raise() -> None:
    model = layouts.mlp()
    params = list(model.parameters())
    optimizer = SOAP(model, [{"params": params[:4]}], lr=0.01)
    step(model, optimizer, 0)
    optimizer.add_param_group({"params": params[4:]})
    step(model, optimizer, 1)
    for first, second, ends in pool.run(2, add_a_group_late):
        assert_matches("DistributedError: The ranks differ in param group 1, ", first)
        assert second == "nothing"
        assert same_bits(ends, layouts.full_params(model))


# --- code of the user's own ----------------------------------------------------------------------

FAILS: set[str] = set()
"""Where this rank's strategy or hook fails now."""


def maybe_fail(place: str) -> None:
    if place in FAILS:
        raise LookupError(f"no {place}")


@dataclass
class Momentum(State):
    """The sum of the gradients, and the number of updates."""

    total: Tensor


@dataclass(frozen=True)
class Own(Strategy[Momentum]):
    """Momentum, with an error on demand after the state has changed."""

    hyperparameters = {"lr": Hyperparameter(0.1, lambda v: v >= 0, "at least 0")}  # noqa: RUF012
    structures = ()

    def init(self, like: Tensor, structures: Any, dtypes: Any) -> Momentum:
        return Momentum(torch.zeros_like(like))

    def begin(self, state: Momentum, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext) -> bool:
        state.total += grad
        maybe_fail("begin")
        return False

    def update(
        self, state: Momentum, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        state.total += grad
        maybe_fail("update")
        return state.total.clone()


def hook(params: Tensor, update: Tensor) -> Tensor:
    maybe_fail("hook")
    return update


def own_strategy(model: nn.Module, mesh: Any) -> StructuredOptimizer:
    # the biases go to code of the library: it must not run ahead
    return StructuredOptimizer(
        model,
        strategy={"bias": "adamw", "default": Own()},
        hyperparameters={"lr": 0.01},
        mesh=mesh,
    )


def hooked(model: nn.Module, mesh: Any) -> StructuredOptimizer:
    return Muon(model, lr=0.01, before_weight_update=hook, mesh=mesh)


CODE = {"begin": own_strategy, "update": own_strategy, "hook": hooked}


def fail_in_own_code(rank: int, setup: str) -> list[Any]:
    found = []
    for where, make in CODE.items():
        model, optimizer = build(setup, make)
        twin, other = build(setup, make)
        start = 0 if where == "begin" else 2
        for number in range(start):
            step(model, optimizer, number)
            step(twin, other, number)
        for faulty in (0, 1):
            layouts.set_grads(model, start)
            # what cannot be skipped must not be counted either
            spoil(bare(model)[0].bias)
            if faulty == rank:
                FAILS.add(where)
            before = seen(model, optimizer)
            raised = outcome(optimizer.step)
            FAILS.clear()
            found.append((raised, same_bits(seen(model, optimizer), before)))
        for number in range(start, start + 2):
            step(model, optimizer, number)
            step(twin, other, number)
        assert same_bits(layouts.full_params(model), layouts.full_params(twin)), where
    return found


@pytest.mark.parametrize("setup", SETUPS)
def test_an_error_of_ones_own_code_on_one_rank_undoes_the_step_on_all(setup: str) -> None:
    answers = pool.run(SETUPS[setup], fail_in_own_code, setup)
    cases = [(where, faulty) for where in CODE for faulty in (0, 1)]
    for rank, found in enumerate(answers):
        for (where, faulty), (raised, unchanged) in zip(cases, found, strict=True):
            own = f"LookupError: no {where}"
            others = f"DistributedError: Rank {faulty} cannot make the step, .*{own}"
            assert_matches(own if rank == faulty else others, raised)
            assert unchanged, (where, raised)


# --- gradients that are not finite ---------------------------------------------------------------


def skip(rank: int, setup: str, nonfinite: Any, where: int) -> list[Any]:
    """Spoil one gradient on one rank; return what is then raised, skipped and different."""
    model, optimizer = build(setup, partial(SOAP, lr=0.01, nonfinite=nonfinite))
    for number in range(2):
        step(model, optimizer, number)
    layouts.set_grads(model, 2)
    before, start = seen(model, optimizer), layouts.full_params(model)
    if rank == where:
        spoil(bare(model)[2].weight)
    raised = outcome(optimizer.step)
    unchanged = same_bits(seen(model, optimizer), before)
    ends = layouts.full_params(model)
    moved = [not torch.equal(p, q) for p, q in zip(start, ends, strict=True)]
    return [raised, unchanged, moved, optimizer.skipped, ends]


@pytest.mark.parametrize("setup", SETUPS)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(setup: str) -> None:
    weight = [name for name, _ in layouts.mlp().named_parameters()].index("2.weight")
    skips = []
    for where in (0, 1):
        answers = pool.run(SETUPS[setup], skip, setup, "skip", where)
        raised, _, moved, skipped, ends = zip(*answers, strict=True)
        assert set(raised) == {"nothing"}
        assert all(same_bits(end, ends[0]) for end in ends)
        for m in moved:
            assert [i for i, on in enumerate(m) if not on] == ([weight] if any(skipped) else [])
        skips.append(sum(skipped))
    # replicas count on every rank; whole gradients are equal, so their owner looks at its own alone
    assert sorted(skips) == {
        "ddp": [2, 2], "hsdp": [2, 2], "replicated": [0, 1]
    }.get(setup, [1, 1])  # fmt: skip


@pytest.mark.parametrize("setup", SETUPS)
def test_a_gradient_that_is_not_finite_on_one_rank_is_refused_by_all(setup: str) -> None:
    refused = 0
    for where in (0, 1):
        answers = pool.run(SETUPS[setup], skip, setup, "raise", where)
        texts = [answer[0] for answer in answers]
        if setup == "replicated" and set(texts) == {"nothing"}:
            continue  # as above
        refused += 1
        (own,) = [text for text in texts if text.startswith("GradientError")]
        assert_matches(r"GradientError: The gradients of (module\.)?2\.weight are not finite", own)
        for text in set(texts) - {own}:
            assert_matches(rf"DistributedError: Rank {texts.index(own)} cannot .*2\.weight", text)
        for _, unchanged, moved, skipped, _ in answers:
            assert unchanged
            assert not any(moved)
            assert skipped == 0
    assert refused == (1 if setup == "replicated" else 2)


def skip_with_warnings_as_errors(rank: int, setup: str) -> list[Any]:
    """Let each rank raise its warnings; return what a step raises, the steps, and the end."""
    model, optimizer = build(setup, partial(SOAP, lr=0.01))
    for number in range(2):
        step(model, optimizer, number)
    layouts.set_grads(model, 2)
    if rank == 0:
        spoil(bare(model)[2].weight)
    raised = "nothing"
    try:
        optimizer.step()  # the pool makes warnings errors
    except UserWarning as warning:
        raised = str(warning)
    steps = optimizer.global_step
    step(model, optimizer, 3)
    return [raised, steps, layouts.full_params(model)]


@pytest.mark.parametrize("setup", ["ddp", "fsdp"])
def test_a_warning_that_is_an_error_on_one_rank_breaks_no_step(setup: str) -> None:
    model = layouts.mlp()
    optimizer = SOAP(model, lr=0.01)
    for number in range(4):
        layouts.set_grads(model, number)
        if number == 2:
            spoil(bare(model)[2].weight)
        assert outcome(optimizer.step) == "nothing"
    answers = pool.run(SETUPS[setup], skip_with_warnings_as_errors, setup)
    raised = [text for text, _, _ in answers if text != "nothing"]
    assert raised
    for text in raised:
        assert_matches(r"The gradients of (module\.)?2\.weight are not finite", text)
    for _, steps, ends in answers:
        assert steps == 3
        assert same_bits(ends, layouts.full_params(model))


def skip_a_head(rank: int, nonfinite: Any) -> list[Any]:
    """Spoil one head of a weight whose heads have several owners; return what is then raised."""
    heads = SplitHeads("2.weight", heads=4), PerParameter()
    model = layouts.fsdp(layouts.mlp())
    optimizer = SOAP(model, lr=0.01, combine_params=heads, nonfinite=nonfinite)
    for number in range(2):
        step(model, optimizer, number)
    weight: Any = model.get_parameter("2.weight")
    layouts.set_grads(model, 2)
    if rank == 0:
        local(weight.grad)[0, 0] = torch.nan  # of the first head
    start = layouts.full(weight)
    raised = outcome(optimizer.step)
    moved = not torch.equal(layouts.full(weight), start)
    return [raised.partition(":")[0], moved, optimizer.skipped]


def test_one_bad_head_skips_the_whole_unit_whoever_owns_the_other_heads() -> None:
    found = pool.run(2, skip_a_head, "skip")
    assert [answer[:2] for answer in found] == [["nothing", False]] * 2
    assert sum(skipped for _, _, skipped in found) == 1
    found = pool.run(2, skip_a_head, "raise")
    assert sorted(found) == [["DistributedError", False, 0], ["GradientError", False, 0]]


# --- samples and random numbers ------------------------------------------------------------------


def count(rank: int, setup: str) -> tuple[set[int], bool]:
    """Train on batches of unequal sizes; return their sizes, and whether these were used."""
    sizes = [4, 4, 7, 7] if setup == "tensor_parallel" else [3, 6, 2, 9]
    total = 11 if setup == "tensor_parallel" else sum(sizes[: dist.get_world_size()])
    noted, ends = set(), []
    makers: Any = SIRFShampoo, partial(SIRFShampoo, batch_size=total)
    for make in makers:
        model, mesh = place(setup, layouts.mlp())
        optimizer = make(model, lr=0.01, mesh=mesh)
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.ones(sizes[rank], layouts.DIMS[0], dtype=torch.float64)
            model(x).square().mean().backward()
            optimizer.step()
            entries = optimizer.state_dict()["state"].values()
            noted |= {int(entry["batch_size"]) for entry in entries}
        ends.append(layouts.full_params(model))
    return noted, same_bits(*ends)


@pytest.mark.parametrize("setup", SETUPS)
def test_counted_samples_are_those_of_all_ranks_and_each_counts_once(setup: str) -> None:
    world = SETUPS[setup]
    total = 11 if setup == "tensor_parallel" else {2: 9, 4: 20}[world]
    assert pool.run(world, count, setup) == [({total}, True)] * world


def round_at_random(rank: int, setup: str) -> list[Tensor]:
    # the pool seeds each rank differently
    assert torch.initial_seed() == rank
    model, mesh = place(setup, layouts.mlp(dtype=torch.bfloat16))
    optimizer = SOAP(model, lr=1e-3, rounding="stochastic", mesh=mesh)
    for number in range(6):
        step(model, optimizer, number)
    return layouts.full_params(model)


@dataclass(frozen=True)
class Noisy(Own):
    """A strategy that draws random numbers."""

    def update(
        self, state: Momentum, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        return grad + ctx.randn(*grad.shape[1:])


def draw(rank: int, setup: str) -> list[Tensor]:
    model, mesh = place(setup, layouts.mlp())
    optimizer = StructuredOptimizer(model, strategy=Noisy(), mesh=mesh)
    for number in range(3):
        step(model, optimizer, number)
    return layouts.full_params(model)


@pytest.mark.parametrize("function", [round_at_random, draw])
def test_random_numbers_are_the_same_on_all_ranks_and_in_all_set_ups(function: Any) -> None:
    ends = [end for setup in ("ddp", "replicated", "fsdp") for end in pool.run(2, function, setup)]
    assert all(same_bits(end, ends[0]) for end in ends)


# --- ranks without rows --------------------------------------------------------------------------


def own_nothing(rank: int, setup: str) -> list[Any]:
    model, mesh = place(setup, nn.Sequential(nn.Linear(16, 16, bias=False)).double())
    optimizer = SOAP(model, lr=0.01, mesh=mesh)
    group: Any = optimizer.param_groups[0]
    for number in range(2):
        step(model, optimizer, number)
    if rank == 0:
        group["lr"] = -1.0
    raised = outcome(optimizer.step)
    return [len(optimizer.buckets), raised.partition(":")[0], layouts.full_params(model)]


@pytest.mark.parametrize("setup", ["replicated", "fsdp"])
def test_ranks_without_rows_make_steps_as_well(setup: str) -> None:
    owned, raised, ends = zip(*pool.run(SETUPS[setup], own_nothing, setup), strict=True)
    assert sum(owned) == 1
    assert raised == ("HyperparameterError", *["DistributedError"] * (len(owned) - 1))
    assert all(same_bits(end, ends[0]) for end in ends)


# --- gradients of another precision --------------------------------------------------------------


def step_with_wide_gradient(rank: int) -> tuple[str, bool, str]:
    """Give one rank a gradient that is wider than its parameter; return what the steps raise."""
    model: Any = layouts.fsdp(layouts.mlp(dtype=torch.bfloat16))
    optimizer = SOAP(model, lr=1e-3)
    step(model, optimizer, 0)
    p = model[2].weight
    layouts.set_grads(model, 1)
    narrow, p.grad = p.grad, None
    p.grad_dtype = torch.float32 if rank else torch.bfloat16
    p.grad = narrow.to(p.grad_dtype)
    before = seen(model, optimizer)
    raised = outcome(optimizer.step)
    unchanged = same_bits(seen(model, optimizer), before)
    p.grad = None
    p.grad_dtype, p.grad = torch.bfloat16, narrow
    return raised, unchanged, outcome(optimizer.step)


def test_gradients_of_another_precision_are_not_rounded_on_the_way() -> None:
    (told, *rest), (raised, *others) = pool.run(2, step_with_wide_gradient)
    assert "GradientError: The gradient of 2.weight is torch.float32, expected torch.bfloat16" in (
        raised
    )
    assert told.startswith("DistributedError: Rank 1 cannot make the step")
    assert rest == others == [True, "nothing"]
