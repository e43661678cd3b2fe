"""Muon and NorMuon: momentum that is orthogonalized by Newton-Schulz iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn

from structprecond.checks import check_choice, check_positive
from structprecond.core.options import from_keywords
from structprecond.core.strategy import Hyperparameter, fraction, nonnegative
from structprecond.linalg.polar import (
    CoefficientType,
    MatmulPrecision,
    checked_coefficients,
    newton_schulz,
)
from structprecond.strategies.auxiliary import AuxiliaryOptions, WithAdamW
from structprecond.strategies.orthogonalized import (
    MomentumState,
    OrthogonalizedMomentumStrategy,
    WeightDecayMethod,
)
from structprecond.structures.spec import Structure

ScaleMode = Literal["spectral", "shape_scaling", "unit_rms_norm", "match_rms_adamw"]


@dataclass(frozen=True)
class MuonStrategy(OrthogonalizedMomentumStrategy):
    r"""The Muon rule: the momentum's polar factor by Newton-Schulz iterations, scaled.

    \[ p \leftarrow p - \eta \, s \, \mathrm{NewtonSchulz}(u), \quad u \text{ as in
       OrthogonalizedMomentumStrategy}. \]

    The scale s of a matrix `(out, in)` is `extra_scale_factor` times, for each `scale_mode`,

    - "spectral": \(\sqrt{\max(out, in)}\), for a root mean square of 1,
    - "shape_scaling": \(\sqrt{\max(1, out / in)}\), as first published,
    - "unit_rms_norm": \(\sqrt{out / in}\), for an operator norm of 1 between root mean squares,
    - "match_rms_adamw": \(0.2 \sqrt{\max(out, in)}\), for updates as large as those of AdamW, whose
      learning rates then carry over (Liu et al. 2025, arXiv 2502.16982, section 2.2).

    Args:
        coefficient_type: As in `linalg.newton_schulz`. Default: "quintic".
        num_ns_steps: The number of Newton-Schulz steps. Default: 5.
        scale_mode: One of the four above. Default: "spectral".
        extra_scale_factor: A further factor. Default: 1.0.
        fp32_matmul_prec: The precision of products: "highest" is float32, "high" TF32 where
            available, "medium" bfloat16 where native, else float32. Default: "medium".

    Raises:
        StructPrecondError: If an argument is not allowed.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
    """

    coefficient_type: CoefficientType = "quintic"
    num_ns_steps: int = 5
    scale_mode: ScaleMode = "spectral"
    extra_scale_factor: float = 1.0
    fp32_matmul_prec: MatmulPrecision = "medium"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("scale_mode", self.scale_mode, ScaleMode)
        check_choice("fp32_matmul_prec", self.fp32_matmul_prec, MatmulPrecision)
        check_positive(extra_scale_factor=self.extra_scale_factor)
        kind = checked_coefficients(self.coefficient_type, self.num_ns_steps)
        object.__setattr__(self, "coefficient_type", kind)

    def scaled_orthogonalize_fn(self, update: Tensor) -> Tensor:
        """Return the scaled polar factors `(b, out, in)` of momenta `(b, out, in)`."""
        return self._orthogonalize(update).mul_(self.scale(*update.shape[1:]))

    def _orthogonalize(self, update: Tensor) -> Tensor:
        return newton_schulz(
            update, self.num_ns_steps, self.coefficient_type, self.fp32_matmul_prec
        )

    def scale(self, rows: int, columns: int) -> float:
        """Return the scale s of a matrix of this shape."""
        scale = {
            "spectral": math.sqrt(max(rows, columns)),
            "shape_scaling": math.sqrt(max(1.0, rows / columns)),
            "unit_rms_norm": math.sqrt(rows / columns),
            "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        }[self.scale_mode]
        return scale * self.extra_scale_factor


@dataclass
class NorMuonState(MomentumState):
    """State of NorMuon for a stack `(b, out, ...)`.

    Args:
        row_exp_avg_sq: The second moment of the rows of the polar factors `(b, out)`.
    """

    row_exp_avg_sq: Tensor


@dataclass(frozen=True)
class NorMuonStrategy(MuonStrategy):
    r"""The NorMuon rule: Muon with a second moment for every row (neuron).

    \[ O = \mathrm{NewtonSchulz}(u), \quad
       v \leftarrow \beta_2 v + (1 - \beta_2) \, \mathrm{mean}_{columns}(O^2), \]
    \[ \hat O = O / (\sqrt v + \epsilon), \quad
       p \leftarrow p - \eta \, s \sqrt{\min(out, in)} \, \hat O / \|\hat O\|_F. \]

    With the scale s of "match_rms_adamw", the default here, the factor is the published
    \(0.2 \sqrt{out \cdot in}\).

    Source: Li et al. 2025 (arXiv 2510.05491), algorithm 1.
    """

    scale_mode: ScaleMode = "match_rms_adamw"

    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        **MuonStrategy.hyperparameters,
        "beta2": fraction(0.95),
        "eps": nonnegative(1e-8),
    }

    def init(
        self, like: Tensor, structures: tuple[Structure, ...], dtypes: tuple[torch.dtype, ...]
    ) -> NorMuonState:
        """Return zero moments."""
        return NorMuonState(torch.zeros_like(like), like.new_zeros(like.shape[:2]))

    def direction(self, state: NorMuonState, update: Tensor, hp: Mapping[str, Any]) -> Tensor:
        """Return the directions `(b, out, in)` of momenta `(b, out, in)`."""
        polar = self._orthogonalize(update)
        rows = state.row_exp_avg_sq.lerp_(polar.square().mean(-1), 1 - hp["beta2"])
        tiny = torch.finfo(polar.dtype).tiny  # rows and matrices of zeros stay zero
        polar.div_(rows.sqrt().add_(hp["eps"]).clamp_(min=tiny).unsqueeze(-1))
        norm = torch.linalg.vector_norm(polar, dim=(-2, -1), keepdim=True)
        size = self.scale(*update.shape[1:]) * min(update.shape[1:]) ** 0.5
        return polar.div_(norm.clamp_(min=tiny)).mul_(size)


class Muon(WithAdamW):
    """Muon for hidden matrices, and AdamW for the rest (Jordan et al. 2024).

    Parameters are routed by their roles in the model (see `infer_roles`). Matrices, convolutions,
    fused projections, experts and stacked layers go to Muon, which orthogonalizes each matrix
    separately. Embeddings, heads (also tied ones), norms, biases, depthwise convolutions, routers
    and others go to AdamW. `print(describe(optimizer))` shows the routes. Bare parameters are
    routed by shape, which does not distinguish an embedding from a matrix: a warning says so.

    `routes` takes precedence: in `{"head": "muon", "*.lora_A.*": "adamw"}`, the names mean this
    Muon and its AdamW. A param group with `"strategy": "muon"` or `"adamw"` is routed as a whole.

    The update rule is documented at `MuonStrategy`. To orthogonalize the blocks of a fused
    projection separately, pass
    `combine_params=(SplitHeads("*.qkv.weight", 3), StackExperts(), Matricize())`. The last two
    groupings are the default: experts are stacks, all other parameters matrices.

    Args:
        lr: Learning rate. Default: 3e-4.
        momentum: Decay of the momentum. Default: 0.95.
        weight_decay: Weight decay of Muon's parameters. Default: 0.01.
        nesterov: Whether to use Nesterov momentum. Default: False.
        weight_decay_method: "decoupled", "independent", "l2" or "palm". Default: "decoupled".
        fp32_matmul_prec: "highest" (float32), "high" (TF32 where available) or "medium" (bfloat16
            where native). Default: "medium".
        coefficient_type: The coefficients of the Newton-Schulz iteration: "simple", "quintic",
            "polar_express", "cans", "aol", "cubic5", or one triple per step. Default: "quintic".
        num_ns_steps: The number of Newton-Schulz steps. Default: 5.
        scale_mode: "spectral", "shape_scaling", "unit_rms_norm", or "match_rms_adamw" for updates
            as large as AdamW's, so that its learning rate carries over. Default: "spectral".
        extra_scale_factor: A factor on all updates of Muon. Default: 1.0.
        before_weight_update: Maps stacked parameters and updates to updates. Default: None.
        after_weight_update: Maps stacked parameters to their new values. Default: None.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 9))
        >>> optimizer = Muon(model, lr=1e-2, scale_mode="match_rms_adamw")
        >>> print(describe(optimizer))
        group  parameters  strategy       role       rule            shape  rows  structures  state
        -------------------------------------------------------------------------------------------
        0      1.weight    MuonStrategy   matrix     Matricize()     8x4    1     none none   170 B
        0      0.weight    AdamWStrategy  embedding  PerParameter()  9x4    1     none none   330 B
        0      1.bias      AdamWStrategy  bias       PerParameter()  8      1     none        106 B
        0      2.weight    AdamWStrategy  head       PerParameter()  9x8    1     none none   618 B
        0      2.bias      AdamWStrategy  bias       PerParameter()  9      1     none        114 B
        -------------------------------------------------------------------------------------------
        MuonStrategy, AdamWStrategy: state 1.3 KiB = 2.13 x parameters (628 B)
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 3e-4,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        nesterov: bool = False,
        weight_decay_method: WeightDecayMethod = "decoupled",
        fp32_matmul_prec: MatmulPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: int = 5,
        scale_mode: ScaleMode = "spectral",
        extra_scale_factor: float = 1.0,
        before_weight_update: Callable[[Tensor, Tensor], Tensor] | None = None,
        after_weight_update: Callable[[Tensor], Tensor] | None = None,
        **options: Unpack[AuxiliaryOptions],
    ) -> None:
        strategy, hp = from_keywords(MuonStrategy, locals())
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)


