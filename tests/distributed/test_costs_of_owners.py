"""What owners send, call and keep, by formulas; and where ranks hold what."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from workloads import WORKLOADS

from structprecond import (
    SOAP,
    KLShampoo,
    Muon,
    PerParameter,
    SIRFShampoo,
    SplitHeads,
    StructuredOptimizer,
)
from structprecond.core import agreement
from structprecond.core.boxes import Box, box_of
from structprecond.core.finite import count_suspects
from structprecond.core.ranks import holders_of, share_of_data
from structprecond.errors import StructPrecondError
from structprecond.plan import plan
from tests.distributed import layouts, pool
from tests.helpers import same_bits

# --- collectives and bytes -----------------------------------------------------------------------


def square(layers: int = 8) -> nn.Module:
    """Return square matrices of one shape, one bucket of which each owner gets an equal part."""
    return nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(layers)]).double()


def measure(rank: int, layout: str, heads: int = 1) -> tuple[int, int, int]:
    """Return the bytes that a step sends to other ranks, its collectives, and its buckets."""
    model = layouts.LAYOUTS[layout](square())
    mesh: Any = dist.group.WORLD if layout == "replicated" else None
    rules = (SplitHeads("*.weight", heads), PerParameter()) if heads > 1 else None
    optimizer = SOAP(model, lr=0.01, mesh=mesh, combine_params=rules)
    group: Any = optimizer.team
    me = group.ranks.me
    sent, calls = 0, 0
    send, gather, gather_objects = (
        dist.all_to_all_single,
        agreement._all_gather,
        dist.all_gather_object,
    )

    def note(function: Any) -> Any:
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal sent, calls
            calls += 1
            if function is send:
                _, given, _, splits = args[:4]
                assert splits[me] == 0  # nothing goes to oneself
                sent += given.nbytes
            return function(*args, **keywords)

        return call

    for step in range(3):
        layouts.set_grads(model, step)
        sent = calls = 0
        with (
            mock.patch.object(dist, "all_to_all_single", note(send)),
            mock.patch.object(dist, "all_gather_object", note(gather_objects)),
            mock.patch.object(agreement, "_all_gather", note(gather)),
        ):
            optimizer.step()
    return sent, calls, len(group.exchanges)


@pytest.mark.parametrize("world", [2, 4])
def test_whole_parameters_take_one_collective_per_bucket_and_their_size_times_w_minus_1_over_w(
    world: int,
) -> None:
    size = 8 * 32 * 32 * 8
    for sent, calls, buckets in pool.run(world, measure, "replicated"):
        assert buckets == 1
        assert calls == buckets + 1
        # an owner has P/W, and sends it to the W - 1 others
        assert sent == pytest.approx(size / world * (world - 1), rel=0.01)


@pytest.mark.parametrize(
    ("world", "layout"), [(2, "fsdp"), (4, "fsdp"), (4, "hsdp"), (4, "tensor_parallel")]
)
def test_shards_take_two_collectives_per_bucket_and_three_times_their_part(
    world: int, layout: str
) -> None:
    size = 8 * 32 * 32 * 8
    owners = 2 if layout == "hsdp" else world
    answers = pool.run(world, measure, layout)
    for _, calls, buckets in answers:
        assert buckets == 1
        assert calls == 2 * buckets + 1
    # in: a rank holds P/S of the parameters and of the gradients, of which the S - 1 other owners
    # own (S - 1)/S; out: an owner sends all of its P/S except what it holds itself
    expected = 3 * size / owners * (owners - 1) / owners
    assert [sent for sent, _, _ in answers] == pytest.approx([expected] * world, rel=0.01)


# under FSDP, each rank holds the head that it owns
@pytest.mark.parametrize(("layout", "expected"), [("replicated", 1), ("fsdp", 0)])
def test_units_with_several_owners_take_no_more_collectives(layout: str, expected: int) -> None:
    for _, calls, buckets in pool.run(2, measure, layout, 2):
        assert buckets == 1
        assert calls == expected + 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0.0, 0.99, 1.01, 1e3, math.inf, math.nan])
def test_parts_of_a_gradient_that_is_too_large_are_suspects(
    dtype: torch.dtype, size: float
) -> None:
    """Some rank has to notice, however the gradient is split."""
    limits = {torch.float64: 1.158e77, torch.float16: 65504.0}
    limit = limits.get(dtype, 4.29e9)
    for parts in (1, 2, 8):
        params = [nn.Parameter(torch.zeros(16, dtype=dtype)) for _ in range(parts)]
        for p in params:
            p.grad = torch.full_like(p, limit * min(size, 2) / (16 * parts) ** 0.5)
        grad = params[-1].grad
        assert grad is not None
        grad[0] = grad[0] if size < 2 else size * limit if math.isfinite(size) else size
        found = [count_suspects([p], parts) for p in params]
        assert any(found) == (not size < 1)


def test_parameters_without_a_gradient_are_no_suspects() -> None:
    assert count_suspects([nn.Parameter(torch.zeros(2))], 1) == 0
    empty = nn.Parameter(torch.zeros(0))
    empty.grad = torch.zeros(0)
    assert count_suspects([empty], 4) == 0


# --- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(
    ("optimizer", "most"), [(SOAP, 1.1), (KLShampoo, 1.1), (SIRFShampoo, 1.1), (Muon, 1.2)]
)
def test_each_of_w_ranks_keeps_little_more_than_1_over_w_of_the_state(
    optimizer: Any, most: float, world: int
) -> None:
    def make(model: nn.Module, **keywords: Any) -> StructuredOptimizer:
        if optimizer is SIRFShampoo:
            keywords["batch_size"] = 4
        made: StructuredOptimizer = optimizer(model, lr=0.01, **keywords)
        return made

    with torch.device("meta"):
        model = WORKLOADS["W1"]()
        tensors = [t for b in make(model).buckets for t in b.named_tensors().values()]
    whole = sum(t.numel() * t.element_size() for t in tensors)
    for mesh in ("fsdp", "ddp"):
        forecast = plan(WORKLOADS["W1"], make, world=world, mesh=mesh)
        kept = [cost.state_bytes for cost in forecast.ranks]
        assert max(kept) <= most * whole / world
        assert sum(kept) == pytest.approx(whole, rel=1e-3)


# --- places --------------------------------------------------------------------------------------

PLACEMENTS: dict[int, list[list[Placement]]] = {
    2: [[Shard(0)], [Shard(1)], [Replicate()]],
    4: [
        [Shard(0), Shard(1)],
        [Shard(1), Shard(0)],
        [Replicate(), Shard(0)],
        [Shard(1), Replicate()],
        [Shard(0), Shard(0)],
        [Shard(2), Shard(0)],
        [Replicate(), Replicate()],
    ],
}


def entries(shape: tuple[int, ...]) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape).double()


def held(tensor: Tensor, whole: Tensor) -> bool:
    """Return whether a rank holds what its box says."""
    assert isinstance(tensor, DTensor)
    box = box_of(tensor, tensor.device_mesh.get_coordinate() or ())
    mine = tensor.to_local()
    if box.numel == 0:
        return mine.numel() == 0
    return torch.equal(mine, box.of(whole, Box.whole(whole.shape)))


def look(rank: int) -> list[Any]:
    world = dist.get_world_size()
    wrong: list[Any] = []
    mesh = init_device_mesh("cpu", (2,) * (world // 2), mesh_dim_names=("a", "b")[: world // 2])
    for shape in ((8, 4, 4), (5, 3, 2), (1, 2, 3), (3, 1, 7)):
        whole = entries(shape)
        for placements in PLACEMENTS[world]:
            if not held(distribute_tensor(whole, mesh, placements), whole):
                wrong.append((shape, placements))
    return wrong


@pytest.mark.parametrize("world", PLACEMENTS)
def test_ranks_hold_the_boxes_of_their_placements(world: int) -> None:
    assert pool.run(world, look) == [[]] * world


def look_at_layout(rank: int, layout: str, dims: tuple[int, ...]) -> list[str]:
    wrong = []
    whole = dict(layouts.mlp(dims).named_parameters())
    model = layouts.LAYOUTS[layout](layouts.mlp(dims))
    kinds = set()
    for name, p in model.named_parameters():
        kinds |= {type(placement).__name__ for placement in getattr(p, "placements", ())}
        if not held(p.detach(), whole[name].detach()):
            wrong.append(name)
    # FSDP of what tensor parallelism has sharded along the first axis as well
    assert ("_StridedShard" in kinds) == (layout == "tensor_parallel")
    return wrong


@pytest.mark.parametrize("dims", [(8, 8, 8, 8, 8), (5, 3, 7, 1, 2)])
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tensor_parallel"])
def test_ranks_hold_the_boxes_of_their_layout(layout: str, dims: tuple[int, ...]) -> None:
    assert pool.run(4, look_at_layout, layout, dims) == [[]] * 4


def share_of(model: nn.Module, mesh: Any = None) -> float | None:
    ranks, everyone = holders_of(list(model.parameters()), mesh)
    return share_of_data(model, ranks, everyone.size())


def shares(rank: int) -> list[float | None]:
    found = [share_of(layouts.mlp(), dist.group.WORLD)]
    for layout in ("fsdp", "hsdp", "tensor_parallel"):
        found.append(share_of(layouts.LAYOUTS[layout](layouts.mlp())))
    model = nn.Sequential(layouts.mlp())
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    fully_shard(model[0], mesh=mesh["data"])  # only a part, and not the root
    found.append(share_of(model))
    # placed by something else: these ranks may see the same batch or different ones
    model = layouts.mlp()
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return [*found, share_of(model)]


def test_the_share_of_data_is_that_of_fsdps_own_mesh() -> None:
    assert pool.run(4, shares) == [[1.0, 1.0, 1.0, 0.5, 1.0, None]] * 4


def count_under_tensor_parallelism(rank: int) -> tuple[str, int]:
    """Return the error of counting samples, and the number that state shows if it is given."""
    model = layouts.mlp()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = SIRFShampoo(model, lr=0.01)
    before = [layouts.full(p) for p in model.parameters()]
    model(torch.ones(8, layouts.DIMS[0], dtype=torch.float64)).square().mean().backward()
    with pytest.raises(StructPrecondError) as caught:
        optimizer.step()
    assert same_bits(before, layouts.full_params(model))
    optimizer.batch_size = 8
    optimizer.step()
    return str(caught.value), int(optimizer.state_dict()["state"][0]["batch_size"])


def test_samples_are_not_counted_where_ranks_may_share_a_batch() -> None:
    for message, number in pool.run(2, count_under_tensor_parallelism):
        assert "Pass batch_size= as an integer, the samples of all ranks" in message
        assert number == 8
