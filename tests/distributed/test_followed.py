"""Parameters and groups that change while several ranks train them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from structprecond import (
    SOAP,
    AdamW,
    CapturedStep,
    GroupError,
    LinearWeightBias,
    Muon,
    PerParameter,
    StructPrecondError,
    StructuredOptimizer,
)
from structprecond.core.boxes import local
from structprecond.errors import DistributedError
from tests.distributed import layouts, pool
from tests.helpers import same_bits

Change = Callable[[Any, Any], None]


def steps(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    """Make steps with random gradients."""
    for step in range(first, last):
        layouts.set_grads(model, step)
        optimizer.step()


def soap(model: Any, params: Any = None, **kwargs: Any) -> StructuredOptimizer:
    return SOAP(model, params, lr=0.01, precondition_frequency=3, **kwargs)


def halves(model: nn.Module) -> list[dict[str, Any]]:
    params = list(model.parameters())
    return [{"params": params[:4]}, {"params": params[4:], "lr": 0.02}]


def refused(call: Callable[[], object], error: type[Exception] = GroupError) -> str:
    """Return the message of the error that a call raises."""
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def untouched(model: nn.Module, call: Callable[[], object]) -> bool:
    """Return whether a call leaves all parameters as they are."""
    before = [local(p).clone() for p in model.parameters()]
    call()
    return same_bits(before, [local(p) for p in model.parameters()])


# --- sharded after the optimizer was built -------------------------------------------------------


def shard(model: Any, optimizer: Any) -> None:
    layouts.fsdp(model)


def state_at_once(rank: int) -> tuple[bool, list[str]]:
    """Load into an optimizer whose model was sharded later, and save; return what differs."""
    model = layouts.fsdp(layouts.mlp())
    optimizer = soap(model)
    steps(model, optimizer, 0, 4)
    saved = optimizer.state_dict()
    later = layouts.mlp()
    new = soap(later)
    layouts.fsdp(later)
    shown = new.state_dict()["state"][0]
    sharded = all(isinstance(t, DTensor) for t in shown.values() if t.ndim)
    unsharded = layouts.mlp()
    another = soap(unsharded)
    layouts.fsdp(unsharded)
    another.load_state_dict(saved)
    found = another.state_dict()["state"]
    return sharded, [
        f"{i}, {name}"
        for i, entry in saved["state"].items()
        for name, t in entry.items()
        if not torch.equal(layouts.full(t), layouts.full(found[i][name]))
    ]


def test_checkpoints_follow_a_model_that_was_sharded_before_they_ask_other_ranks() -> None:
    assert pool.run(2, state_at_once) == [(True, [])] * 2


def capture(rank: int) -> list[str]:
    """Capture steps of optimizers on several ranks; return the errors."""
    parallel = DistributedDataParallel(layouts.mlp())
    sharded = layouts.fsdp(layouts.mlp())
    calls: list[Callable[[], object]] = [
        lambda: CapturedStep(soap(parallel, nonfinite="ignore")),
        lambda: CapturedStep(soap(sharded, nonfinite="ignore")),
    ]
    later = layouts.mlp()
    captured = CapturedStep(soap(later, nonfinite="ignore"))
    layouts.fsdp(later)
    layouts.set_grads(later, 0)
    calls.append(captured)
    return [refused(call, StructPrecondError) for call in calls]


def test_steps_of_several_ranks_are_not_captured() -> None:
    for messages in pool.run(2, capture):
        for message in messages:
            assert "steps of one process, but 2 ranks make those of this optimizer" in message


def shard_as_accelerate(model: Any, optimizer: Any) -> None:
    old = dict(model.named_parameters())
    places = {id(p): name for name, p in old.items()}
    names = [[places[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"][:] = [torch.empty_like(p) for p in group["params"]]
    layouts.fsdp(model)
    new = dict(model.named_parameters())
    for group, own in zip(optimizer.param_groups, names, strict=True):
        group["params"][:] = [new[name] for name in own]


def parallelize(model: Any, optimizer: Any) -> None:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    # the other layers stay plain parameters
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


SHARDINGS = [shard, shard_as_accelerate, parallelize]


def shard_afterwards(rank: int, change: Change, grouped: bool, clear: bool) -> tuple[bool, ...]:
    results: list[list[Tensor]] = []
    kept = []
    for sharded in (True, False):
        model = layouts.mlp()
        optimizer = soap(model, halves(model) if grouped else None)
        groups = list(optimizer.param_groups)
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if sharded:
            change(model, optimizer)
        if clear:
            optimizer.zero_grad()
        for step in range(5):
            steps(model, optimizer, step, step + 1)
            schedule.step()
        results.append(layouts.full_params(model))
        kept.append(all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True)))
        used = [p for group in optimizer.param_groups for p in group["params"]]
        kept.append(set(used) == set(model.parameters()) == set(optimizer.state))
    return same_bits(*results), *kept


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("change", SHARDINGS)
def test_a_model_sharded_before_the_first_step_trains_as_if_it_were_whole(
    change: Change, grouped: bool, clear: bool
) -> None:
    assert pool.run(2, shard_afterwards, change, grouped, clear) == [(True,) * 5] * 2


def shard_afterwards_as(rank: int, layout: str) -> bool:
    results: list[list[Tensor]] = []
    for name in (layout, "replicated"):
        model = layouts.mlp()
        optimizer = soap(model)
        layouts.LAYOUTS[name](model)
        steps(model, optimizer, 0, 5)
        results.append(layouts.full_params(model))
    return same_bits(*results)


@pytest.mark.parametrize("layout", ["hsdp", "tensor_parallel"])
def test_a_model_may_be_sharded_afterwards_in_two_dimensions(layout: str) -> None:
    assert all(pool.run(4, shard_afterwards_as, layout))


def shard_too_late(rank: int, change: Change) -> tuple[str, bool, int]:
    model = layouts.mlp()
    optimizer = soap(model)
    steps(model, optimizer, 0, 2)
    change(model, optimizer)
    layouts.set_grads(model, 2)
    messages: list[str] = []
    same = untouched(model, lambda: messages.append(refused(optimizer.step)))
    assert refused(optimizer.state_dict) == messages[0]
    return messages[0], same, optimizer.global_step


@pytest.mark.parametrize("change", SHARDINGS)
def test_a_model_sharded_after_steps_is_refused(change: Change) -> None:
    for message, same, step in pool.run(2, shard_too_late, change):
        assert same
        assert step == 2
        assert "After 2 steps" in message
        assert "0.weight" in message
        assert "another DTensor" in message
        assert "Build the optimizer after" in message


def shard_with_state(rank: int) -> str:
    model = layouts.mlp()
    optimizer = soap(model)
    first: Any = next(iter(optimizer.state.values()))
    first["initialized"] = torch.ones_like(first["initialized"])
    layouts.fsdp(model)
    return refused(optimizer.step)


def test_given_state_is_not_dropped_when_the_model_is_sharded() -> None:
    for message in pool.run(2, shard_with_state):
        assert "it was given state" in message


def shard_without_model(rank: int, named: bool) -> tuple[str, str]:
    model = layouts.mlp()
    optimizer = AdamW(model.named_parameters() if named else model.parameters())
    shard_as_accelerate(model, optimizer)
    layouts.set_grads(model, 0)
    swapped = refused(optimizer.step)

    model = layouts.mlp()
    optimizer = AdamW(model.named_parameters() if named else model.parameters())
    layouts.fsdp(model)
    layouts.set_grads(model, 0)
    for _ in range(9):
        optimizer.step()
    return swapped, refused(optimizer.step)


@pytest.mark.parametrize("named", [True, False])
def test_bare_parameters_that_were_sharded_are_refused(named: bool) -> None:
    for swapped, idle in pool.run(2, shard_without_model, named):
        assert "It is a DTensor" in swapped
        assert "Pass the model" in swapped
        assert "which moved nothing" in idle


def shard_on_one_rank(rank: int) -> str:
    model = layouts.mlp()
    optimizer = soap(model, mesh=dist.group.WORLD)
    if rank == 1:
        model.double().float()
    layouts.set_grads(model, 0)
    return refused(optimizer.step, DistributedError)


def test_ranks_that_train_different_parameters_are_told() -> None:
    for message in pool.run(2, shard_on_one_rank):
        assert "differ in the parameters" in message
        assert "0.weight: '(16, 16), torch.float64, whole'" in message
        assert "0.weight: '(16, 16), torch.float32, whole'" in message


# --- changes of sharded parameters ---------------------------------------------------------------


def popped(model: Any, optimizer: Any) -> None:
    optimizer.param_groups.pop(0)


def emptied(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[1]["params"].clear()


def shortened(model: Any, optimizer: Any) -> None:
    optimizer.param_groups[1]["params"] = optimizer.param_groups[1]["params"][2:]


def reversed_(model: Any, optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["params"].reverse()


def assigned(model: Any, optimizer: Any) -> None:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)


def registered(model: Any, optimizer: Any) -> None:
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())


def converted(model: Any, optimizer: Any) -> None:
    model.double()


def copied(model: Any, optimizer: Any) -> None:
    new = {"lr": 0.03, "precondition_frequency": 2}
    optimizer.param_groups[:] = [group | new for group in optimizer.param_groups]


REFUSED_LATER: dict[Change, str] = {
    popped: "0.weight, 0.bias, 2.weight, 2.bias left param_groups",
    emptied: "4.weight, 4.bias, 6.weight, 6.bias, 8.weight and 1 more left param_groups",
    shortened: "4.weight, 4.bias left param_groups",
    assigned: "was replaced in the model",
    registered: "4.weight was replaced in the model",
}
FOLLOWED_LATER = [reversed_, copied]


def change_sharded(rank: int, change: Change, layout: str, when: int) -> bool:
    results: list[list[Tensor]] = []
    for name in (layout, "replicated"):
        # a replicated optimizer follows changes as in one process
        dtype = torch.float32 if change is converted else torch.float64
        model = layouts.LAYOUTS[name](layouts.mlp(dtype=dtype))
        mesh: Any = dist.group.WORLD if name == "replicated" and not results else None
        optimizer = soap(model, halves(model), mesh=mesh)
        if change is converted and name == "replicated" and mesh is None:
            optimizer = soap(model.double(), halves(model))
        elif not when:
            change(model, optimizer)
        steps(model, optimizer, 0, 3)
        if when:
            change(model, optimizer)
        steps(model, optimizer, 3, 7)
        results.append(layouts.full_params(model))
    return same_bits(*results)


@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
@pytest.mark.parametrize("change", [*REFUSED_LATER, *FOLLOWED_LATER, converted])
def test_changes_before_the_first_step_are_followed(change: Change, layout: str) -> None:
    assert all(pool.run(2, change_sharded, change, layout, 0))


@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
@pytest.mark.parametrize("change", FOLLOWED_LATER)
def test_changes_that_move_no_state_are_followed_at_any_time(change: Change, layout: str) -> None:
    assert all(pool.run(2, change_sharded, change, layout, 3))


def change_too_late(rank: int, change: Change, only: int | None) -> tuple[str, bool, int]:
    dtype = torch.float32 if change is converted else torch.float64
    model = layouts.fsdp(layouts.mlp(dtype=dtype))
    optimizer = soap(model, halves(model))
    steps(model, optimizer, 0, 2)
    if only in (None, rank):
        change(model, optimizer)
    layouts.set_grads(model, 2)
    messages: list[str] = []
    same = untouched(model, lambda: messages.append(refused(optimizer.step, StructPrecondError)))
    return messages[0], same, optimizer.global_step


@pytest.mark.parametrize("only", [None, 1])
@pytest.mark.parametrize(
    ("change", "message"), [*REFUSED_LATER.items(), (converted, "This rank's part of 0.weight")]
)
def test_changes_after_steps_are_refused_by_all_ranks(
    change: Change, message: str, only: int | None
) -> None:
    for rank, (text, same, step) in enumerate(pool.run(2, change_too_late, change, only)):
        assert message in text
        assert ("Rank 1 cannot make the step" in text) == (only == 1 and rank == 0)
        assert same
        assert step == 2


def move_on_one_rank(rank: int) -> str:
    model = layouts.fsdp(layouts.mlp())
    optimizer = soap(model)
    steps(model, optimizer, 0, 2)
    layouts.set_grads(model, 2)
    if rank == 1:
        for p in model.parameters():
            p.grad = None
        model.to("meta")
    return refused(optimizer.step, StructPrecondError)


def test_a_rank_that_moves_its_parameters_stops_all() -> None:
    first, second = pool.run(2, move_on_one_rank)
    assert "on meta, expected torch.float64" in second
    assert "Rank 1 cannot make the step" in first


# --- groups that are added -----------------------------------------------------------------------


def add(rank: int, layout: str, when: int) -> tuple[bool, bool]:
    results: list[list[Tensor]] = []
    balanced = True
    for name in (layout, "replicated"):
        model = layouts.LAYOUTS[name](layouts.mlp())
        mesh: Any = dist.group.WORLD if name == "replicated" and not results else None
        first, second = halves(model)
        optimizer = soap(model, [first], mesh=mesh)
        steps(model, optimizer, 0, when)
        optimizer.add_param_group(second)
        steps(model, optimizer, when, 7)
        results.append(layouts.full_params(model))
        if len(results) == 1:
            team: Any = optimizer.team
            total = sum(team.loads.state_bytes)
            balanced = max(team.loads.state_bytes) < 0.65 * total
    return same_bits(*results), balanced


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
def test_groups_are_added_at_any_time(layout: str, when: int) -> None:
    assert pool.run(2, add, layout, when) == [(True, True)] * 2


class Mixed(nn.Module):
    """A model with parameters that are sharded, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.whole = nn.Linear(16, 16).double()
        self.sharded = layouts.mlp()


