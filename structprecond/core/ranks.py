"""The ranks that share a model: who holds what, and who makes decisions together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from structprecond.core.boxes import box_of, is_dtensor, sharded_dims
from structprecond.core.holders import Holders
from structprecond.errors import StructPrecondError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Mesh: TypeAlias = "DeviceMesh | dist.ProcessGroup"
"""Ranks: a mesh or a process group."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """Ranks in the order of a process group.

    Args:
        group: The process group.
        numbers: The global number of each rank.
        root: The mesh that all DTensors are placed on, or on a part of; None without DTensors.
    """

    group: dist.ProcessGroup
    numbers: tuple[int, ...]
    root: DeviceMesh | None = None

    @classmethod
    def of_group(cls, group: dist.ProcessGroup, root: DeviceMesh | None = None) -> Ranks:
        """Return the ranks of a process group."""
        return cls(group, tuple(dist.get_process_group_ranks(group)), root)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.numbers)

    @property
    def me(self) -> int:
        """The place of this process among the ranks."""
        return self.numbers.index(dist.get_rank())

    def holders(self, p: Tensor) -> Holders:
        """Return the ranks that hold each part of a parameter."""
        key: tuple[Any, ...] = (tuple(p.shape),)
        places: list[tuple[int, ...]] = [()] * self.size
        if is_dtensor(p):
            key, places = (*key, p.device_mesh, p.placements), self._places_in(p.device_mesh)
        if key not in self._known:
            self._known[key] = Holders([box_of(p, place) for place in places])
        return self._known[key]

    def problem_with(self, params: Iterable[Tensor]) -> str | None:
        """Return why the ranks do not hold some parameters whole, as an object; None if they do."""
        for p in filter(is_dtensor, params):
            what = f"a parameter of shape {tuple(p.shape)}, which is on {p.device_mesh}"
            if not self._know(p.device_mesh):
                return f"{what}, but the others are on {self.root or self.numbers}"
            if sum(box.numel for box in set(self.holders(p).boxes)) != p.numel():
                return f"{what}; the {self.size} ranks of the others hold only a part of it"
        return None

    def _know(self, mesh: DeviceMesh) -> bool:
        """Return whether the place of each rank in a mesh is known."""
        if self.root is None:
            return set(self.numbers) <= set(mesh.mesh.flatten().tolist())
        return mesh == self.root or _is_part(mesh, self.root)

    def nearest(self, rank: int, others: Sequence[int]) -> int:
        """Return which of some ranks shares most coordinates of the mesh with another one.

        Ranks that differ in later dimensions are closer: these stay within nodes.
        """
        if len(others) == 1 or self.root is None:
            return rank if rank in others else others[0]
        places = self._root_places

        def distance(other: int) -> tuple[Any, ...]:
            return tuple(a != b for a, b in zip(places[other], places[rank], strict=True)), other

        return min(others, key=distance)

    @cached_property
    def _known(self) -> dict[Any, Holders]:
        """The holders of parameters of equal shape and placement."""
        return {}

    @cached_property
    def _root_places(self) -> list[tuple[int, ...]]:
        """The place of each rank in the root mesh."""
        assert self.root is not None
        return self._places_in(self.root)

    def _places_in(self, mesh: DeviceMesh) -> list[tuple[int, ...]]:
        """Return the place of each rank in a mesh: in the root mesh, or in a part of it."""
        if self.root is None or mesh is self.root or mesh == self.root:
            places = _places(mesh)
            return [places[number] for number in self.numbers]
        names = self.root.mesh_dim_names
        assert names is not None  # `_root_of` checks
        assert mesh.mesh_dim_names is not None
        dims = [names.index(name) for name in mesh.mesh_dim_names]
        return [tuple(place[dim] for dim in dims) for place in self._places_in(self.root)]


def _places(mesh: DeviceMesh) -> dict[int, tuple[int, ...]]:
    """Return the coordinate of each global rank in a mesh."""
    return dict(zip(mesh.mesh.flatten().tolist(), product(*map(range, mesh.shape)), strict=True))


def holders_of(params: Sequence[Tensor], mesh: Mesh | None) -> tuple[Ranks, dist.ProcessGroup]:
    """Return the ranks that hold whole parameters together, and the group of all ranks.

    Args:
        params: The parameters, on this rank.
        mesh: The ranks that the user names; None for those of the DTensors: the dimensions of their
            mesh along which any of them is sharded.

    Raises:
        StructPrecondError: If the meshes of the parameters do not fit together, or if the named
            ranks do not hold them whole.
    """
    root = _root_of(params)
    everyone = None if root is None else _group(root.mesh.flatten().tolist(), root)
    if mesh is not None:
        named = _group_of(mesh)
        ranks, advice = (
            Ranks.of_group(named, root),
            "Leave mesh= out, or name ranks that hold all of them",
        )
        everyone = everyone or named
    else:
        assert root is not None
        assert everyone is not None
        ranks, advice = _ranks_that_shard(params, root), "Shard them along one mesh"
    if problem := ranks.problem_with(params):
        raise StructPrecondError(f"The parameters include {problem}. {advice}.")
    return ranks, everyone


def _ranks_that_shard(params: Sequence[Tensor], root: DeviceMesh) -> Ranks:
    """Return the ranks along the dimensions of a mesh that any parameter is sharded along."""
    dims = {
        root.mesh_dim_names.index(p.device_mesh.mesh_dim_names[dim])  # type: ignore[union-attr,index]
        if p.device_mesh != root
        else dim
        for p in params
        if is_dtensor(p)
        for dim in sharded_dims(p)
    }
    mine = root.get_coordinate()
    if mine is None:
        raise StructPrecondError("This rank is not in the mesh of the parameters.")
    if len(dims) == 1:
        return Ranks.of_group(root.get_group(dims.pop()), root)
    index = tuple(slice(None) if dim in dims else mine[dim] for dim in range(root.ndim))
    return Ranks.of_group(_group(root.mesh[index].flatten().tolist(), root), root)


def _root_of(params: Sequence[Tensor]) -> DeviceMesh | None:
    """Return the mesh that all DTensors are placed on, or on a part of; None without DTensors."""
    meshes = list(dict.fromkeys(p.device_mesh for p in params if is_dtensor(p)))
    if len(meshes) < 2:
        return meshes[0] if meshes else None
    root = max(meshes, key=lambda mesh: mesh.ndim)
    if not all(mesh == root or _is_part(mesh, root) for mesh in meshes):
        raise StructPrecondError(
            f"The parameters are on the meshes {', '.join(map(str, meshes))}, which are no parts "
            "of one. Make one mesh with named dimensions, and shard along these."
        )
    return root


def _is_part(mesh: DeviceMesh, root: DeviceMesh) -> bool:
    """Return whether a mesh has this rank's slice of another one, along some named dimensions."""
    some, names, place = mesh.mesh_dim_names, root.mesh_dim_names, root.get_coordinate()
    if some is None or names is None or place is None or not set(some) <= set(names):
        return False
    index = tuple(slice(None) if n in some else i for n, i in zip(names, place, strict=True))
    kept = [name for name in names if name in some]
    return torch.equal(root.mesh[index].permute([kept.index(n) for n in some]), mesh.mesh)


