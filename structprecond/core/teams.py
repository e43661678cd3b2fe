"""Finds the team that trains a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from structprecond.core.agreement import Agreement
from structprecond.core.boxes import is_dtensor, local
from structprecond.core.owners import Owners
from structprecond.core.ranks import (
    Mesh,
    Ranks,
    holders_of,
    replicas_of,
    share_of_data,
    world_size,
)
from structprecond.core.rounding import Rounding
from structprecond.core.seed import Seed
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
    # without asking other ranks, which may replace nothing
    seed = before.seed if isinstance(before, Replicas) else Seed()
    if mesh is not None or any(map(is_dtensor, params)):
        ranks, everyone = holders_of(params, mesh)
        everyone = replicas or everyone
        agreement = Agreement(Ranks.of_group(everyone), device)
        # all ranks of DistributedDataParallel see different batches
        share = share_of_data(model, ranks, agreement.ranks.size) if replicas is None else 1.0
        return Owners(agreement, share, seed, ranks)
    if replicas is None or dist.get_world_size(replicas) == 1:
        return Alone()
    return Replicas(Agreement(Ranks.of_group(replicas), device), 1.0, seed)


def apart(team: Alone, model: nn.Module | None, rounding: Rounding, counts: bool) -> str | None:
    """Return a warning if ranks that seem to train one model do not know of each other.

    Args:
        team: The team.
        model: The model as the user gave it; None if only parameters are known.
        rounding: How low-precision parameters are rounded.
        counts: Whether samples are counted.
    """
    if isinstance(team, Replicas) or replicas_of(model) is not None or not world_size() > 1:
        return None
    rounds = rounding == "stochastic"
    differ = ["stochastic rounding"] * rounds + ["the counted batch size"] * counts
    if not differ:
        return None
    return (
        f"torch.distributed has {world_size()} ranks, but this optimizer makes its steps alone, so "
        f"{' and '.join(differ)} will differ between ranks. If they train one model, wrap it in "
        "DistributedDataParallel first and build the optimizer from the wrapped model, as in "
        "SOAP(parallel)."
    )