def mix(rank: int, sharded_first: bool, when: int) -> bool:
    results: list[list[Tensor]] = []
    for layout in ("fsdp", "replicated"):
        model = Mixed()
        layouts.LAYOUTS[layout](model.sharded)
        groups = [{"params": list(part.parameters())} for part in (model.whole, model.sharded)]
        first, second = reversed(groups) if sharded_first else groups
        optimizer = soap(model, [first] if when else [first, second])
        steps(model, optimizer, 0, when)
        if when:
            optimizer.add_param_group(second)
        steps(model, optimizer, when, 6)
        results.append(layouts.full_params(model))
    return same_bits(*results)


@pytest.mark.parametrize(("sharded_first", "when"), [(True, 0), (False, 0), (True, 3)])
def test_whole_and_sharded_parameters_are_trained_by_one_optimizer(
    sharded_first: bool, when: int
) -> None:
    assert all(pool.run(2, mix, sharded_first, when))


def add_sharded_to_whole(rank: int) -> tuple[str, int, bool]:
    model = Mixed()
    layouts.fsdp(model.sharded)
    optimizer = soap(model, [{"params": list(model.whole.parameters())}])
    steps(model, optimizer, 0, 2)
    new = {"params": list(model.sharded.parameters())}
    message = refused(lambda: optimizer.add_param_group(new))
    before = layouts.full(model.whole.weight)
    steps(model, optimizer, 2, 3)
    return message, len(optimizer.param_groups), torch.equal(before, model.whole.weight)


