"""One optimizer with several strategies: each parameter gets the strategy for its role.

Usage: python examples/mixed.py [--steps 200]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from structprecond import (
    AdamWStrategy,
    MuonStrategy,
    SOAPStrategy,
    StructuredOptimizer,
    infer_roles,
)


class Tagger(nn.Module):
    """An embedding, a convolution over time, a hidden layer and a head."""

    def __init__(self, symbols: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, width)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, symbols)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, time) -> (batch, time, symbols)
        """Return the logits of the symbols at every position."""
        x = self.embedding(tokens)
        x = x + self.conv(x.mT).mT.relu()
        return self.head(self.hidden(self.norm(x)).relu())  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> list[float]:
    """Learn to add the neighbours of every digit, modulo ten; return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = Tagger(symbols=10, width=32)
    print(f"{infer_roles(model)}\n")
    optimizer = StructuredOptimizer(
        model,
        strategy={
            "matrix": MuonStrategy(scale_mode="match_rms_adamw", nesterov=True),
            "conv": SOAPStrategy(),
            "default": AdamWStrategy(),
        },
        # hyperparameters of the default strategy have no prefix, those of the others have one;
        # all strategies share the learning rate of the param group
        hyperparameters={
            "lr": 0.01,
            "weight_decay": 0.0,
            "muon_lr_scale": 2.0,
            "soap_precondition_frequency": 5,
        },
        verbose_init=True,
    )
    schedule = LambdaLR(optimizer, lambda step: 1 - step / args.steps)

    losses = []
    for step in range(args.steps):
        tokens = torch.randint(0, 10, (64, 12))
        sums = (tokens.roll(1, 1) + tokens.roll(-1, 1)) % 10
        logits = model(tokens)[:, 1:-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), sums[:, 1:-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    return losses


if __name__ == "__main__":
    main()
