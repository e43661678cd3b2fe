"""Basic use: pass the model, choose structures, train.

Usage: python examples/basic.py [--steps 200]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from structprecond import SOAP, describe


def main(argv: list[str] | None = None) -> list[float]:
    """Fit a small network to a smooth function; return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    # weights: rotate the output axis in blocks of 16 and the whole input axis; biases: no rotation
    optimizer = SOAP(model, lr=0.02, structures={1: "none", 2: ("block16diagonal", "dense")})
    print(describe(optimizer))

    losses = []
    for step in range(args.steps):
        x = torch.rand(64, 2) * 4 - 2
        target = torch.sin(2 * x[:, :1]) * x[:, 1:]
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    return losses


if __name__ == "__main__":
    main()