def test_sharded_parameters_cannot_join_whole_ones_after_steps() -> None:
    for message, groups, still in pool.run(2, add_sharded_to_whole):
        assert "a new param group has a DTensor of shape (16, 16)" in message
        assert "After 2 steps" in message
        assert groups == 1
        assert not still


def add_after_a_refusal(rank: int) -> tuple[str, int]:
    model = Mixed()
    optimizer = soap(model, [{"params": list(model.whole.parameters())}])
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(3)))
    layouts.fsdp(model.sharded)
    new = {"params": list(model.sharded.parameters())}
    return refused(lambda: optimizer.add_param_group(new)), len(optimizer.param_groups)


def test_sharded_parameters_cannot_join_while_another_change_is_refused() -> None:
    for message, groups in pool.run(2, add_after_a_refusal):
        assert "of shape (3,), was not given to the optimizer" in message
        assert groups == 1


def add_from_another_mesh(rank: int, when: int) -> str:
    model = Mixed()
    layouts.fsdp(model.sharded)
    optimizer = soap(model, [{"params": list(model.sharded.parameters())}])
    steps(model, optimizer, 0, when)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    weight: Any = model.whole.weight
    model.whole.weight = nn.Parameter(DTensor.from_local(weight.detach(), mesh))
    new = {"params": [model.whole.weight]}
    return refused(lambda: optimizer.add_param_group(new), StructPrecondError)


