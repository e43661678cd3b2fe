"""The meshes of a plan: which ranks shard parameters, and which replicate them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

from structprecond.checks import is_count
from structprecond.errors import StructPrecondError

SHARD, REPLICATE = "shard", "replicate"
"""The names of the dimensions of a mesh."""
_FORMS = (
    '"ddp", "fsdp", "hsdp:16x4" for 16 ranks that shard and 4 that replicate, or dimensions with '
    'their sizes, as in "replicate=4,shard=16"'
)


@dataclass(frozen=True)
class MeshSpec:
    """The dimensions of a mesh, the slowest first.

    Args:
        names: The name of each dimension: "shard", along which parameters are sharded as under
            `fully_shard`, or "replicate".
        sizes: The number of ranks along each dimension.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, world: int) -> MeshSpec:
        """Return the mesh that a text describes.

        Args:
            text: "ddp" or "fsdp" for all ranks, "hsdp:SHARDxREPLICATE", or dimensions.
            world: The number of ranks.

        Raises:
            StructPrecondError: If the text describes no mesh, or one of another size.

        Example:
            >>> MeshSpec.parse("hsdp:16x4", world=64)
            MeshSpec(names=('replicate', 'shard'), sizes=(4, 16))
        """
        if not is_count(world):
            raise StructPrecondError(f"world is a number of ranks of at least 1, got {world!r}.")
        spec = cls._parse(text, world)
        if spec.world != world:
            raise StructPrecondError(
                f"The mesh {text!r} has {' x '.join(map(str, spec.sizes))} = {spec.world} ranks, "
                f"but world is {world}. Give a world of {spec.world}, or dimensions whose product "
                f"is {world}."
            )
        return spec

    @classmethod
    def _parse(cls, text: object, world: int) -> MeshSpec:
        if text == "ddp":
            return cls((REPLICATE,), (world,))
        if text == "fsdp":
            return cls((SHARD,), (world,))
        if isinstance(text, str):
            if hybrid := re.fullmatch(r"hsdp:([1-9]\d*)x([1-9]\d*)", text):
                return cls((REPLICATE, SHARD), (int(hybrid[2]), int(hybrid[1])))
            dims = [re.fullmatch(r"(shard|replicate)=([1-9]\d*)", d) for d in text.split(",")]
            found = [(dim[1], int(dim[2])) for dim in dims if dim is not None]
            names = tuple(name for name, _ in found)
            if len(found) == len(dims) and len(set(names)) == len(names):
                return cls(names, tuple(size for _, size in found))
        raise StructPrecondError(f"mesh takes {_FORMS}; got {text!r}.")

    @property
    def world(self) -> int:
        """The number of ranks."""
        return prod(self.sizes)

    @property
    def shards(self) -> int:
        """The number of ranks over which each parameter is sharded; 1 for none."""
        return dict(zip(self.names, self.sizes, strict=True)).get(SHARD, 1)

    @property
    def owners(self) -> int:
        """The number of ranks that share the state: those that hold whole parameters together."""
        return self.shards if SHARD in self.names else self.world

    def __str__(self) -> str:
        """Return the dimensions with their sizes."""
        dims = zip(self.names, self.sizes, strict=True)
        return ",".join(f"{name}={size}" for name, size in dims)
