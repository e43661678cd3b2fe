"""Lets all ranks that a base optimizer trains on make both passes of SAM, or none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from structprecond.core.agreement import NOTHING, Facts
from structprecond.core.boxes import describe_placed, is_dtensor
from structprecond.core.finite import are_nonfinite_on_a_rank
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.team import Replicas
from structprecond.sharpness.perturbation import Part

T = TypeVar("T")


def agree(
    base: Optimizer, make: Callable[[], tuple[T, Facts, tuple[int, int]]], what: str
) -> tuple[T, tuple[int, int]]:
    """Call a function on all ranks that the base trains on; return its result, and sums over ranks.

    torch's optimizers have no such ranks, nor has a base that decides alone.

    Args:
        base: The base.
        make: Returns the result, what has to be the same on all ranks, and two numbers to sum.
        what: What it is about, for messages.

    Raises:
        DistributedError: If it raised on another rank, or if ranks differ.
    """
    team = base.team if isinstance(base, StructuredOptimizer) else None
    if isinstance(team, Replicas):
        return team.agreement.reach(make, what)
    result, _, numbers = make()
    return result, numbers


def agree_on_parts(base: Optimizer, make: Callable[[], list[Part]]) -> list[Part]:
    """Return the parts that SAM perturbs, if all ranks sum up the norms of the same ones.

    Args:
        base: The base.
        make: Returns the parts of this rank.

    Raises:
        DistributedError: If it raised on another rank, or if sharded gradients differ.
    """

    def parts_and_facts() -> tuple[list[Part], Facts, tuple[int, int]]:
        parts = make()
        sharded = [p for part in parts for p in part.whole if is_dtensor(p)]
        # names may be equal
        known: dict[str, list[str]] = {}
        for p in sharded:
            known.setdefault(_name_in(base, p), []).append(describe_placed(p))
        return parts, {"the sharded parameters with a gradient": known}, NOTHING

    return agree(base, parts_and_facts, "first step of SAM")[0]


def _name_in(base: Optimizer, p: Tensor) -> str:
    with suppress(AttributeError, KeyError):  # torch's have no names; new ones are not known yet
        name: str = base.name_of(p)  # type: ignore[attr-defined]
        return name
    return "another parameter"


def would_not_notice(base: Optimizer, params: Sequence[nn.Parameter]) -> bool:
    """Return whether gradients are not finite and the base would not check them."""
    return not isinstance(base, StructuredOptimizer) and are_nonfinite_on_a_rank(params)
