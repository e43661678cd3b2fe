"""Param groups with their own hyperparameters and structures, and a learning-rate schedule.

Usage: python examples/param_groups.py [--steps 200]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from structprecond import LinearWeightBias, PerParameter, SIRFShampoo


def main(argv: list[str] | None = None) -> list[float]:
    """Classify points by quadrant; return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(2, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
    head = nn.Linear(48, 4)
    model = nn.Sequential(body, head)
    optimizer = SIRFShampoo(
        model,
        [
            # hidden layers: weight and bias form one matrix, with factors in blocks of 16
            {
                "params": body.parameters(),
                "structures": "block16diagonal",
                "combine_params": (LinearWeightBias(), PerParameter()),
            },
            {"params": head.parameters(), "lr": 0.02, "kappa": 1e-3},
        ],
        lr=0.05,
        verbose_init=True,
    )
    # one function per group, as for every torch optimizer; the head's rate decays after warm-up
    warmup = max(1, args.steps // 10)
    schedule = LambdaLR(
        optimizer,
        [
            lambda step: min((step + 1) / warmup, 1.0),
            lambda step: min((step + 1) / warmup, 1 - step / args.steps),
        ],
    )

    losses = []
    for step in range(args.steps):
        x = torch.randn(64, 2)
        target = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        loss = nn.functional.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == args.steps - 1:
            rates = ", ".join(f"{group['lr']:.4f}" for group in optimizer.param_groups)
            print(f"step {step:4d}  loss {loss.item():.4f}  lr {rates}")
    return losses


if __name__ == "__main__":
    main()
