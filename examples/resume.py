"""Save a run halfway, resume it in new objects, and get the same bits.

Usage: python examples/resume.py [--steps 100]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

from structprecond import SIRFShampoo


def build() -> tuple[nn.Module, SIRFShampoo]:
    """Return a new model and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    return model, SIRFShampoo(model, lr=0.02, structures="hierarchical4_4")


def train(model: nn.Module, optimizer: SIRFShampoo, steps: range) -> float:
    """Train on data that depends only on the step; return the last loss."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 8, generator=generator)
        loss = (model(x) - x[:, :4] * x[:, 4:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def main(argv: list[str] | None = None) -> bool:
    """Return whether the resumed run equals the uninterrupted one, bit by bit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)
    half = args.steps // 2

    model, optimizer = build()
    train(model, optimizer, range(half))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        print(f"saved after {optimizer.global_step} steps: {file.stat().st_size / 1024:.0f} KiB")
        uninterrupted = train(model, optimizer, range(half, args.steps))

        resumed_model, resumed_optimizer = build()
        checkpoint = torch.load(file)  # tensors and plain values load with weights_only=True
    resumed_model.load_state_dict(checkpoint["model"])
    resumed_optimizer.load_state_dict(checkpoint["optimizer"])
    resumed = train(resumed_model, resumed_optimizer, range(half, args.steps))

    pairs = zip(model.parameters(), resumed_model.parameters(), strict=True)
    equal = all(torch.equal(p, q) for p, q in pairs)
    print(f"loss {uninterrupted:.6f} uninterrupted, {resumed:.6f} resumed, equal bits: {equal}")
    return equal


if __name__ == "__main__":
    main()
