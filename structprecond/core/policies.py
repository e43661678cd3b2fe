"""Policies: what happens to the directions of any strategy before parameters move."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from structprecond.checks import check_positive
from structprecond.core.results import usable

Factor = float | Tensor


@dataclass
class Move:
    r"""A move of stacked parameters `(b, *dims)`, which policies change.

    \[ p \leftarrow \mathrm{projection}(a \, (b \, p - \eta D)). \]

    Args:
        direction: The directions D `(b, *dims)`.
        read_params: Returns the parameters p `(b, *dims)` before the move.
        grad: The gradients `(b, *dims)`; None unless a policy uses them.
        before: The factor b of weight decay before the update, a number or a tensor that broadcasts
            to the stack.
        after: The factor a of weight decay after it, alike.
        projections: Functions that the moved parameters go through, in this order.
    """

    direction: Tensor
    read_params: Callable[[], Tensor]
    grad: Tensor | None
    before: Factor
    after: Factor
    projections: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    @property
    def needs_params(self) -> bool:
        """Whether the move depends on the parameters, beyond factors for whole stacks."""
        stacks = (f for f in (self.before, self.after) if isinstance(f, Tensor))
        return bool(self.projections) or any(factor.ndim for factor in stacks)

    @cached_property
    def params(self) -> Tensor:
        """The parameters before the move; policies may not change them in place."""
        return self.read_params()


class Policy(ABC):
    """Changes the moves of a strategy, whatever its update rule.

    Policies act on stacks, after the strategy and before the parameters move, in the order in which
    they are given. Subclasses are frozen dataclasses.

    Attributes:
        uses_grad: Whether `apply` reads the gradient.
        needs_decoupled_decay: Whether it is of no use to strategies whose weight decay is a part of
            their directions.
        initial: The initial values of the numbers that it keeps for each row, by name.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Sign(Policy):
        ...     def apply(self, move, kept):
        ...         move.direction = move.direction.sign()
        >>> optimizer = SOAP(nn.Linear(3, 2), policies=(Sign(),))
    """

    uses_grad: ClassVar[bool] = False
    needs_decoupled_decay: ClassVar[bool] = False
    initial: ClassVar[Mapping[str, float]] = {}

    @abstractmethod
    def apply(self, move: Move, kept: Mapping[str, Tensor]) -> None:
        """Change a move, without changing its tensors in place.

        Args:
            move: The move.
            kept: The numbers of each row `(b,)`, to be changed in place.
        """


@dataclass(frozen=True)
class MatchRMS(Policy):
    r"""Scales each row of directions to a root mean square: \(D \leftarrow \rho D / rms(D)\).

    The learning rate then means the same for every strategy; AdamW's directions have a root mean
    square of about 0.2 to 0.4. Rows of zeros stay zero.

    Args:
        rms: The root mean square \(\rho\). Default: 0.2.

    Raises:
        HyperparameterError: If `rms` is not a finite number above 0.

    Source: Liu et al. 2025 (arXiv 2502.16982), section 2.2, which chooses 0.2 for Muon.
    """

    rms: float = 0.2

    def __post_init__(self) -> None:
        check_positive(rms=self.rms)

    def apply(self, move: Move, kept: Mapping[str, Tensor]) -> None:
        """Scale the directions."""
        move.direction = move.direction * factors_to_rms(self.rms, move.direction)


@dataclass(frozen=True)
class CapRMS(Policy):
    r"""Limits the root mean square of directions: \(D \leftarrow D \min(1, \rho / rms(D))\).

    Args:
        rms: The limit \(\rho\). Default: 1.0.

    Raises:
        HyperparameterError: If `rms` is not a finite number above 0.
    """

    rms: float = 1.0

    def __post_init__(self) -> None:
        check_positive(rms=self.rms)

    def apply(self, move: Move, kept: Mapping[str, Tensor]) -> None:
        """Scale long directions down."""
        move.direction = move.direction * factors_to_rms(self.rms, move.direction).clamp_(max=1.0)


@dataclass(frozen=True)
class CautiousUpdate(Policy):
    r"""Drops the entries of a direction whose sign is not that of the gradient.

    \[ M = [D \circ G > 0], \quad D \leftarrow D \circ M / \max(\mathrm{mean}(M), 10^{-3}), \]

    with one mean per row.

    Source: Liang et al. 2024 (arXiv 2411.16085), algorithm 2 and the official implementation.
    """

    uses_grad = True

    def apply(self, move: Move, kept: Mapping[str, Tensor]) -> None:
        """Mask the directions."""
        assert move.grad is not None
        mask = move.direction.sign().mul_(move.grad.sign()).clamp_(min=0)
        share = per_row(mask.flatten(1).mean(1), mask).clamp_(min=1e-3)
        move.direction = move.direction * mask.div_(share)


@dataclass(frozen=True)
class CautiousDecay(Policy):
    r"""Applies weight decay only where it agrees with the direction: \(sign(p) = sign(D)\).

    There, the update moves an entry towards zero as well.

    Source: Chen et al. 2025 (arXiv 2510.12402), algorithm 1.
    """

    needs_decoupled_decay = True

    def apply(self, move: Move, kept: Mapping[str, Tensor]) -> None:
        """Make the factors of weight decay 1 where it does not agree."""
        _keep_decay(move, move.params.sign() == move.direction.sign())


@dataclass(frozen=True)
class Hyperball(Policy):
    r"""Keeps the Frobenius norm of each row of parameters, and ties the step size to it.

    \[ D \leftarrow D \, \|p_0\|_F / \|D\|_F, \quad p \leftarrow p - \eta D, \quad
       p \leftarrow p \, \|p_0\|_F / \|p\|_F, \]

    where \(p_0\) are the parameters at the first update. Decoupled weight decay, which would only
    change the norm, is left out. Rows that start at zero, such as many biases, have no norm to
    keep: their directions and their decay stay as they are.

    Source: arXiv 2606.16899.
    """

    initial: ClassVar[Mapping[str, float]] = {"initial_norm": -1.0}

    def apply(self, move: Move, kept: Mapping[str, Tensor]) -> None:
        """Scale the directions, and project onto the sphere after the move."""
        known = kept["initial_norm"]
        radius = torch.where(known < 0, row_norms(move.params), known)
        known.copy_(radius)

        def to_sphere(stack: Tensor) -> Tensor:
            return torch.where(per_row(radius > 0, stack), stack * _to_norm(radius, stack), stack)

        _keep_decay(move, per_row(radius == 0, move.direction))
        move.direction = to_sphere(move.direction)
        move.projections.append(to_sphere)


def row_norms(stack: Tensor) -> Tensor:
    """Return the Frobenius norm of each row `(b,)`, without overflow or underflow."""
    rows = stack.flatten(1)
    largest = torch.linalg.vector_norm(rows, math.inf, 1, keepdim=True)
    largest.clamp_(min=torch.finfo(stack.dtype).tiny)
    norms: Tensor = torch.linalg.vector_norm(rows / largest, dim=1).mul_(largest.squeeze(1))
    return norms


def per_row(numbers: Tensor, stack: Tensor) -> Tensor:
    """Reshape one number per row `(b,)` to broadcast over a stack `(b, *dims)`."""
    return numbers.view(-1, *[1] * (stack.ndim - 1))


def _to_norm(target: float | Tensor, stack: Tensor) -> Tensor:
    """Return the factors that give each row a norm; 1 for rows that no factor can scale to it."""
    norms = row_norms(stack)
    possible = norms * torch.finfo(stack.dtype).max > target
    return per_row(torch.where(possible, target / norms, 1.0), stack)


def factors_to_rms(target: float, stack: Tensor) -> Tensor:
    """Return the factors `(b, 1, ...)` that give each row a root mean square."""
    return _to_norm(target * stack[0].numel() ** 0.5, stack)


def _keep_decay(move: Move, where: Tensor) -> None:
    """Keep the weight decay of a move only in some entries."""

    def kept(factor: Factor) -> Factor:
        if not isinstance(factor, Tensor) and factor == 1.0:
            return factor
        # in the shape of the mask, which may have one entry per row; two numbers would be float32
        ones = torch.ones_like(where, dtype=move.direction.dtype)
        return torch.where(where, ones * factor, ones)

    move.before, move.after = kept(move.before), kept(move.after)


def apply_policies(policies: tuple[Policy, ...], move: Move, kept: Mapping[str, Tensor]) -> None:
    """Let policies change a move, one after the other.

    Args:
        policies: The policies.
        move: The move.
        kept: The numbers of each row `(b,)` that policies keep.
    """
    for policy in policies:
        like = move.direction
        policy.apply(move, {name: kept[name] for name in policy.initial})
        move.direction = usable(move.direction, like, f"{type(policy).__name__}.apply")
