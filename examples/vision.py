"""A small residual network on handwritten digits, trained with LARS and sharpness-aware steps.

Usage: python examples/vision.py [--steps 300]
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from structprecond import LARS, SAM

Digits = tuple[Tensor, Tensor]  # images (n, 1, 8, 8) and labels (n,)


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:  # (batch, channels, height, width), in and out
        """Add the output of the convolutions."""
        return torch.relu(x + self.body(x))


def network(channels: int) -> nn.Sequential:
    """Return two residual blocks between a stem and a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        Block(channels),
        nn.MaxPool2d(2),
        Block(channels),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 10),
    )


def load() -> tuple[Digits, Digits]:
    """Return training and test set: 1,437 and 360 digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return (images[train], labels[train]), (images[test], labels[test])


def main(argv: list[str] | None = None) -> tuple[list[float], float]:
    """Train, and return the losses and the accuracy on the test set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    (images, labels), (test_images, test_labels) = load()
    model = network(channels=32)
    # Weights get decay and layer-wise rates; biases and norm scales take plain steps.
    vectors = [p for p in model.parameters() if p.ndim < 2]
    weights = [p for p in model.parameters() if p.ndim >= 2]
    base = LARS(
        model,
        [
            {"params": weights, "weight_decay": 5e-4, "lr": 20.0},
            {"params": vectors, "lr": 0.2},
        ],
        lr=20.0,
        momentum=0.9,
    )
    # SAM gets the model from its base, so it freezes batch-norm statistics in its second pass
    optimizer = SAM(None, base, rho=0.5)
    schedule = OneCycleLR(optimizer, [20.0, 0.2], total_steps=args.steps, cycle_momentum=False)

    losses = []
    for step in range(args.steps):
        batch = torch.randint(0, len(labels), (128,))

        def closure(chosen: Tensor = batch) -> float:
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            return loss.item()

        loss = optimizer.step(closure)
        schedule.step()
        losses.append(loss)
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:4d}  loss {loss:.4f}")
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
    print(f"accuracy on {len(test_labels)} other digits: {accuracy:.1%}")
    return losses, accuracy


if __name__ == "__main__":
    main()
