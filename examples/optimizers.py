"""The optimizers of the examples and the comparison, by name.

To add one, add a line to `OPTIMIZERS`: its learning rate, and a function that makes it from a model
and a learning rate. Settings come from `structprecond.RECOMMENDED`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from structprecond import (
    KLSOAP,
    LARS,
    RECOMMENDED,
    SOAP,
    KLShampoo,
    Muon,
    NorMuon,
    Scion,
    Shampoo,
    SIRFShampoo,
    StructuredOptimizer,
)
from structprecond import AdamW as OurAdamW
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
    """Make torch's AdamW with common settings for transformers."""
    return AdamW(model.parameters(), **RECOMMENDED["AdamW"] | {"lr": lr}, fused=True)


def recommended(
    optimizer: type[StructuredOptimizer], model: nn.Module, lr: float, **options: Any
) -> Optimizer:
    """Make an optimizer with its recommended settings and another learning rate."""
    settings = RECOMMENDED[optimizer.__name__] | {"lr": lr} | options
    return optimizer(model, **settings)


def as_published(
    optimizer: type[StructuredOptimizer], model: nn.Module, lr: float, **options: Any
) -> Optimizer:
    """Make an optimizer with its defaults, except for the learning rate and some options."""
    settings = {"lr": lr} | options
    return optimizer(model, **settings)


def soap(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Make SOAP as published with the weight decay of AdamW."""
    return SOAP(model, lr=lr, weight_decay=0.1, **options)


def sirf_unrouted(model: nn.Module, lr: float) -> Optimizer:
    """Make SIRF-Shampoo for all parameters, with batch sizes in tokens.

    It takes no root, so its directions are natural gradients of another scale: learning rate and
    damping are larger than those of the other optimizers.
    """
    structures = {1: "diagonal", 2: "dense"}
    return SIRFShampoo(
        model, lr=lr, beta2=0.1, lam=0.03, batch_size=count_tokens, structures=structures
    )


def soap_in_bfloat16(model: nn.Module, lr: float, rounding: Rounding) -> Optimizer:
    """Convert the model's parameters to bfloat16, and make SOAP."""
    return soap(model.bfloat16(), lr, rounding=rounding)


def _lr(name: str) -> float:
    lr: float = RECOMMENDED[name]["lr"]
    return lr


OPTIMIZERS = {
    "adamw": Choice(_lr("AdamW"), adamw),
    "soap": Choice(_lr("SOAP"), partial(recommended, SOAP), middle=3.2e-2),
    "klshampoo": Choice(_lr("KLShampoo"), partial(recommended, KLShampoo), middle=6.4e-2),
    "klsoap": Choice(_lr("KLSOAP"), partial(recommended, KLSOAP)),
    "shampoo": Choice(1e-2, partial(recommended, Shampoo)),
    "sirf": Choice(_lr("SIRFShampoo"), partial(recommended, SIRFShampoo), middle=0.05),
    "muon": Choice(_lr("Muon"), partial(recommended, Muon)),
    "normuon": Choice(_lr("NorMuon"), partial(recommended, NorMuon), middle=3.2e-2),
    "scion": Choice(3.6e-4, partial(recommended, Scion), middle=5e-4),
    "lars": Choice(_lr("LARS"), partial(recommended, LARS), middle=20.0),
    # the defaults, with their own learning rate and with the middle of a grid around the best one
    "adamw-defaults": Choice(1e-3, partial(as_published, OurAdamW), middle=8e-3),
    "soap-defaults": Choice(3e-3, partial(as_published, SOAP), middle=3.2e-2),
    "klshampoo-defaults": Choice(1e-4, partial(as_published, KLShampoo), middle=0.128),
    "klsoap-defaults": Choice(1e-4, partial(as_published, KLSOAP)),
    "sirf-defaults": Choice(1e-3, partial(as_published, SIRFShampoo), middle=0.128),
    "muon-defaults": Choice(3e-4, partial(as_published, Muon), middle=4e-3),
    "normuon-defaults": Choice(1e-3, partial(as_published, NorMuon), middle=3.2e-2),
    "lars-defaults": Choice(2.0, partial(as_published, LARS), middle=2.0),
    # one strategy for all parameters, with the weight decay of AdamW
    "soap-published": Choice(1.6e-2, soap),
    "klshampoo-published": Choice(6.4e-2, partial(as_published, KLShampoo, weight_decay=0.1)),
    "sirf-unrouted": Choice(0.2, sirf_unrouted, middle=0.2),
    # SOAP beyond the published update rule, at one learning rate
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
