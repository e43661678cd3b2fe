"""Training on several ranks: what trainers do around a step, against one process."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from structprecond import SAM, SOAP, Muon
from structprecond.core.boxes import local
from structprecond.errors import StructPrecondError
from tests.distributed import layouts, pool

STEPS, BATCH = 8, 64
Change = Callable[[nn.Module], nn.Module]


def batch(step: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return the inputs and targets of all ranks."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, BATCH, layouts.DIMS[0], generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def own_part(tensor: Tensor, rank: int, layout: str | None) -> Tensor:
    """Return a rank's part of a batch; ranks of tensor parallelism share theirs."""
    if layout is None:
        return tensor
    parts, number = dist.get_world_size(), rank
    if layout == "tensor_parallel":
        parts, number = parts // 2, rank // 2
    return tensor.chunk(parts)[number]


def distance(one: list[Tensor], two: list[Tensor], start: list[Tensor]) -> float:
    """Return the distance of two results, relative to the way from the start."""
    first, second, zero = (torch.cat([t.flatten() for t in ts]) for ts in (one, two, start))
    return float((first - second).norm() / (second - zero).norm())


def compared(train: Callable[..., nn.Module], rank: int, layout: str, *args: Any) -> float:
    """Return how far training on several ranks is from training in one process."""
    start = layouts.full_params(layouts.mlp())
    results = [layouts.full_params(train(rank, name, *args)) for name in (layout, None)]
    return distance(results[0], results[1], start)


def placed(layout: str | None) -> nn.Module:
    """Return the model in a layout; None for one process."""
    return layouts.LAYOUTS[layout or "replicated"](layouts.mlp())


def loss_of(model: nn.Module, rank: int, layout: str | None, step: int) -> Tensor:
    """Return the loss on a rank's part of a batch."""
    x, y = (own_part(t, rank, layout) for t in batch(step))
    loss: Tensor = (model(x) - y).square().mean()
    return loss


# --- SAM -----------------------------------------------------------------------------------------


def train_with_sam(rank: int, layout: str | None, base: Any, adaptive: bool) -> nn.Module:
    model = placed(layout)
    sam = SAM(model, base, rho=0.3, adaptive=adaptive, lr=0.01)
    for step in range(STEPS):

        def closure(step: int = step) -> float:
            loss = loss_of(model, rank, layout, step)
            loss.backward()
            return loss.item()

        sam.step(closure)
    return model


def compare_sam(rank: int, layout: str, base: Any, adaptive: bool) -> float:
    return compared(train_with_sam, rank, layout, base, adaptive)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("base", [SOAP, SGD])
@pytest.mark.parametrize(("world", "layout"), [(2, "fsdp"), (4, "hsdp"), (4, "tensor_parallel")])
def test_sam_perturbs_by_the_norm_of_all_shards(
    world: int, layout: str, base: Any, adaptive: bool
) -> None:
    assert max(pool.run(world, compare_sam, layout, base, adaptive)) < 1e-9


