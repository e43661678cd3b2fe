"""A search for the best learning rate and momentum, with the same budget for every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

BUDGET = 6
"""The number of runs."""

Point = tuple[float, float]
"""A learning rate and a momentum."""


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        best: The best learning rate and momentum.
        losses: The losses of all points that were tried, in this order.
    """

    best: Point
    losses: dict[Point, float]

    @property
    def bracketed(self) -> bool:
        """Whether half and twice the learning rate were tried and are worse."""
        lr, momentum = self.best
        return {(lr / 2, momentum), (lr * 2, momentum)} <= self.losses.keys()


def search(
    loss: Callable[[float, float], float],
    lr: float,
    momentum: float,
    momenta: Sequence[float],
    budget: int = BUDGET,
) -> Found:
    """Search from a start: half and twice the learning rate, other momenta, and so on.

    First the start and its neighbours, then the other momenta at the best learning rate. What is
    left of the budget goes to missing neighbours of the best point, until it has both.

    Args:
        loss: Returns the loss of a run.
        lr: The learning rate at the start.
        momentum: The momentum at the start.
        momenta: The other momenta to try.
        budget: The largest number of runs.
    """
    losses: dict[Point, float] = {}

    def attempt(point: Point) -> None:
        if point not in losses and len(losses) < budget:
            losses[point] = loss(*point)

    def best() -> Point:
        return min(losses, key=lambda point: losses[point])

    for factor in (1.0, 2.0, 0.5):
        attempt((lr * factor, momentum))
    for other in momenta:
        attempt((best()[0], other))
    while len(losses) < budget and not Found(best(), losses).bracketed:
        top, middle = best()
        attempt((top / 2 if (top * 2, middle) in losses else top * 2, middle))
    return Found(best(), losses)
