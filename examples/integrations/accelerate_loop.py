"""A training loop under Accelerate, with gradient accumulation and checkpoints.

    python examples/integrations/accelerate_loop.py

`prepare` wraps the model. Build the optimizer from the model before; under FSDP2, see
docs/distributed.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from structprecond import SOAP


def batches(steps: int, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return inputs and targets, each batch from its own seed."""
    made = []
    for number in range(first, steps):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(number))
        made.append((x, x.sin().cumsum(1)))
    return made


def make(optimizer: Any = SOAP, **settings: Any) -> tuple[Any, Any, Any]:
    """Return the accelerator, the model and the optimizer, prepared."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)
    )
    return accelerator, *accelerator.prepare(model, optimizer(model, lr=0.01, **settings))


def train(accelerator: Any, model: Any, optimizer: Any, data: Any) -> list[float]:
    """Train on the batches; the optimizer steps after every second one."""
    losses = []
    for x, y in data:
        with accelerator.accumulate(model):
            loss = (model(x) - y).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    args = parser.parse_args(argv)
    return train(*make(), batches(args.steps))


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
