"""Shampoo: inverse roots of Kronecker factors, with grafting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from structprecond.checks import as_number, check_choice, check_count, check_positive
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import FactorOptions, from_keywords
from structprecond.core.refresh import refresh_rows
from structprecond.core.state import Rows, State
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    interval,
    nonnegative,
    pair_of_fractions,
)
from structprecond.errors import StructureError
from structprecond.linalg import RootMethod, has_inverse_root
from structprecond.strategies.rotation import FactoredStrategy, overwrite
from structprecond.structures import DiagonalMatrix, StructuredMatrix
from structprecond.structures.blockwise import BlockwiseMatrix
from structprecond.structures.mode_product import average_inner_, multiply_axes
from structprecond.structures.spec import Structure

Grafting = Literal["adam", "rmsprop", "sgd", None]
Roots = tuple[BlockwiseMatrix | DiagonalMatrix | None, ...]


@dataclass
class ShampooState(State):
    """State of Shampoo for a stack `(b, d1, ..., dN)`.

    Args:
        factors: The Kronecker factors `(b, dk, dk)`, None for an axis without one.
        inverse_roots: Their damped inverse roots, of the same shapes.
        exp_avg: The first moment of the gradient `(b, d1, ..., dN)`.
        grafting_sq: The second moment of the grafting method, of the same shape; None if not used.
    """

    factors: Roots
    inverse_roots: Roots
    exp_avg: Tensor
    grafting_sq: Tensor | None


@dataclass(frozen=True)
class ShampooStrategy(FactoredStrategy):
    r"""The Shampoo rule.

    With N the number of axes with a factor, for \(t = 1, 2, \dots\),

    \[ S_k \leftarrow \beta_2 S_k + (1 - \beta_2) G_{(k)} G_{(k)}^\top, \quad
       P_k = \left( \frac{S_k}{1 - \beta_2^t} + \epsilon I \right)^{-1/(2N)}, \quad
       m \leftarrow \beta_1 m + (1 - \beta_1) G, \]
    \[ D = \frac{m}{1 - \beta_1^t} \times_1 P_1 \dots \times_N P_N, \quad
       D \leftarrow D \frac{\|g(m)\|_F}{\|D\|_F + 10^{-16}} + \lambda p, \quad
       p \leftarrow p - \eta D. \]

    \(P_k\) is refreshed at `start_preconditioning_step`, and after it whenever
    `precondition_frequency` divides t. Before it, \(D = g(m)\), the direction of the grafting
    method, which has its own second moment. Without grafting, \(g(m) = m\) and D keeps its length.

    Args:
        precondition_1d: Whether parameters with one axis get a factor. Default: True.
        start_preconditioning_step: The first preconditioned step. Default: 1.
        grafting: "adam", "rmsprop", "sgd" or None. Default: "adam".
        exponent: Factors are raised to minus this power. Default: None, \(1 / (2 N)\).
        root: A method of `structprecond.linalg.matrix_inverse_root`. Default: "eigh".

    Source: Gupta et al. 2018 (arXiv 1802.09568), algorithm 1; Shi et al. 2023 (arXiv 2309.06497)
    for grafting and bias correction.
    """

    precondition_1d: bool = True
    start_preconditioning_step: int = 1
    grafting: Grafting = "adam"
    exponent: float | None = None
    root: RootMethod = "eigh"

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(1e-2),
        "betas": pair_of_fractions((0.9, 0.99)),
        "eps": nonnegative(1e-12),
        "weight_decay": nonnegative(0.0),
        "precondition_frequency": interval(10),
        "grafting_beta2": Hyperparameter(
            None,
            lambda v: v is None or 0 <= as_number(v) < 1,
            "a number from 0 to below 1, or None",
        ),
        "grafting_eps": nonnegative(1e-8),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("grafting", self.grafting, Grafting)
        check_choice("root", self.root, RootMethod)
        check_count(start_preconditioning_step=self.start_preconditioning_step)
        if self.exponent is not None:
            check_positive(exponent=self.exponent)

    def adapt_structures(
        self, structures: tuple[Structure, ...], dims: Sequence[int], order: int, units: str
    ) -> tuple[Structure, ...]:
        """Leave out factors as `FactoredStrategy` does, and check that roots can be computed."""
        adapted = super().adapt_structures(structures, dims, order, units)
        root = self._root_order(sum(structure is not None for structure in adapted))
        inverts = any(s is not None and issubclass(s, BlockwiseMatrix) for s in adapted)
        if inverts and not has_inverse_root(self.root, root):
            raise StructureError(
                f"root={self.root!r} cannot compute the inverse root of order {root:g} that "
                f"{units} needs. Use 'eigh', another exponent, or fewer factors."
            )
        return adapted

    def _root_order(self, factors: int) -> float:
        return 2 * factors if self.exponent is None else 1 / self.exponent

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> ShampooState:
        """Return zero factors, identity roots and zero moments."""
        return ShampooState(
            _make("zeros", like, structures, dtypes),
            _make("eye", like, structures, dtypes),
            torch.zeros_like(like),
            torch.zeros_like(like) if self.grafting in ("adam", "rmsprop") else None,
        )

    def due(self, steps: Tensor, phase_offsets: Tensor, every: int) -> Tensor:
        """Return the rows at the first preconditioned step, or at a later refresh."""
        t, start = steps + 1, self.start_preconditioning_step
        return (t == start) | ((t > start) & super().due(steps, phase_offsets, every))

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Leave all weight decay to `update`."""
        return 1.0, 1.0

    def update(
        self, state: ShampooState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        """Update factors and moments, refresh the rows that are due, return the directions."""
        betas = hp["betas"]
        average_inner_(state.factors, grad, betas[1])
        if ctx.due is not None:

            def refresh(part: ShampooState, rows: Rows) -> None:
                self._refresh(part, hp, ctx.bias_correction(betas[1], rows))

            refresh_rows(refresh, state, ctx.due, ctx)
        state.exp_avg.lerp_(grad, 1 - betas[0])
        mean = state.exp_avg / ctx.bias_correction(betas[0])
        grafted = self._graft(state, mean, grad, hp, ctx)
        direction = multiply_axes(mean, state.inverse_roots, "matmat")
        if self.grafting is not None:
            direction = direction * (_norms(grafted) / (_norms(direction) + 1e-16))
        started = ctx.reached(self.start_preconditioning_step)
        if isinstance(started, bool):
            direction = direction if started else grafted
        else:
            direction = torch.where(started, direction, grafted)
        if hp["weight_decay"]:
            direction = direction.add(ctx.params(), alpha=hp["weight_decay"])
        return direction

    def _refresh(self, state: ShampooState, hp: Mapping[str, Any], unbias: float | Tensor) -> None:
        root = self._root_order(sum(factor is not None for factor in state.factors))
        scale = 1 / (unbias.flatten() if isinstance(unbias, Tensor) else unbias)

        def invert(factor: BlockwiseMatrix | DiagonalMatrix) -> StructuredMatrix:
            if isinstance(factor, BlockwiseMatrix):
                return (factor * scale).inverse_root(root, hp["eps"], self.root)
            return (factor * scale).inverse_root(root, hp["eps"])

        roots = [None if factor is None else invert(factor) for factor in state.factors]
        overwrite(state.inverse_roots, roots)

    def _graft(
        self,
        state: ShampooState,
        mean: Tensor,
        grad: Tensor,
        hp: Mapping[str, Any],
        ctx: StepContext,
    ) -> Tensor:
        """Return the direction of the grafting method."""
        if state.grafting_sq is None:
            return mean
        beta2 = hp["betas"][1] if hp["grafting_beta2"] is None else hp["grafting_beta2"]
        state.grafting_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        unbias = ctx.bias_correction(beta2) if self.grafting == "adam" else 1.0
        return mean / (state.grafting_sq / unbias).sqrt_().add_(hp["grafting_eps"])


def _norms(stack: Tensor) -> Tensor:
    """Return the Frobenius norm of every row `(b, 1, ...)`."""
    norms: Tensor = torch.linalg.vector_norm(stack.flatten(1), dim=1)
    return norms.reshape(-1, *[1] * (stack.ndim - 1))


def _make(
    constructor: Literal["zeros", "eye"],
    like: Tensor,
    structures: tuple[Structure, ...],
    dtypes: tuple[torch.dtype, ...],
) -> Roots:
    """Return zeros or identities of the structure of every axis."""
    axes = zip(structures, like.shape[1:], dtypes, strict=True)
    return tuple(
        None if s is None else getattr(s, constructor)(dim, like.shape[:1], dtype, like.device)
        for s, dim, dtype in axes
    )


class Shampoo(StructuredOptimizer):
    """Shampoo with grafting (Gupta et al. 2018, arXiv 1802.09568).

    The update rule is documented at `ShampooStrategy`. Structures: `dense`, `diagonal`,
    `block<k>diagonal`, `none`.

    Args:
        lr: Learning rate. Default: 1e-2.
        betas: Decay of the first moment and of the factors. Default: (0.9, 0.99).
        eps: Damping of the factors. Default: 1e-12.
        weight_decay: Weight decay, added to the direction. Default: 0.0.
        precondition_frequency: Refresh interval of the inverse roots in steps, or a callable that
            returns whether to refresh at a global step. Default: 10.
        start_preconditioning_step: The first preconditioned step. Default: 1.
        grafting: Method for the step length: "adam", "rmsprop", "sgd" or None. Default: "adam".
        grafting_beta2: Decay of the grafting method's second moment. Default: None, `betas[1]`.
        grafting_eps: Added to the root of the grafting method's second moment. Default: 1e-8.
        exponent: Factors are raised to minus this power. Default: None, 1 / (2 N) for N factors.
        max_precond_dim: Axes longer than this get no factor. Default: 10000.
        root: How to compute roots: "eigh", "coupled_newton" or "newton_db". Default: "eigh".

    Example:
        >>> model = nn.Linear(4, 3)
        >>> optimizer = Shampoo(model, lr=0.01, grafting="sgd")
        >>> loss = model(torch.ones(16, 4)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-12,
        weight_decay: float = 0.0,
        precondition_frequency: int | Callable[[int], bool] = 10,
        start_preconditioning_step: int = 1,
        grafting: Grafting = "adam",
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-8,
        exponent: float | None = None,
        max_precond_dim: int = 10000,
        root: RootMethod = "eigh",
        **options: Unpack[FactorOptions],
    ) -> None:
        strategy, hp = from_keywords(ShampooStrategy, locals())
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)