def _group_of(mesh: Mesh) -> dist.ProcessGroup:
    """Return the process group of a mesh.

    Raises:
        StructPrecondError: If it is no mesh.
    """
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise StructPrecondError(
            f"mesh takes a DeviceMesh or a ProcessGroup, got {mesh!r}. Make one, as in "
            'init_device_mesh("cpu", (4,)).'
        )
    return mesh.get_group() if mesh.ndim == 1 else _group(mesh.mesh.flatten().tolist(), mesh)


def _group(numbers: list[int], mesh: DeviceMesh) -> dist.ProcessGroup:
    """Return a process group of some ranks of a mesh; all of them have to ask for it."""
    if sorted(numbers) == list(range(dist.get_world_size())):
        world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        return world
    if mesh.ndim == 1:
        return mesh.get_group()
    group: dist.ProcessGroup = dist.new_group(numbers, use_local_synchronization=True)
    return group


def world_size() -> int:
    """Return the number of ranks of torch.distributed; 1 without it."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def replicas_of(model: object) -> dist.ProcessGroup | None:
    """Return the process group of a model under DistributedDataParallel; None for another one."""
    while isinstance(model, nn.Module):
        if isinstance(model, DistributedDataParallel):
            group: dist.ProcessGroup = model.process_group
            return group
        model = model._modules.get("_orig_mod")
    return None


def share_of_data(model: nn.Module | None, ranks: Ranks, size: int) -> float | None:
    """Return the number of different batches of a step over the number of ranks.

    Ranks of tensor parallelism see the same batch. FSDP knows the ranks that see different ones.

    Args:
        model: The model; None if only parameters are known.
        ranks: The ranks that hold whole parameters together.
        size: The number of all ranks.

    Returns:
        The quotient; None if it is unknown, because something else than FSDP has placed DTensors.
    """
    for module in () if model is None else model.modules():
        state = getattr(module, "_get_fsdp_state", None)
        # private, but pinned by a test
        group = None if state is None else state()._fsdp_param_group
        if group is not None:
            return float(group.mesh_info.mesh.size() / size)
    return 1.0 if ranks.root is None else None


def device_for(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return the CPU if a group can send from there, else the given device."""
    backends = str(dist.get_backend_config(group))
    return torch.device("cpu") if "cpu:gloo" in backends or "mpi" in backends else device
