"""SIRF-Shampoo: structured, inverse-free and root-free Shampoo."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from structprecond.checks import check_choice, check_positive
from structprecond.core.inputs import GetBatchSize, get_batch_size
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import FactorOptions, from_keywords
from structprecond.core.state import State, rows_of
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    Strategy,
    fraction,
    interval,
    nonnegative,
)
from structprecond.structures import (
    SUPPORTED_STRUCTURES,
    DenseMatrix,
    DiagonalMatrix,
    StructuredMatrix,
)
from structprecond.structures.auto import sizes_of_others
from structprecond.structures.mode_product import matricize, multiply_axes
from structprecond.structures.spec import Structure

Start = Literal["identity", "gradient"]
Factors = tuple[StructuredMatrix | None, ...]


@dataclass
class SIRFShampooState(State):
    """State of SIRF-Shampoo for a stack `(b, d1, ..., dN)`.

    Args:
        preconditioner: The Kronecker factors `(b, dk, dk)`, None for an axis without one.
        preconditioner_momenta: The momenta of the factors, of the same shapes.
        momentum_buffer: The momentum of the update `(b, d1, ..., dN)`.
    """

    preconditioner: Factors
    preconditioner_momenta: Factors
    momentum_buffer: Tensor


@dataclass(frozen=True)
class SIRFShampooStrategy(Strategy[SIRFShampooState]):
    r"""The SIRF-Shampoo rule.

    Gradients G of shape \(d_1 \times \dots \times d_N\) are means over b samples, and
    \(D = \prod_k d_k\). Every T steps, from the previous factors,

    \[ H = \sqrt{b} \, G \times_1 K_1^\top / \sqrt{d_1} \dots \times_N K_N^\top / \sqrt{d_N}, \quad
       A_k = \Pi(K_k^\top K_k) / d_k, \quad t_k = \mathrm{tr}(A_k) / d_k, \]
    \[ m_k \leftarrow \alpha_2 m_k + (1 - \alpha_2) \left( \tfrac{\lambda}{2} D \prod_{j \ne k} t_j
       A_k + \tfrac{d_k}{2} \Pi(H_{(k)} H_{(k)}^\top) - \tfrac{1}{2} I \right), \quad
       K_k \leftarrow K_k - \frac{\beta_2}{\max(1, \|m_k\|_F)} K_k m_k, \]

    and at every step
    \(U = G \times_1 K_1 K_1^\top \dots \times_N K_N K_N^\top + \kappa p\),
    \(u \leftarrow \alpha_1 u + U\), direction u. An axis without a factor has \(K_k = I\).

    The published start is \(K_k = I\), from which the first steps are those of gradient descent.
    With `start="gradient"`, the first gradient that is not zero initializes

    \[ K_k = (b \, \mathrm{mean}(G^2) + \lambda)^{-1/(2N)} I, \]

    where N counts the axes with a factor. Combine it with `policies=(MatchRMS(0.5),)`: alone, it
    changes little.

    Args:
        max_precond_dim: Axes longer than this get no dense factor. Default: 10000.
        start: The first factors: "identity", as published, or "gradient". Default: "identity".

    Source: Lin et al. 2024 (arXiv 2402.03496).
    """

    max_precond_dim: int = 10000
    start: Start = "identity"

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(1e-3),
        "beta2": nonnegative(0.01),
        "alpha1": fraction(0.9),
        "alpha2": fraction(0.5),
        "lam": nonnegative(1e-3),
        "kappa": replace(nonnegative(0.0), is_decay=True),
        "T": interval(1, operations=4.0),  # of two products
    }
    needs_batch_size = True

    def __post_init__(self) -> None:
        """Check the static configuration."""
        check_positive(max_precond_dim=self.max_precond_dim)
        check_choice("init", self.start, Start)

    def auto_structures(self, dims: Sequence[int]) -> tuple[Structure, ...]:
        """Return those of every strategy, but `diagonal` for vectors: axes beside which all are 1.

        The dense factor of a vector would have as many rows as the vector has entries.
        """
        usual = super().auto_structures(dims)
        return tuple(
            DiagonalMatrix if others == 1 else structure
            for structure, others in zip(usual, sizes_of_others(dims), strict=True)
        )

    def adapt_structures(
        self, structures: tuple[Structure, ...], dims: Sequence[int], order: int, units: str
    ) -> tuple[Structure, ...]:
        """Leave out the dense factors of long axes."""
        structures = super().adapt_structures(structures, dims, order, units)
        return tuple(
            None if structure is DenseMatrix and dim > self.max_precond_dim else structure
            for structure, dim in zip(structures, dims, strict=True)
        )

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> SIRFShampooState:
        """Return identity factors and zero momenta."""
        rows, axes = like.shape[0], list(zip(structures, like.shape[1:], dtypes, strict=True))
        eyes, zeros = (
            tuple(
                getattr(cls, make)(dim, (rows,), dtype=dtype, device=like.device) if cls else None
                for cls, dim, dtype in axes
            )
            for make in ("eye", "zeros")
        )
        return SIRFShampooState(eyes, zeros, torch.zeros_like(like))

    def can_begin(self, state: SIRFShampooState, grad: Tensor) -> Tensor | None:
        """Let rows wait whose gradient is zero, if they start from it."""
        return None if self.start == "identity" else grad.flatten(1).any(1)

    def begin(
        self, state: SIRFShampooState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> bool:
        """Scale the factors to the first gradient, if they start from it."""
        factors = [factor for factor in state.preconditioner if factor is not None]
        if self.start == "gradient":
            assert ctx.batch_size is not None
            square = ctx.batch_size * grad.flatten(1).square().mean(1) + hp["lam"]
            for factor in factors:
                factor.mul_(square ** (-0.5 / len(factors)))
        return False

    def decay_factors(self, hp: Mapping[str, Any]) -> tuple[float | Tensor, float | Tensor]:
        """Leave all weight decay to `update`."""
        return 1.0, 1.0

    def update(
        self, state: SIRFShampooState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        """Refresh the factors of the rows that are due, then precondition and average."""
        if ctx.due is not None:
            assert ctx.batch_size is not None
            with rows_of(state, ctx.due) as part:
                self._refresh(part, grad[ctx.due], hp, ctx.batch_size)
        grad = multiply_axes(grad, state.preconditioner, "outer_matmat")
        if hp["kappa"]:
            grad.add_(ctx.params(), alpha=hp["kappa"])
        buffer = state.momentum_buffer
        return torch.add(grad, buffer, alpha=hp["alpha1"], out=buffer)

    def _refresh(
        self, state: SIRFShampooState, grad: Tensor, hp: Mapping[str, Any], batch_size: int
    ) -> None:
        dims = grad.shape[1:]
        factors = _as(grad.dtype, state.preconditioner)
        rotated = multiply_axes(grad, factors, "rmatmat")
        inner = [None if factor is None else factor.from_inner() for factor in factors]
        traces = [
            1 / d if A is None else A.average_trace() / d for A, d in zip(inner, dims, strict=True)
        ]
        fresh, size = 1 - hp["alpha2"], prod(dims)
        for axis, (factor, A) in enumerate(zip(factors, inner, strict=True)):
            stored, stored_momentum = state.preconditioner[axis], state.preconditioner_momenta[axis]
            if factor is None or A is None or stored is None or stored_momentum is None:
                continue
            others = prod((t for j, t in enumerate(traces) if j != axis), start=1.0)
            momentum = stored_momentum.to(grad.dtype)
            momentum.add_inner_(
                matricize(rotated, axis),
                beta=hp["alpha2"],
                alpha=fresh * dims[axis] / 2 * batch_size / size,
            )
            momentum.add_(A, alpha=others * (fresh * hp["lam"] / 2 * size / dims[axis]))
            momentum.diag_add_(-fresh / 2)
            rate = -hp["beta2"] / momentum.frobenius_norm().clamp(min=1.0)
            factor.add_(factor @ momentum, alpha=rate)
            if stored.dtype != grad.dtype:
                stored_momentum.copy_(momentum)
                stored.copy_(factor)


def _as(dtype: torch.dtype, factors: Factors) -> Factors:
    """Convert the factors to the dtype of the computation, without a copy if possible."""
    return tuple(None if factor is None else factor.to(dtype) for factor in factors)


class SIRFShampoo(StructuredOptimizer):
    """Structured, inverse-free and root-free Shampoo (Lin et al. 2024, arXiv 2402.03496).

    Assumes that the loss is a mean over the samples of a batch. The update rule is documented at
    `SIRFShampooStrategy`. All structures can be used; `"auto"` gives vectors `diagonal`.

    Args:
        lr: Learning rate. Default: 1e-3.
        beta2: Learning rate of the Kronecker factors. Default: 0.01.
        alpha1: Momentum of the update, from 0 to below 1. Default: 0.9.
        alpha2: Momentum of the factors, from 0 to below 1. Default: 0.5.
        lam: Damping. Default: 1e-3.
        kappa: Weight decay, added to the preconditioned gradient. Default: 0.0.
        batch_size: The number of samples behind a gradient, or a callable that returns it for the
            tuple of a forward pass's inputs, such as `get_token_count` for losses that are means
            over tokens. Default: `get_batch_size`, dimension 0 of the first input tensor.
        T: Refresh interval of the factors in steps, or a callable that returns whether to refresh
            at a global step. Default: 1.
        max_precond_dim: Axes longer than this get no dense factor. Default: 10000.
        init: The first factors: "identity", as published, or "gradient", scaled to the first
            gradient. Default: "identity".

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = SIRFShampoo(model, lr=0.01, structures={1: "diagonal", 2: "dense"})
        >>> loss = model(torch.ones(16, 4)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.batch_size
        16
    """

    SUPPORTED_STRUCTURES = SUPPORTED_STRUCTURES
    STATE_ATTRIBUTES = ("global_step", "batch_size", "preconditioner", "preconditioner_momenta")

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        beta2: float = 0.01,
        alpha1: float = 0.9,
        alpha2: float = 0.5,
        lam: float = 1e-3,
        kappa: float = 0.0,
        batch_size: int | GetBatchSize = get_batch_size,
        T: int | Callable[[int], bool] = 1,
        max_precond_dim: int = 10000,
        init: Start = "identity",
        **options: Unpack[FactorOptions],
    ) -> None:
        strategy, hp = from_keywords(SIRFShampooStrategy, {**locals(), "start": init})
        super().__init__(
            model,
            params,
            strategy=strategy,
            hyperparameters=hp,
            batch_size=batch_size,
            **options,
        )

    @property
    def preconditioner(self) -> list[Factors]:
        """The Kronecker factors of every unit that goes to SIRF-Shampoo, as views."""
        return self._factors("preconditioner")

    @property
    def preconditioner_momenta(self) -> list[Factors]:
        """The momenta of the Kronecker factors of every such unit, as views."""
        return self._factors("preconditioner_momenta")

    def _factors(self, field: str) -> list[Factors]:
        own = [b for b in self.buckets if isinstance(b.state, SIRFShampooState)]
        return [m for bucket in own for m in bucket.per_unit(field)]
