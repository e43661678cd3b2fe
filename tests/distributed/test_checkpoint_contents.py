"""What checkpoints hold where rows have owners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from structprecond import SOAP, SIRFShampoo, StructuredOptimizer
from structprecond.core.counters import UNASSIGNED
from tests.distributed import layouts, pool, resuming
from tests.helpers import same_bits

State = dict[int, dict[str, Tensor]]


def state_of(optimizer: StructuredOptimizer) -> State:
    """Return the state that a checkpoint holds, whole; only the parts may be compared."""
    state: State = optimizer.state_dict()["state"]
    return {i: {n: layouts.full(t) for n, t in entry.items()} for i, entry in state.items()}


def odd(m: Any, **more: Any) -> StructuredOptimizer:
    """Make an optimizer whose state has counters, vectors and matrices."""
    return SOAP(m, lr=0.01, precondition_frequency=2, combine_params=resuming.JOINT, **more)


# --- layout --------------------------------------------------------------------------------------


def find_wrong_parts(rank: int, layout: str, steps: int) -> tuple[list[str], list[Any]]:
    """Compare a checkpoint with torch's chunks of what one process saves."""
    saved = []
    torch.manual_seed(0)  # one process does not take it from the first rank
    for name in (layout, "alone"):
        place = layouts.replicated if name == "alone" else layouts.LAYOUTS[name]
        # of odd lengths, and shorter than there are ranks
        model = place(layouts.mlp((5, 3, 8, 2)))
        optimizer = odd(model, **({"mesh": dist.group.WORLD} if name == "replicated" else {}))
        resuming.train(model, optimizer, 0, steps)
        saved.append(optimizer.state_dict()["state"])
    mine, expected = saved
    wrong, names = [], [(i, name) for i, entry in mine.items() for name in entry]
    for i, name in [(i, name) for i, entry in expected.items() for name in entry]:
        whole, part = expected[i][name], mine[i][name]
        # the unit of four heads, 2.weight, has a number per head in each counter
        if whole.ndim == 0 or (i == 2 and whole.ndim == 1):
            fits = not isinstance(part, DTensor) and part.dtype == whole.dtype
            local = part
        else:
            fits = isinstance(part, DTensor) and part.placements == (Shard(0),)
            fits = fits and part.shape == whole.shape and part.dtype == whole.dtype
            chunks = whole.chunk(part.device_mesh.size())
            place = part.device_mesh.get_local_rank()
            whole = chunks[place] if place < len(chunks) else whole[:0]
            local = part.to_local()
        if not fits or not torch.allclose(local.to(torch.float64), whole.to(torch.float64), 1e-9):
            wrong.append(f"{i} {name}")
    return wrong, names


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize(
    ("world", "layout"),
    [(2, "replicated"), (2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "tensor_parallel")],
)
def test_tensors_are_chunked_as_torch_does_and_counters_are_whole(
    world: int, layout: str, steps: int
) -> None:
    results = pool.run(world, find_wrong_parts, layout, steps)
    assert [wrong for wrong, _ in results] == [[]] * world
    assert all(names == results[0][1] for _, names in results)


def shown(rank: int) -> tuple[dict[str, int], list[bool]]:
    """Return the entries of each state tensor in `optimizer.state`, and which ranks hold them."""
    model, optimizer = resuming.build("fsdp", odd)
    resuming.train(model, optimizer, 0, 1)
    entries = {
        f"{number} {name}": tensor.numel()
        for number, p in enumerate(model.parameters())
        for name, tensor in optimizer.state[p].items()
    }
    return entries, [bool(optimizer.state[p]["global_step"] == 1) for p in model.parameters()]


def test_each_rank_shows_only_its_own_rows_under_all_names() -> None:
    results = pool.run(2, shown)
    alone_model, alone = resuming.build("alone", odd)
    for number, p in enumerate(alone_model.parameters()):
        for name, tensor in alone.state[p].items():
            parts = [entries[f"{number} {name}"] for entries, _ in results]
            if name in ("global_step", "batch_size"):
                assert parts == [1, 1]
            else:
                assert sum(parts) == tensor.numel(), (number, name)
    assert all(all(steps) for _, steps in results)


# --- values that no trajectory shows ---------------------------------------------------------


