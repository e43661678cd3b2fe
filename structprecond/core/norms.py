"""Norms of tensors whose parts are on several ranks."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from structprecond.core.agreement import naming_ranks
from structprecond.core.boxes import is_dtensor, sharded_dims
from structprecond.core.ranks import Ranks


def norm_over_ranks(norm: Tensor, order: float, p: Tensor) -> Tensor:
    """Return the norm of a tensor on all ranks, given that of this rank's part.

    Args:
        norm: The norm of the part, 0-d.
        order: 2 or infinity.
        p: A tensor that is placed alike; unless it is a DTensor, its part is the whole.

    Raises:
        LostRankError: If another rank does not answer.
    """
    if not is_dtensor(p):
        return norm
    total = norm if order == math.inf else norm.square()
    for dim in sharded_dims(p):
        op = dist.ReduceOp.MAX if order == math.inf else dist.ReduceOp.SUM
        group = p.device_mesh.get_group(dim)
        with naming_ranks("the norm of the gradients", Ranks.of_group(group)):
            dist.all_reduce(total, op, group=group)
    return total if order == math.inf else total.sqrt()
