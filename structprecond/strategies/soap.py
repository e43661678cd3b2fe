"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from structprecond.checks import check_choice, check_flags, check_positive
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.options import FactorOptions, from_keywords
from structprecond.core.refresh import refresh_rows
from structprecond.core.state import ALL_ROWS, Rows, State
from structprecond.core.strategy import (
    Hyperparameter,
    StepContext,
    nonnegative,
    pair_of_fractions,
)
from structprecond.errors import StructPrecondError
from structprecond.groups import MergeDims
from structprecond.groups.merge import DataFormat
from structprecond.linalg.product import matmul
from structprecond.strategies.moments import adam_direction, factor_decay, fraction_or_default
from structprecond.strategies.rotation import (
    RotatedFactors,
    RotatedStrategy,
    make_factors,
    overwrite,
    rotate,
    rotate_back,
)
from structprecond.structures.mode_product import average_inner_, multiply_axes
from structprecond.structures.spec import Structure


@dataclass
class SOAPState(State):
    """State of SOAP for a stack `(b, d1, ..., dN)`.

    Args:
        factors: The Kronecker factors `(b, dk, dk)`, None for an axis that is not rotated.
        bases: Their eigenbases, of the same shapes.
        exp_avg: The first moment in the eigenbasis `(b, d1, ..., dN)`.
        exp_avg_sq: The second moment in the eigenbasis, of the same shape.
    """

    factors: RotatedFactors
    bases: RotatedFactors
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class SOAPStrategy(RotatedStrategy):
    r"""The SOAP rule.

    For each axis k, \(S_k\) averages \(G_{(k)} G_{(k)}^\top\), and \(Q_k\) is its eigenbasis. The
    first gradient only initializes both. Then, for \(t = 1, 2, \dots\),

    \[ G' = G \times_1 Q_1^\top \dots \times_N Q_N^\top, \quad
       m \leftarrow \beta_1 m + (1 - \beta_1) G', \quad
       v \leftarrow \beta_2 v + (1 - \beta_2) G'^2, \]
    \[ D = \left( \frac{m}{\sqrt v + \epsilon} \right) \times_1 Q_1 \dots \times_N Q_N, \quad
       p \leftarrow p - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} D, \quad
       p \leftarrow p - \eta \lambda p, \quad
       S_k \leftarrow \beta_s S_k + (1 - \beta_s) G_{(k)} G_{(k)}^\top. \]

    Whenever `precondition_frequency` divides t, the columns of \(Q_k\), and v with them, are sorted
    by descending \(\mathrm{diag}(Q_k^\top S_k Q_k)\), and \(Q_k\) becomes the orthogonal factor of
    \(S_k Q_k\). Null columns, such as those of a matrix's longer axis after the first gradient,
    stay as they are (`structprecond.linalg.refresh_eigenbasis`), so rounding does not choose their
    coordinates. m is rotated only at refreshes, which is equivalent to rotating it at every step.

    An axis with the structure `diagonal` or `none` is not rotated and stores nothing. Without
    rotated axes the rule is Adam's, except for the place of epsilon and the skipped first step.

    With Nesterov momentum, the numerator is \(\beta_1 m + (1 - \beta_1) G'\) in place of m, and its
    bias is corrected by \(1 - \beta_1^{t+1}\).

    Args:
        nesterov: Whether to use Nesterov momentum, which is not published. Default: False.
        normalize_grads: Whether directions are divided by their root mean square. Default: False.
        correct_bias: Whether the step size corrects the bias of the moments. Default: True.
        skip_first: Whether the first gradient only initializes, as published. Default: True.
        transport: Whether v follows a change of basis, which the published rule does not do:
            \(v \leftarrow v \times_k (R \circ R)^\top, R = Q_{old}^\top Q_{new}\). Default: False.
        clip_rms: Limit on the root mean square of \(G' / \sqrt{\hat v}\). Larger gradients are
            scaled down, so that outliers do not spoil the state. Default: None, no limit.

    Source: Vyas et al. 2024 (arXiv 2409.11321), algorithm 3, and its official implementation.
    """

    nesterov: bool = False
    normalize_grads: bool = False
    correct_bias: bool = True
    skip_first: bool = True
    transport: bool = False
    clip_rms: float | None = None

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": nonnegative(3e-3),
        "betas": pair_of_fractions((0.95, 0.95)),
        "shampoo_beta": fraction_or_default(-1),
        "eps": nonnegative(1e-8),
        "weight_decay": nonnegative(0.01),
        **RotatedStrategy.hyperparameters,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flags(
            nesterov=self.nesterov,
            normalize_grads=self.normalize_grads,
            correct_bias=self.correct_bias,
            skip_first=self.skip_first,
            transport=self.transport,
        )
        if self.clip_rms is not None:
            check_positive(clip_rms=self.clip_rms)

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> SOAPState:
        """Return zero factors, identity bases and zero moments."""
        return SOAPState(
            *make_factors(like, structures, dtypes), torch.zeros_like(like), torch.zeros_like(like)
        )

    def begin(
        self, state: SOAPState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> bool:
        """Initialize the factors and their eigenbases from the first gradient."""
        average_inner_(state.factors, grad, factor_decay(hp))
        refresh_rows(partial(self._find_bases, grad), state, ALL_ROWS, ctx)
        return self.skip_first

    def update(
        self, state: SOAPState, grad: Tensor, hp: Mapping[str, Any], ctx: StepContext
    ) -> Tensor:
        """Update moments and factors, refresh the rows that are due, return the directions."""
        betas = hp["betas"]
        rotated = rotate(grad, state.bases)
        if self.clip_rms is not None:
            scale = self._clip(rotated, state.exp_avg_sq, betas[1], ctx)
            rotated = rotated * scale
            grad = grad * scale
        direction = rotate_back(self._whiten(state, rotated, hp), state.bases)
        # without `skip_first`, the first gradient counts twice, which eigenbases do not notice
        average_inner_(state.factors, grad, factor_decay(hp))
        if self.normalize_grads:
            rms = direction.flatten(1).square().mean(1).sqrt_().add_(1e-30)
            direction.div_(rms.reshape(-1, *[1] * (direction.ndim - 1)))
        if self.correct_bias:
            first = ctx.bias_correction(betas[0], ago=-1 if self.nesterov else 0)
            second = ctx.bias_correction(betas[1])
            direction.mul_(second**0.5 / first)
        self._refresh_stale(state, hp, ctx)
        return direction

    def _whiten(self, state: SOAPState, rotated: Tensor, hp: Mapping[str, Any]) -> Tensor:
        """Average the rotated gradient and return the direction in the eigenbasis."""
        moments = state.exp_avg, state.exp_avg_sq
        return adam_direction(*moments, rotated, hp["betas"], hp["eps"], None, self.nesterov)

    def _clip(self, rotated: Tensor, exp_avg_sq: Tensor, beta2: float, ctx: StepContext) -> Tensor:
        """Return the factors `(b, 1, ...)` that scale gradients down to `clip_rms`."""
        assert self.clip_rms is not None
        unbiased = exp_avg_sq / ctx.bias_correction(beta2, ago=1)
        # entries without a second moment, such as rows of unseen tokens, are no outliers
        ratios = torch.where(unbiased > 0, rotated.square() / unbiased, 0.0)
        rms = ratios.flatten(1).mean(1).sqrt_().nan_to_num_(posinf=torch.finfo(ratios.dtype).max)
        scale = (self.clip_rms / rms).clamp(max=1.0).reshape(-1, *[1] * (rotated.ndim - 1))
        # the first update has nothing to compare with
        seen = ctx.reached(2)
        if isinstance(seen, bool):
            return scale if seen else torch.ones_like(scale)
        return torch.where(seen, scale, 1.0)

    def _refresh(self, state: SOAPState, rows: Rows) -> None:
        """Refresh the eigenbases and rotate the moments into them."""
        refreshed = [
            None if S is None or Q is None else S.refresh_eigenbasis(Q.to(S.dtype))
            for S, Q in zip(state.factors, state.bases, strict=True)
        ]
        exp_avg = rotate_back(state.exp_avg, state.bases)
        better = tuple(None if new is None else new[0] for new in refreshed)
        moved = state.exp_avg_sq
        if self.transport:
            moved = multiply_axes(moved, _squared_overlaps(state.bases, better), "rmatmat")
        else:
            for axis, new in enumerate(refreshed):
                if new is not None:
                    moved = _permute(moved, new[1], axis)
        state.exp_avg_sq.copy_(moved)
        overwrite(state.bases, better)
        state.exp_avg.copy_(rotate(exp_avg, state.bases))


def _squared_overlaps(old: RotatedFactors, new: RotatedFactors) -> RotatedFactors:
    r"""Return \(R \circ R\) with \(R = Q_{old}^\top Q_{new}\) for every axis."""

    def one(Q: Tensor, P: Tensor) -> Tensor:
        return matmul(Q.mT, P.to(Q.dtype)).square()

    return tuple(
        None if Q is None or P is None else Q._map(one, P) for Q, P in zip(old, new, strict=True)
    )


def _permute(tensor: Tensor, order: Tensor, axis: int) -> Tensor:
    """Reorder each row of a stack along an axis by an order `(b, d_axis)`."""
    shape = [1] * tensor.ndim
    shape[0], shape[axis + 1] = order.shape
    return tensor.gather(axis + 1, order.view(shape).expand_as(tensor))


class SOAP(StructuredOptimizer):
    """SOAP: Adam in the eigenbasis of Shampoo's factors (Vyas et al. 2024, arXiv 2409.11321).

    The update rule is documented at `SOAPStrategy`. Structures: `dense`, `diagonal`,
    `block<k>diagonal`, `none`; `{2: ("dense", "none"), ...}` is one-sided SOAP, `"diagonal"` Adam.

    Args:
        lr: Learning rate. Default: 3e-3.
        betas: Decay of the first and the second moment. Default: (0.95, 0.95).
        shampoo_beta: Decay of the factors; negative for `betas[1]`. Default: -1.
        eps: Added to the root of the second moment. Default: 1e-8.
        weight_decay: Decoupled weight decay. Default: 0.01.
        precondition_frequency: Refresh interval of the bases in steps, or a callable that returns
            whether to refresh at a global step. Default: 10.
        refresh_tolerance: Off-diagonal ratio up to which bases are not refreshed. Default: 0.0.
        max_precond_dim: Axes longer than this are not rotated. Default: 10000.
        merge_dims: Whether neighbouring axes are merged up to `max_precond_dim`: short for
            `combine_params=(MergeDims(max_precond_dim),)`. Merged tensors of one axis with more
            than 1,024 entries are rotated only with `structures="dense"`. Default: False.
        precondition_1d: Whether parameters with one axis are rotated. Default: False.
        nesterov: Whether to use Nesterov momentum. Default: False.
        normalize_grads: Whether directions are divided by their root mean square. Default: False.
        data_format: "channels_last" if 4-d parameters are stored as `(out, height, width, in)`,
            which matters only for merging. Default: "channels_first".
        correct_bias: Whether the step size corrects the bias of the moments. Default: True.
        skip_first: Whether the first gradient only initializes the state. Default: True.
        transport: Whether the second moment follows a change of basis. Default: False.
        clip_rms: Limit on the root mean square of gradients relative to the root of their second
            moment, against outliers. Default: None, no limit.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = SOAP(model, lr=0.01)
        >>> for _ in range(2):
        ...     loss = model(torch.ones(16, 4)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = -1,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        precondition_frequency: int | Callable[[int], bool] = 10,
        refresh_tolerance: float = 0.0,
        max_precond_dim: int = 10000,
        merge_dims: bool = False,
        precondition_1d: bool = False,
        nesterov: bool = False,
        normalize_grads: bool = False,
        data_format: DataFormat = "channels_first",
        correct_bias: bool = True,
        skip_first: bool = True,
        transport: bool = False,
        clip_rms: float | None = None,
        **options: Unpack[FactorOptions],
    ) -> None:
        strategy, hp = from_keywords(SOAPStrategy, locals())
        check_choice("data_format", data_format, DataFormat)
        if merge_dims:
            if options.get("combine_params") is not None:
                raise StructPrecondError(
                    "merge_dims=True is short for combine_params=(MergeDims(...),), but "
                    "combine_params is given too. Put MergeDims into combine_params."
                )
            options["combine_params"] = (MergeDims(max_precond_dim, data_format),)
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)
