"""The optimizers that the examples and the comparison choose from, by name.

A new one is one line: its learning rate, which is also the middle of the grid that the comparison
searches, and how to make it from a model and a learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from structprecond import SIRFShampoo


class Choice(NamedTuple):
    """An optimizer and the learning rate that suits it."""

    lr: float
    make: Callable[[nn.Module, float], Optimizer]


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
        lam=0.1,
        batch_size=count_tokens,
        structures={1: "diagonal", 2: "dense"},
    )


OPTIMIZERS = {
    "adamw": Choice(8e-3, adamw),
    "sirf": Choice(0.4, sirf),
}
