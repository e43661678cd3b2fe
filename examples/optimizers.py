"""The optimizers of the examples, by name.

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
    SOAPMuon,
    StructuredOptimizer,
)
from structprecond.core.rounding import Rounding


class Choice(NamedTuple):
    """An optimizer: its learning rate, and how to make it."""

    lr: float
    make: Callable[[nn.Module, float], Optimizer]


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


def soap(model: nn.Module, lr: float, **options: Any) -> Optimizer:
    """Make SOAP as published with the weight decay of AdamW."""
    return SOAP(model, lr=lr, weight_decay=0.1, **options)


def soap_in_bfloat16(model: nn.Module, lr: float, rounding: Rounding) -> Optimizer:
    """Convert the model's parameters to bfloat16, and make SOAP."""
    return soap(model.bfloat16(), lr, rounding=rounding)


def _lr(name: str) -> float:
    lr: float = RECOMMENDED[name]["lr"]
    return lr


OPTIMIZERS = {
    "adamw": Choice(_lr("AdamW"), adamw),
    "soap": Choice(_lr("SOAP"), partial(recommended, SOAP)),
    "soapmuon": Choice(_lr("SOAPMuon"), partial(recommended, SOAPMuon)),
    "klshampoo": Choice(_lr("KLShampoo"), partial(recommended, KLShampoo)),
    "klsoap": Choice(_lr("KLSOAP"), partial(recommended, KLSOAP)),
    "shampoo": Choice(1e-2, partial(recommended, Shampoo)),
    "sirf": Choice(_lr("SIRFShampoo"), partial(recommended, SIRFShampoo, batch_size=count_tokens)),
    "muon": Choice(_lr("Muon"), partial(recommended, Muon)),
    "normuon": Choice(_lr("NorMuon"), partial(recommended, NorMuon)),
    "scion": Choice(3.6e-4, partial(recommended, Scion)),
    "lars": Choice(_lr("LARS"), partial(recommended, LARS)),
    # SOAP as published with the weight decay of AdamW, and beyond, at one learning rate
    "soap-published": Choice(1.6e-2, soap),
    "soap-staggered": Choice(1.6e-2, partial(soap, refresh="staggered")),
    "soap-transport": Choice(1.6e-2, partial(soap, transport=True)),
    "soap-unskipped": Choice(1.6e-2, partial(soap, skip_first=False)),
    "soap-clipped": Choice(1.6e-2, partial(soap, clip_rms=3.0)),
    # the same with parameters or factors in low precision
    "soap-nearest": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="nearest")),
    "soap-stochastic": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="stochastic")),
    "soap-kahan": Choice(1.6e-2, partial(soap_in_bfloat16, rounding="kahan")),
    "soap-bfloat16-factors": Choice(1.6e-2, partial(soap, preconditioner_dtypes=torch.bfloat16)),
}