def keeps_phase_offsets(rank: int) -> tuple[Any, Any]:
    model, optimizer = resuming.build("fsdp", resuming.OPTIMIZERS["SOAP staggered"])
    resuming.train(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    for i, entry in saved["state"].items():
        assert int(entry["phase_offset"]) != UNASSIGNED
        entry["phase_offset"] += 5 + i
    _, new = resuming.build("fsdp", resuming.OPTIMIZERS["SOAP staggered"])
    new.load_state_dict(saved)
    resuming.train(_, new, 3, 5)
    expected = {i: int(entry["phase_offset"]) for i, entry in saved["state"].items()}
    return expected, {i: int(entry["phase_offset"]) for i, entry in state_of(new).items()}


def test_phase_offsets_of_a_checkpoint_stay() -> None:
    for expected, found in pool.run(2, keeps_phase_offsets):
        assert found == expected


def starts_anew(rank: int, name: str) -> bool:
    """Load what was saved before any step into an optimizer that has made some."""
    make = resuming.OPTIMIZERS[name]
    _, optimizer = resuming.build("fsdp", make)
    saved = optimizer.state_dict()
    model, new = resuming.build("fsdp", make)
    start = layouts.full_params(model)
    resuming.train(model, new, 3, 6)
    resuming.set_params(model, start)
    new.load_state_dict(saved)
    resuming.train(model, new, 0, resuming.STEPS)
    return same_bits(layouts.full_params(model), resuming.uninterrupted("fsdp", make))


@pytest.mark.parametrize("name", resuming.OPTIMIZERS)
def test_state_that_was_never_stepped_starts_a_run_anew(name: str) -> None:
    assert all(pool.run(2, starts_anew, name))


def loads_numbers(rank: int) -> list[Any]:
    model, optimizer = resuming.build(
        "fsdp", lambda m: SIRFShampoo(m, lr=torch.tensor(0.25), batch_size=8)
    )
    resuming.train(model, optimizer, 0, 3)
    optimizer.param_groups[0]["lr"].fill_(0.125)
    saved = optimizer.state_dict()
    _, new = resuming.build(
        "fsdp", lambda m: SIRFShampoo(m, lr=torch.tensor(0.5), batch_size=lambda x: len(x[0]))
    )
    lr = new.param_groups[0]["lr"]
    new.load_state_dict(saved)
    assert new.param_groups[0]["lr"] is lr
    return [lr.item(), new.global_step, new.batch_size]


def test_learning_rates_in_tensors_steps_and_batch_size_are_loaded() -> None:
    assert pool.run(2, loads_numbers) == [[0.125, 3, 8]] * 2


def resumes_kahan(rank: int, layout: str) -> bool:
    def build() -> tuple[Any, StructuredOptimizer]:
        model = layouts.LAYOUTS[layout](layouts.mlp(dtype=torch.bfloat16))
        mesh: Any = dist.group.WORLD if layout == "replicated" else None
        return model, SOAP(model, lr=1e-4, precondition_frequency=2, rounding="kahan", mesh=mesh)

    model, optimizer = build()
    resuming.train(model, optimizer, 0, 4)
    saved = optimizer.state_dict()
    assert saved["state"][0]["compensation"].dtype == torch.bfloat16
    assert any(layouts.full(entry["compensation"]).any() for entry in saved["state"].values())
    new_model, new = build()
    resuming.set_params(new_model, layouts.full_params(model))
    new.load_state_dict(saved)
    for m, o in ((model, optimizer), (new_model, new)):
        resuming.train(m, o, 4, 8)
    return same_bits(layouts.full_params(new_model), layouts.full_params(model))


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_compensation_is_resumed(layout: str) -> None:
    assert all(pool.run(2, resumes_kahan, layout))


def thaws(rank: int) -> tuple[bool, bool]:
    """Load a checkpoint of a model without frozen parameters into one with some."""
    make = resuming.OPTIMIZERS["KLShampoo"]
    model, optimizer = resuming.build("fsdp", make)
    resuming.train(model, optimizer, 0, 3)
    new_model = layouts.fsdp(layouts.mlp())
    first = next(new_model.parameters())
    first.requires_grad_(False)
    new = make(new_model)
    none = set(new.state_dict()["state"][0]) == {"global_step", "batch_size"}
    resuming.set_params(new_model, layouts.full_params(model))
    new.load_state_dict(optimizer.state_dict())
    first.requires_grad_(True)
    resuming.train(model, optimizer, 3, 6)
    resuming.train(new_model, new, 3, 6)
    return none, same_bits(layouts.full_params(new_model), layouts.full_params(model))


def test_frozen_units_get_the_state_that_a_checkpoint_has_of_them() -> None:
    assert pool.run(2, thaws) == [(True, True)] * 2


# --- other layouts -------------------------------------------------------------------------------


def loads(rank: int, shape: tuple[int, ...], placements: tuple[Placement, ...] | None) -> bool:
    make = resuming.OPTIMIZERS["SOAP joint"]
    model, optimizer = resuming.build("fsdp", make)
    resuming.train(model, optimizer, 0, 3)
    saved, expected = optimizer.state_dict(), state_of(optimizer)
    names = tuple(map(str, range(len(shape))))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for i, entry in expected.items():
        for name, whole in entry.items():
            axes = max((p.dim + 1 for p in placements or () if isinstance(p, Shard)), default=0)
            if placements is None or whole.ndim < axes:
                saved["state"][i][name] = whole
            elif whole.ndim:
                saved["state"][i][name] = distribute_tensor(whole, mesh, placements)
    _, new = resuming.build("fsdp", make)
    new.load_state_dict(saved)
    return same_bits(state_of(new), expected)


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((4,), None),
        ((4,), (Shard(1),)),
        ((4,), (Replicate(),)),
        ((2, 2), (Replicate(), Shard(0))),
        ((2, 2), (Shard(1), Shard(0))),
        ((2, 2), (Shard(0), Shard(0))),
    ],
    ids=str,
)
def test_dtensors_in_any_layout_and_whole_tensors_are_loaded(
    shape: tuple[int, ...], placements: tuple[Placement, ...] | None
) -> None:
    assert all(pool.run(4, loads, shape, placements))
