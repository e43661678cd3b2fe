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
    team: Alone, model: nn.Module | None, mesh: Mesh | None, params: Sequence[nn.Parameter]
) -> Alone:
    """Return the team that trains some parameters.

    Args:
        team: The team that trains others.
        model: The model as the user gave it; None if only parameters are known.
        mesh: The ranks that shall own rows, if the user names them.
        params: The parameters.

    Raises:
        StructPrecondError: If the parameters or the mesh cannot be used.
    """
    shared = mesh is not None or any(map(is_dtensor, params))
    if isinstance(team, Owners):
        return team
    device = local(params[0]).device if params else torch.device("cpu")
    replicas = replicas_of(model)
    if shared:
        ranks, everyone = holders_of(params, mesh)
        everyone = replicas or everyone
        agreement = Agreement(Ranks.of_group(everyone), device)
        return Owners(agreement, share_of_data(model, everyone), ranks)
    if replicas is None or dist.get_world_size(replicas) == 1:
        return team
    return Replicas(Agreement(Ranks.of_group(replicas), device), 1.0)
