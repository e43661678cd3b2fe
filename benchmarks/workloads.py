"""The models whose steps are timed, and their random gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def transformer_matrices(
    layers: int = 4, width: int = 256, gated: bool = True, vocabulary: int = 0
) -> nn.Module:
    """Return the weights of a transformer: q, k, v, o, and an MLP of 4 times the width.

    Args:
        layers: The number of layers.
        width: Their width.
        gated: Whether the MLP has a third matrix.
        vocabulary: If above 0, adds an embedding, and two norm vectors per layer.
    """
    block = [(width, width)] * 4 + [(width, 4 * width)] * (1 + gated) + [(4 * width, width)]
    parts: list[nn.Module] = [nn.Embedding(vocabulary, width)] if vocabulary else []
    for _ in range(layers):
        parts += [nn.Linear(n_in, n_out, bias=False) for n_in, n_out in block]
        parts += [nn.RMSNorm(width) for _ in range(2 if vocabulary else 0)]
    return nn.ModuleList(parts)


def small_matrices(count: int = 200, width: int = 64) -> nn.Module:
    """Return many small linear layers with biases."""
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


def convolutions() -> nn.Module:
    """Return ten convolutions of a residual network, from 64 to 256 channels."""
    channels = [(64, 64)] * 4 + [(64, 128)] + [(128, 128)] * 3 + [(128, 256)] + [(256, 256)]
    return nn.ModuleList(nn.Conv2d(n_in, n_out, 3, bias=False) for n_in, n_out in channels)


WORKLOADS: dict[str, Callable[[], nn.Module]] = {
    # a small GPT
    "W1": lambda: transformer_matrices(layers=6, gated=False, vocabulary=1024),
    # many small matrices
    "W2": small_matrices,
    # few large ones
    "W3": lambda: transformer_matrices(layers=4, width=768, gated=False),
    # convolutions
    "W4": convolutions,
    "transformer28": transformer_matrices,
}

LARGE: dict[str, Callable[[], nn.Module]] = {
    # GPT-2 with 124 million parameters
    "W5": lambda: transformer_matrices(layers=12, width=768, gated=False, vocabulary=50257),
    # 1.2 billion parameters
    "W6": lambda: transformer_matrices(layers=24, width=2048, gated=False),
    # for a look at the program itself
    "tiny": lambda: transformer_matrices(layers=1, width=16, gated=False, vocabulary=32),
}
"""Workloads that only `gpu.py` runs."""


def fill_gradients(model: nn.Module, seed: int) -> None:
    """Give every parameter a random gradient with an expected squared norm of 1."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator, device=device) / p.numel() ** 0.5
        p.grad = grad.to(p.dtype)
