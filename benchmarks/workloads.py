"""The models whose steps are timed, with random gradients by seed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def transformer_matrices(layers: int = 4, width: int = 256) -> nn.Module:
    """Return the matrices of a transformer: q, k, v, o and a gated MLP of 4 times the width."""
    block = [(width, width)] * 4 + [(width, 4 * width)] * 2 + [(4 * width, width)]
    return nn.ModuleList(
        nn.ModuleList(nn.Linear(n_in, n_out, bias=False) for n_in, n_out in block)
        for _ in range(layers)
    )


def small_matrices(count: int = 200, width: int = 64) -> nn.Module:
    """Return many small linear layers with biases."""
    return nn.ModuleList(nn.Linear(width, width) for _ in range(count))


WORKLOADS: dict[str, Callable[[], nn.Module]] = {
    "transformer28": transformer_matrices,
    "small200": small_matrices,
}


def fill_gradients(model: nn.Module, seed: int) -> None:
    """Give every parameter a random gradient, as large as those of a mean over a batch are."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator) / p.numel() ** 0.5
        p.grad = grad.to(p.device, p.dtype)
