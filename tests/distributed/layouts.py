"""Models as DDP, FSDP2, HSDP and tensor parallelism place them, and gradients to inject."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from structprecond.core.boxes import Box, box_of

_P = ParamSpec("_P")
_T = TypeVar("_T")

# Multiples of 16: then kernels treat the rows of a stack alike, wherever they are in memory.
DIMS = (16, 16, 32, 16, 16, 16)


def same_on_all_ranks(build: Callable[_P, _T]) -> Callable[_P, _T]:
    """Let a function use the same random numbers on all ranks."""

    @wraps(build)
    def seeded(*args: _P.args, **keywords: _P.kwargs) -> _T:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(*args, **keywords)

    return seeded


@same_on_all_ranks
def mlp(dims: Sequence[int] = DIMS, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Return a network of linear layers."""
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(dims):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def replicated(model: nn.Module) -> nn.Module:
    """Return the model with whole parameters on every rank."""
    return model


def fsdp(model: nn.Module) -> nn.Module:
    """Shard every parameter along its first axis over all ranks."""
    return _shard(model, (dist.get_world_size(),), ("shard",))


def hsdp(model: nn.Module) -> nn.Module:
    """Shard over 2 ranks, and replicate over the others."""
    return _shard(model, (dist.get_world_size() // 2, 2), ("replicate", "shard"))


def tensor_parallel(model: nn.Module) -> nn.Module:
    """Shard over 2 ranks by FSDP, and over 2 by tensor parallelism."""
    mesh = init_device_mesh(
        "cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor")
    )
    styles = (ColwiseParallel, RowwiseParallel)
    linear = [name for name, m in model.named_children() if isinstance(m, nn.Linear)]
    plan = {name: styles[i % 2]() for i, name in enumerate(linear)}
    # the last linear layers stay whole
    parallelize_module(model, mesh["tensor"], dict(list(plan.items())[: len(plan) // 2 * 2]))
    for module in model.children():
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return model


LAYOUTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replicated": replicated,
    "fsdp": fsdp,
    "hsdp": hsdp,
    "tensor_parallel": tensor_parallel,
}
"""What places the parameters of a model, by name; the last two need 4 ranks."""


def _shard(model: nn.Module, shape: tuple[int, ...], names: tuple[str, ...]) -> nn.Module:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for module in model.children():
        if any(True for _ in module.parameters()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def alone() -> Iterator[None]:
    """Train on one rank without the others, of which optimizers warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"torch\.distributed has")
        yield


def like(p: Tensor, whole: Tensor) -> Tensor:
    """Return a tensor placed like a parameter."""
    if not isinstance(p, DTensor):
        return whole.clone()
    box = box_of(p, p.device_mesh.get_coordinate() or ())
    part = box.of(whole, Box.whole(whole.shape)).contiguous()
    return DTensor.from_local(
        part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def set_grads(model: nn.Module, step: int) -> None:
    """Set random gradients, the same on all ranks and in all layouts."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in model.parameters():
        whole = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = like(p, whole.to(p.dtype))


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor."""
    with torch.no_grad():
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def full_params(model: nn.Module) -> list[Tensor]:
    """Return the whole parameters of a model."""
    return [full(p) for p in model.parameters()]
