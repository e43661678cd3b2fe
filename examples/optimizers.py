"""The optimizers of the examples and the comparison, by name.

To add one, add a line to `OPTIMIZERS`: its learning rate, and a function that makes it from a model
and a learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from structprecond import SOAP, KLShampoo, Muon, SIRFShampoo
from structprecond.core.rounding import Rounding


class Choice(NamedTuple):
    """An optimizer: its learning rate, how to make it, and the middle of its grid."""

    lr: float
    make: Callable[[nn.Module, float], Optimizer]
    middle: float = 1.6e-2


def count_tokens(inputs: tuple[Tensor, ...]) -> int:
    """Count the samples that the loss averages: for a language model, tokens."""
    return inputs[0].numel()


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """Make AdamW with common settings for transformers."""
    return AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def sirf(model: nn.Module, lr: float) -> Optimizer:
    """Make SIRF-Shampoo.

    It takes no root, so its directions are natural gradients of another scale: learning rate and
    damping are larger than those of the other optimizers.
    """
    return SIRFShampoo(
        model,
        lr=lr,
        beta2=0.1,
        lam=0.03,
        batch_size=count_tokens,
        structures={1: "diagonal", 2: "dense"},
    )


def soap(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Make SOAP with the weight decay of AdamW."""
    return SOAP(model, lr=lr, weight_decay=0.1, **options)


def soap_in_bfloat16(model: nn.Module, lr: float, rounding: Rounding) -> Optimizer:
    """Convert the model's parameters to bfloat16, and make SOAP."""
    return soap(model.bfloat16(), lr, rounding=rounding)


def klshampoo(model: nn.Module, lr: float) -> Optimizer:
    """Make KL-Shampoo with the weight decay of AdamW."""
    return KLShampoo(model, lr=lr, weight_decay=0.1)


def muon(model: nn.Module, lr: float) -> Optimizer:
    """Make Muon with updates as large as AdamW's, which updates embeddings, head and norms."""
    return Muon(
        model,
        lr=lr,
        scale_mode="match_rms_adamw",
        nesterov=True,
        coefficient_type="polar_express",
        weight_decay=0.1,
        adamw_weight_decay=0.1,
    )


OPTIMIZERS = {
    "adamw": Choice(1.6e-2, adamw),
    "soap": Choice(1.6e-2, soap),
    "klshampoo": Choice(6.4e-2, klshampoo),
    "sirf": Choice(0.2, sirf, middle=0.2),
    "muon": Choice(3.2e-2, muon),
    # SOAP beyond the published update rule, at one learning rate
    "soap-published": Choice(1.6e-2, soap),
    "soap-staggered": Choice(1.6e-2, partial(soap, refresh="staggered")),
    "soap-transport": Choice(1.6e-2, partial(soap, transport=True)),
    "soap-unskipped": Choice(1.6e-2, partial(soap, skip_first=False)),
    "soap-clipped": Choice(1.6e-2, partial(soap, clip_rms=3.0)),
    # SOAP with parameters or factors in low precision
    "soap-nearest": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="nearest")),
    "soap-stochastic": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="stochastic")),
    "soap-kahan": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="kahan")),
    "soap-bfloat16-factors": Choice(1.6e-2, partial(soap, preconditioner_dtypes=torch.bfloat16)),
}
DEFAULTS = ("adamw", "soap", "klshampoo", "sirf", "muon")
"""The comparison's default optimizers."""