class NorMuon(WithAdamW):
    """NorMuon for hidden matrices, and AdamW for the rest (Li et al. 2025, arXiv 2510.05491).

    The update rule is documented at `NorMuonStrategy`; parameters are routed as in `Muon`. Its
    updates are as large as AdamW's, so one learning rate suits both.

    Args:
        lr: Learning rate. Default: 1e-3.
        momentum: Decay of the momentum. Default: 0.95.
        beta2: Decay of the second moment of the rows. Default: 0.95.
        eps: Added to the root of the second moment. Default: 1e-8.
        weight_decay: Decoupled weight decay of NorMuon's parameters. Default: 0.01.
        nesterov: Whether to use Nesterov momentum. Default: False.
        fp32_matmul_prec: As in `Muon`. Default: "medium".
        coefficient_type: As in `Muon`. Default: "quintic".
        num_ns_steps: As in `Muon`. Default: 5.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> optimizer = NorMuon(model, lr=1e-2)
        >>> model(torch.ones(16, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        nesterov: bool = False,
        fp32_matmul_prec: MatmulPrecision = "medium",
        coefficient_type: CoefficientType = "quintic",
        num_ns_steps: int = 5,
        **options: Unpack[AuxiliaryOptions],
    ) -> None:
        strategy, hp = from_keywords(NorMuonStrategy, locals())
        super().__init__(model, params, strategy=strategy, hyperparameters=hp, **options)