def test_parameters_on_another_mesh_cannot_join() -> None:
    for message in pool.run(2, add_from_another_mesh, 1):
        assert "a new param group has a parameter of shape (16, 16), which is on" in message
    for message in pool.run(2, add_from_another_mesh, 0):
        assert "which are no parts of one" in message


def build_on_meshes_of_equal_names(rank: int) -> str:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    other = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    fully_shard(model[1], mesh=other)
    return refused(lambda: AdamW(model), StructPrecondError)


def test_meshes_of_equal_names_and_other_ranks_are_no_parts_of_one() -> None:
    for message in pool.run(2, build_on_meshes_of_equal_names):
        assert "which are no parts of one" in message


# --- frozen and late parameters ------------------------------------------------------------------


def freeze(model: Any, names: set[str]) -> None:
    for name, p in model.named_parameters():
        if name in names:
            p.requires_grad_(False)


def set_some_grads(model: nn.Module, step: int, without: set[str]) -> None:
    layouts.set_grads(model, step)
    for name, p in model.named_parameters():
        if name in without or not p.requires_grad:
            p.grad = None


FROZEN = {"0.weight", "0.bias", "4.weight", "8.bias"}


def thaw(rank: int, layout: str, refresh: str) -> tuple[bool, bool]:
    results: list[list[Tensor]] = []
    still = []
    for name in (layout, "replicated"):
        model: Any = layouts.LAYOUTS[name](layouts.mlp())
        mesh: Any = dist.group.WORLD if name == "replicated" and not results else None
        freeze(model, FROZEN)
        before = layouts.full(model[0].weight)
        optimizer = soap(model, mesh=mesh, refresh=refresh)
        for step in range(9):
            if step == 3:
                still.append(torch.equal(before, layouts.full(model[0].weight)))
                model[0].requires_grad_(True)
            if step == 5:
                model[4].requires_grad_(True)
            # the gradient of 4.weight comes late, that of 6.weight once, that of 2.bias never
            without = {"2.bias"} | ({"4.weight"} if step < 7 else set())
            set_some_grads(model, step, without | ({"6.weight"} if step != 4 else set()))
            optimizer.step()
        results.append(layouts.full_params(model))
    return same_bits(*results), all(still)


