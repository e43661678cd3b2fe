"""A tiny model with one parameter of every kind."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Size, Tensor, nn

_SAMPLES = 3


class TinyModel(nn.Module):
    """A convolution, an embedding, a norm, two equal linear layers and a head, four wide.

    Args:
        tied: Whether head and embedding share their weight. Default: False.
        odd: Whether to add parameters without axes, without entries, and with one entry.
            Default: False.

    Example:
        >>> model = TinyModel()
        >>> model(torch.zeros(2, 1, 3, 3), torch.tensor([0, 4])).shape
        torch.Size([2, 5])
    """

    def __init__(self, tied: bool = False, odd: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 2)
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.scalar = nn.Parameter(torch.tensor(1.5)) if odd else None
        self.empty = nn.Parameter(torch.zeros(0, 4)) if odd else None
        self.single = nn.Parameter(torch.ones(1, 1)) if odd else None
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits `(n, 5)` of images `(n, 1, 3, 3)` and tokens `(n,)`."""
        x: Tensor = self.conv(images).mean((2, 3)) + self.embedding(tokens)
        if self.scalar is not None and self.single is not None and self.empty is not None:
            x = x * self.scalar + self.single.squeeze() + self.empty.sum()
        x = self.norm(x)
        x = x + torch.tanh(self.first(x))
        x = x + torch.tanh(self.second(x))
        logits: Tensor = self.head(x)
        return logits


def loss_of(model: nn.Module, step: int, part: int, dtype: torch.dtype) -> Tensor:
    """Return the model's mean loss on the fixed batch of a step.

    Args:
        model: A `TinyModel`.
        step: The step.
        part: The number of the micro-batch; micro-batches differ in size.
        dtype: The dtype of the images.
    """
    images, tokens, targets = _batch(step, part, dtype)
    logits: Tensor = model(images, tokens)
    # a loss in half precision would underflow
    return nn.functional.cross_entropy(
        logits.to(torch.promote_types(dtype, torch.float32)), targets
    )


@cache  # every run of a contract reads the same batches
def _batch(step: int, part: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + part)
    samples = _SAMPLES + part
    images = torch.randn(samples, 1, 3, 3, generator=generator, dtype=torch.float64).to(dtype)
    tokens = torch.randint(5, (samples,), generator=generator)
    targets = torch.randint(5, (samples,), generator=generator)
    return images, tokens, targets


def noise(shape: Size, step: int, place: int) -> Tensor:
    """Return random numbers in float64 that depend only on step and place."""
    generator = torch.Generator().manual_seed(1000 * step + place)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def set_grads(params: Iterable[Tensor], step: int) -> None:
    """Set random gradients that depend only on the step and the order of the parameters."""
    for place, p in enumerate(params):
        p.grad = noise(p.shape, step, place).to(p.dtype)
