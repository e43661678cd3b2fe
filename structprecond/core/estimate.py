"""What an optimizer will keep and compute, before any of it is allocated: `estimate`."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from structprecond.core.bucket import Bucket
from structprecond.core.costs import product_operations, refresh_operations
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.report import Description, Row, describe
from structprecond.errors import StructPrecondError
from structprecond.tables import human, lay_out


@dataclass(frozen=True)
class Cost:
    r"""What the rows of one stack cost together.

    Args:
        row: How the optimizer treats the stack; `row.state_bytes` is its memory.
        step_flops: The operations of the matrix products of a step without refreshes, as torch's
            `FlopCounterMode` counts them.
        refresh_flops: The operations to refresh all rows once, a multiple of \(n^3\) for each
            factor of size n, since torch counts no decompositions.
        every: The refresh interval in steps; None without refreshes or if it is a callable.
    """

    row: Row
    step_flops: int
    refresh_flops: int
    every: int | None

    @property
    def mean_flops(self) -> float:
        """The operations of a step with its share of the refreshes."""
        return self.step_flops + self.refresh_flops / (self.every or 1)


@dataclass(frozen=True)
class Estimate:
    """What an optimizer will cost; print it for a table.

    Args:
        description: How the optimizer treats each parameter.
        costs: One entry per stack.
    """

    description: Description
    costs: tuple[Cost, ...]

    @property
    def state_bytes(self) -> int:
        """The bytes of all state."""
        return self.description.state_bytes

    @property
    def step_flops(self) -> int:
        """The operations of the matrix products of a step without refreshes."""
        return sum(cost.step_flops for cost in self.costs)

    @property
    def refresh_flops(self) -> int:
        """The operations to refresh all rows once."""
        return sum(cost.refresh_flops for cost in self.costs)

    @property
    def mean_flops(self) -> float:
        """The operations of a step with its share of the refreshes."""
        return sum(cost.mean_flops for cost in self.costs)

    def __str__(self) -> str:
        """Return the table of `describe`, and one of the operations of each stack."""
        table = [("parameters", "state", "flops of a step", "of a refresh", "every", "mean")]
        for cost in sorted(self.costs, key=lambda cost: -cost.mean_flops):
            names, more = cost.row.names, len(cost.row.names) - 1
            table.append(
                (
                    names[0] + f" and {more} more" * (more > 0),
                    human(cost.row.state_bytes),
                    f"{cost.step_flops:.3g}",
                    f"{cost.refresh_flops:.3g}",
                    "-" if cost.every is None else str(cost.every),
                    f"{cost.mean_flops:.3g}",
                )
            )
        total = (
            f"a step takes {self.step_flops:.3g} flops, a refresh of all rows "
            f"{self.refresh_flops:.3g}, both together {self.mean_flops:.3g} on average"
        )
        lines = lay_out(table)
        return "\n".join([str(self.description), "", *lines, lines[1], total])


def estimate(
    model: nn.Module, optimizer: Callable[..., StructuredOptimizer], **settings: Any
) -> Estimate:
    r"""Tell what an optimizer would keep and compute for a model; allocates no state.

    The optimizer is built on the meta device, around a copy of the model without memory. Shapes,
    structures and bytes are those of a real one. The products of a step are counted by torch while
    it runs there; a refresh counts a multiple of \(n^3\) for each factor of size n, 25 for an
    eigendecomposition.

    Args:
        model: The model, on any device; it stays as it is.
        optimizer: A class of this library, or another callable that takes the model.
        settings: The optimizer's keywords.

    Returns:
        The costs; `print` shows them as tables.

    Raises:
        StructPrecondError: If there is no model, or if `optimizer` makes no optimizer of this
            library.

    Example:
        >>> from structprecond import SOAP
        >>> costs = estimate(nn.Linear(768, 3072, bias=False, device="meta"), SOAP)
        >>> costs.state_bytes == 4 * (2 * 768 * 3072 + 2 * (768**2 + 3072**2)) + 42
        True
        >>> costs.step_flops == 6 * 768 * 3072 * (768 + 3072)
        True
    """
    if not isinstance(model, nn.Module):
        raise StructPrecondError(
            f"estimate needs the model, an nn.Module, got a {type(model).__name__}. Pass the model "
            "first, then the optimizer's class: estimate(model, SOAP)."
        )
    made = optimizer(_without_memory(model), **settings)
    if not isinstance(made, StructuredOptimizer):
        raise StructPrecondError(
            f"estimate needs an optimizer of this library, but {optimizer!r} made a "
            f"{type(made).__name__}. Pass a class such as SOAP."
        )
    description = describe(made)
    live = [row for row in description.rows if row.live]
    costs = tuple(_cost(bucket, row) for bucket, row in zip(made.buckets, live, strict=True))
    return Estimate(description, costs)


def _cost(bucket: Bucket, row: Row) -> Cost:
    strategy, key, every = bucket.strategy, bucket.key, bucket.interval
    return Cost(
        row,
        bucket.rows * product_operations(strategy, key),
        bucket.rows * refresh_operations(strategy, key),
        every if isinstance(every, int) and not isinstance(every, bool) else None,
    )


def _without_memory(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and buffers are on the meta device."""
    copies: dict[int, Tensor] = {}
    for p in model.parameters():
        empty = torch.empty_like(p, device="meta")
        copies[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deepcopy(model, copies)
