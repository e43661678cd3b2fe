"""Finds the team that trains a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from structprecond.core.agreement import Agreement
from structprecond.core.boxes import is_dtensor, local
from structprecond.core.owners import Owners
from structprecond.core.ranks import Mesh, Ranks, holders_of, replicas_of, share_of_data
from structprecond.core.team import Alone, Replicas


def find_team(
    before: Alone, model: nn.Module | None, mesh: Mesh | None, params: Sequence[nn.Parameter]
) -> Alone:
    """Return the team that trains some parameters.

    Args:
        before: The team that it replaces, whose random numbers go on.
        model: The model as the user gave it; None if only parameters are known.
        mesh: The ranks that shall own rows, if the user names them.
        params: The parameters.

    Raises:
        StructPrecondError: If the parameters or the mesh cannot be used.
    """
    device = local(params[0]).device if params else torch.device("cpu")
    replicas = replicas_of(model)
    if mesh is not None or any(map(is_dtensor, params)):
        ranks, everyone = holders_of(params, mesh)
        everyone = replicas or everyone
        agreement = Agreement(Ranks.of_group(everyone), device)
        # all ranks of DistributedDataParallel see different batches
        share = share_of_data(model, ranks, agreement.ranks.size) if replicas is None else 1.0
        return Owners(agreement, share, _seed(before, agreement), ranks)
    if replicas is None or dist.get_world_size(replicas) == 1:
        return Alone()
    agreement = Agreement(Ranks.of_group(replicas), device)
    return Replicas(agreement, 1.0, _seed(before, agreement))


def _seed(before: Alone, agreement: Agreement) -> int:
    """Return the seed of all random numbers: torch's on the first rank.

    Every new team shares it at once, since ranks that own nothing never need it.
    """
    if isinstance(before, Replicas):
        return before.seed  # without asking other ranks, which may replace nothing
    seed: int = agreement.share(torch.initial_seed(), "the seed")[0]
    return seed