def skip_with_sam(rank: int, base: Any, first: bool) -> tuple[bool, int, int]:
    """Make a step in which one rank's shard of one gradient is not finite, in one of the passes."""
    model = placed("fsdp")
    sam = SAM(model, base, lr=0.1)
    before = layouts.full_params(model)

    def spoil(here: bool) -> None:
        loss_of(model, rank, "fsdp", 0).backward()
        grad: Any = next(model.parameters()).grad
        if here and rank == 1:
            grad.to_local()[0, 0] = torch.nan

    spoil(first)
    sam.first_step(zero_grad=True)
    spoil(not first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        sam.second_step()
    warned = sum("not finite" in str(w.message) for w in caught)
    after = layouts.full_params(model)
    # a structured base skips the unit alone in the second pass
    same = [torch.equal(p, q) for p, q in zip(before, after, strict=True)]
    good = all(same) if first or base is SGD else same[0] and not same[2]
    return good, sam.skipped, warned


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("base", [Muon, SGD])
def test_sam_skips_on_all_ranks_what_one_rank_finds(base: Any, first: bool) -> None:
    (good, skips, warned), (other, others, warned_too) = pool.run(2, skip_with_sam, base, first)
    assert good
    assert (good, skips) == (other, others)
    # in the second pass of a structured base, the owner of the unit warns
    assert warned + warned_too == (2 if first or base is SGD else 1)


def lose_a_gradient_with_sam(rank: int, base: Any) -> tuple[str, bool]:
    """Make a first step in which a rank has no gradients; return the error, and what stayed."""
    model = placed("fsdp")
    sam = SAM(model, base, lr=0.1)
    loss_of(model, rank, "fsdp", 0).backward()
    params = list(model.parameters())
    before = [local(p).clone() for p in params]
    grads = [p.grad for p in params]
    for p in params if rank else ():
        p.grad = None
    try:
        sam.first_step()
        message = "nothing"
    except StructPrecondError as error:
        message = f"{type(error).__name__}: {error}"
    same = all(map(torch.equal, before, map(local, params)))
    if base is not SGD:  # it has made no collective that the others missed
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        sam.first_step()
        loss_of(model, rank, "fsdp", 0).backward()
        sam.second_step()
    return message, same


def test_a_gradient_that_sam_misses_on_one_rank_raises_on_all() -> None:
    for message, same in pool.run(2, lose_a_gradient_with_sam, Muon):
        assert "DistributedError: The ranks differ in the sharded parameters with" in message
        assert re.search(r"rank 0 has 0.weight: .*, rank 1 has 0.weight: None", message)
        assert same


def test_a_norm_that_does_not_arrive_names_the_ranks() -> None:
    (message, same), _ = pool.run(2, lose_a_gradient_with_sam, SGD, group_s=2)
    assert "LostRankError: Rank 0 did not get the norm of the gradients from the ranks 1" in message
    assert same


# --- accumulation, clipping, scaling -------------------------------------------------------------


@contextlib.contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients without sending them."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
    yield
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(True)


def train_with_accumulation(rank: int, layout: str | None, clip: bool) -> nn.Module:
    model = placed(layout)
    parallel = DistributedDataParallel(model) if layout == "replicated" else model
    mesh: Any = dist.group.WORLD if layout == "replicated" else None
    optimizer = SOAP(parallel, lr=0.01, precondition_frequency=3, mesh=mesh)
    for step in range(0, 2 * STEPS, 2):
        optimizer.zero_grad()
        with without_sync(parallel):
            (loss_of(parallel, rank, layout, step) / 2).backward()
        (loss_of(parallel, rank, layout, step + 1) / 2).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return model


def compare_accumulation(rank: int, layout: str) -> float:
    # torch clips only gradients on one mesh
    return compared(train_with_accumulation, rank, layout, layout != "tensor_parallel")


@pytest.mark.parametrize(
    ("world", "layout"), [(2, "replicated"), (2, "fsdp"), (4, "hsdp"), (4, "tensor_parallel")]
)
def test_accumulated_and_clipped_gradients_train_as_in_one_process(world: int, layout: str) -> None:
    assert max(pool.run(world, compare_accumulation, layout)) < 1e-8


def train_with_scaler(rank: int, layout: str | None) -> tuple[nn.Module, float]:
    model = placed(layout)
    optimizer = Muon(model, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, rank, layout, step)
        # an overflow of one rank's part of the batch
        loss = loss * torch.inf if step == 2 and rank == 0 else loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return model, scaler.get_scale()


def scale_on_ranks(rank: int) -> tuple[float, list[Tensor]]:
    model, scale = train_with_scaler(rank, "fsdp")
    return scale, layouts.full_params(model)


def test_a_scaler_skips_on_all_ranks() -> None:
    (scale, params), (other, others) = pool.run(2, scale_on_ranks)
    # 2 good steps, half after the bad one, double after 3 good ones, and 2 more
    assert (scale, other) == (1024.0, 1024.0)
    assert all(p.isfinite().all() for p in params)
    assert all(map(torch.equal, params, others))


# --- mixed precision, compiled models, recomputation ---------------------------------------------


def compile_layers(model: nn.Module) -> nn.Module:
    """Compile every layer, as trainers do with blocks."""
    for layer in model.children():
        layer.compile(backend="eager")
    return model


class Recomputed(nn.Sequential):
    """Layers whose activations are computed again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def recompute(model: nn.Module) -> nn.Module:
    return Recomputed(*model.children())


def train_changed(rank: int, layout: str | None, change: Change, optimizer: Any) -> nn.Module:
    model = layouts.LAYOUTS[layout or "replicated"](change(layouts.mlp()))
    options = {} if optimizer is Muon else {"precondition_frequency": 3}
    made = optimizer(model, lr=0.01, **options)
    for step in range(STEPS):
        made.zero_grad()
        loss_of(model, rank, layout, step).backward()
        made.step()
    return model


def compare_changed(rank: int, change: Change, optimizer: Any) -> float:
    return compared(train_changed, rank, "fsdp", change, optimizer)


@pytest.mark.parametrize("optimizer", [SOAP, Muon])
@pytest.mark.parametrize("change", [compile_layers, recompute])
def test_compiled_and_recomputed_layers_train_as_in_one_process(
    change: Change, optimizer: Any
) -> None:
    assert max(pool.run(2, compare_changed, change, optimizer)) < 1e-8


def train_mixed(rank: int) -> tuple[set[torch.dtype], list[bool]]:
    """Train float32 parameters in bfloat16; return the dtypes of state, and what moved."""
    model = layouts.mlp(dtype=torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = SOAP(model, lr=0.01, precondition_frequency=3)
    start = layouts.full_params(model)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        x, y = (own_part(t, rank, "fsdp").float() for t in batch(0))
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = [not torch.equal(p, q) for p, q in zip(start, layouts.full_params(model), strict=True)]
    state = [t for b in optimizer.buckets for t in b.state.named_tensors().values()]
    return {t.dtype for t in state}, moved


def test_a_mixed_precision_policy_keeps_float32_parameters_and_state() -> None:
    for dtypes, moved in pool.run(2, train_mixed):
        assert dtypes == {torch.float32}
        assert all(moved)
