"""The optimizers that the examples and the comparison choose from, by name.

A new one is one line: a learning rate that suits it, and how to make it from a model and a learning
rate.
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
    """An optimizer, the learning rate that suits it, and the middle of the grid to search."""

    lr: float
    make: Callable[[nn.Module, float], Optimizer]
    middle: float = 1.6e-2


def count_tokens(inputs: tuple[Tensor, ...]) -> int:
    """Count what the loss is a mean over, which for a language model is tokens."""
    return inputs[0].numel()


def adamw(model: nn.Module, lr: float) -> Optimizer:
    """Make AdamW with the settings that are common for transformers."""
    return AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def sirf(model: nn.Module, lr: float) -> Optimizer:
    """Make SIRF-Shampoo.

    Its directions are natural gradients: they have no scale of their own, so learning rate and
    damping are larger than for the optimizers that take a root.
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
    """Make SOAP for a model whose parameters become bfloat16."""
    return soap(model.bfloat16(), lr, rounding=rounding)


def klshampoo(model: nn.Module, lr: float) -> Optimizer:
    """Make KL-Shampoo with the weight decay of AdamW."""
    return KLShampoo(model, lr=lr, weight_decay=0.1)


def muon(model: nn.Module, lr: float) -> Optimizer:
    """Make Muon with updates as large as AdamW's, which embeddings, head and norms get."""
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
    # what SOAP does beyond the published rule, at one learning rate
    "soap-published": Choice(1.6e-2, soap),
    "soap-staggered": Choice(1.6e-2, partial(soap, refresh="staggered")),
    "soap-transport": Choice(1.6e-2, partial(soap, transport=True)),
    "soap-unskipped": Choice(1.6e-2, partial(soap, skip_first=False)),
    "soap-clipped": Choice(1.6e-2, partial(soap, clip_rms=3.0)),
    # SOAP with parameters, or with factors, in low precision
    "soap-nearest": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="nearest")),
    "soap-stochastic": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="stochastic")),
    "soap-kahan": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="kahan")),
    "soap-bfloat16-factors": Choice(1.6e-2, partial(soap, preconditioner_dtypes=torch.bfloat16)),
}
DEFAULTS = ("adamw", "soap", "klshampoo", "sirf", "muon")
"""What the comparison runs unless told otherwise."""
