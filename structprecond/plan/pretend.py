"""A world of one process: a process group whose other ranks do not exist, and a model on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from structprecond.errors import StructPrecondError
from structprecond.plan.mesh import SHARD, MeshSpec


@contextmanager
def pretend(world: int) -> Iterator[None]:
    """Let this process be the first of many ranks; nothing is sent.

    Args:
        world: The number of ranks.

    Raises:
        StructPrecondError: If the process has a process group already.
    """
    # it registers the backend
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise StructPrecondError(
            f"A plan needs a process group of its own, but this process is one of "
            f"{dist.get_world_size()} ranks. Make the plan in a process of its own, as "
            "`python -m structprecond.plan` does."
        )
    hook = sys.excepthook  # torch's own names the rank, also after the group is destroyed
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def place(model: nn.Module, spec: MeshSpec) -> None:
    """Replace all parameters by those of the first rank, without memory.

    They are placed as `fully_shard` does it, along their first axis; or stay whole if the mesh does
    not shard.

    Args:
        model: The model.
        spec: The mesh.

    Raises:
        StructPrecondError: If a parameter cannot be sharded.
    """
    mesh = init_device_mesh("cpu", spec.sizes, mesh_dim_names=spec.names)
    placed = {
        p: nn.Parameter(_of_first_rank(p, name, mesh, spec), requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
    }
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = placed[p]


def _of_first_rank(p: nn.Parameter, name: str, mesh: DeviceMesh, spec: MeshSpec) -> Tensor:
    """Return a tensor on the meta device, placed like a parameter of the first rank."""
    whole = p.detach().to("meta")
    if SHARD not in spec.names:
        return whole
    if p.ndim == 0:
        raise StructPrecondError(
            f"fully_shard cannot shard {name}, which has no axes. Give it one, as in shape (1,), "
            'or plan for mesh="ddp".'
        )
    rows = -(-p.shape[0] // spec.shards)  # the first rank has the most
    part = DTensor.from_local(
        whole.narrow(0, 0, rows),
        mesh,
        [Shard(0) if dim == SHARD else Replicate() for dim in spec.names],
        run_check=False,
        shape=p.shape,
        stride=whole.contiguous().stride(),
    )
    return part