@pytest.mark.parametrize("refresh", ["synchronous", "staggered"])
@pytest.mark.parametrize("layout", ["fsdp", "replicated"])
def test_thawed_and_late_parameters_train_as_with_a_replicated_optimizer(
    layout: str, refresh: str
) -> None:
    assert pool.run(2, thaw, layout, refresh) == [(True, True)] * 2


def thaw_on_one_rank(rank: int) -> tuple[str, bool]:
    model: Any = layouts.fsdp(layouts.mlp())
    freeze(model, {"0.weight"})
    optimizer = soap(model)
    steps(model, optimizer, 0, 1)
    if rank == 0:
        model[0].requires_grad_(True)
    layouts.set_grads(model, 1)
    message = refused(optimizer.step, DistributedError)
    model[0].requires_grad_(True)
    before = layouts.full(model[0].weight)
    steps(model, optimizer, 1, 3)  # the first one of SOAP only starts its state
    return message, torch.equal(before, layouts.full(model[0].weight))


def test_a_parameter_thawed_on_one_rank_is_reported_until_it_is_thawed_on_all() -> None:
    for message, still in pool.run(2, thaw_on_one_rank):
        assert "thawed" in message
        assert not still


def adapters(rank: int) -> tuple[int, int]:
    """Return the bytes of state with a frozen base, and of the adapters alone."""
    sizes = []
    for whole in (True, False):
        model: Any = layouts.mlp()
        for i in (0, 2, 4):
            model[i].requires_grad_(False)
        layouts.fsdp(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = soap(model, None if whole else trained)
        steps(model, optimizer, 0, 1)
        sizes.append(sum(t.nbytes for b in optimizer.buckets for t in b.named_tensors().values()))
    return sizes[0], sizes[1]


def test_a_frozen_base_costs_no_state() -> None:
    for with_base, alone in pool.run(2, adapters):
        assert with_base == alone > 0


def partly_frozen(rank: int) -> bool:
    results: list[list[Tensor]] = []
    for layout in ("fsdp", "replicated"):
        model: Any = layouts.LAYOUTS[layout](layouts.mlp())
        freeze(model, {"2.bias"})
        # of entries alone: the kernels of matrices depend on where 16 x 17 of them are in memory
        optimizer = AdamW(model, combine_params=(LinearWeightBias(), PerParameter()))
        for step in range(6):
            if step == 2:
                model[4].bias.requires_grad_(False)  # its unit waits
            if step == 4:
                model[4].bias.requires_grad_(True)
                model[2].bias.requires_grad_(True)
            set_some_grads(model, step, set())
            optimizer.step()
        results.append(layouts.full_params(model))
    return same_bits(*results)


def test_units_that_are_partly_frozen_wait_as_with_a_replicated_optimizer() -> None:
    assert all(pool.run(2, partly_frozen))


def muon_thaw(rank: int) -> bool:
    results: list[list[Tensor]] = []
    for layout in ("fsdp", "replicated"):
        model: Any = layouts.LAYOUTS[layout](layouts.mlp())
        freeze(model, FROZEN)
        optimizer = Muon(model, lr=0.01)
        for step in range(6):
            if step == 3:
                model.requires_grad_(True)
            set_some_grads(model, step, set())
            optimizer.step()
        results.append(layouts.full_params(model))
    return same_bits(*results)


def test_several_strategies_get_thawed_units() -> None:
    assert all(pool.run(2, muon_thaw))
