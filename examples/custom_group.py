"""Your own grouping: which parameters are preconditioned as one tensor.

Usage: python examples/custom_group.py [--steps 200]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from structprecond import FlattenAndConcatenate, PerParameter, SIRFShampoo, SplitHeads


@dataclass(frozen=True)
class NormWeightBias(FlattenAndConcatenate):
    """Group weight and bias of each layer norm into one vector, which has one factor."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        """Return weight and bias of every layer norm."""
        return [[m.weight, m.bias] for m in model.modules() if isinstance(m, nn.LayerNorm)]


class Attention(nn.Module):
    """Self-attention with one fused projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend over `(batch, time, width)`."""
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One residual block of attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add the output of attention."""
        return x + self.attention(self.norm(x))  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> list[float]:
    """Learn to copy the value three places back; return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    width, heads, length = 32, 4, 16
    position = torch.randn(length, width) / width**0.5
    model = nn.Sequential(Block(width, heads), Block(width, heads), nn.Linear(width, 1))
    optimizer = SIRFShampoo(
        model,
        lr=0.02,
        # the first matching grouping wins: every head of q, k and v has its own factors
        combine_params=(
            NormWeightBias(),
            SplitHeads("*.attention.qkv.weight", heads=3 * heads),
            PerParameter(),
        ),
        verbose_init=True,
    )

    losses = []
    for step in range(args.steps):
        values = torch.randn(32, length, 1)
        x = torch.cat([values, position[:, 1:].expand(32, -1, -1)], dim=-1)
        loss = (model(x)[:, 3:] - values[:, :-3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}")
    return losses


if __name__ == "__main__":
    main()
