"""Write `checkpoint_v<format>.pt`: what a version of the library saved, and where it went then.

Run once per version of the checkpoint format, by the first release that writes it, and never again:
`test_checkpoint_files.py` loads the file with every later release.

Usage: python tests/data/make_checkpoint.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from structprecond import StructuredOptimizer
from structprecond.core.checkpoint import FORMAT
from structprecond.testing.table import STRATEGIES

BEFORE, AFTER = 5, 3
"""The steps made before the checkpoint and recorded after it."""

OPTIMIZERS = {
    usage.saved_as: usage.make for usage in STRATEGIES.values() if usage.saved_as is not None
}
"""What has to load for ever. Arguments may be renamed in the table, but have to mean the same."""


def build(name: str) -> tuple[nn.Module, StructuredOptimizer]:
    """Return a small model in float64 and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))
    model.double()
    return model, OPTIMIZERS[name](model)


def step(model: nn.Module, optimizer: StructuredOptimizer, grads: list[Tensor]) -> None:
    """Make a step with the given gradients."""
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad.clone()
    optimizer.step()


def record(name: str, gradients: list[list[Tensor]]) -> dict[str, Any]:
    """Return a checkpoint, and the parameters that the gradients after it lead to."""
    model, optimizer = build(name)
    for grads in gradients[:BEFORE]:
        step(model, optimizer, grads)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    saved = optimizer.state_dict()
    for grads in gradients[BEFORE:]:
        step(model, optimizer, grads)
    expected = [p.detach().clone() for p in model.parameters()]
    return {"model": weights, "optimizer": saved, "expected": expected}


def main() -> None:
    """Write the file."""
    params = list(build("AdamW")[0].parameters())
    gradients = [[torch.randn_like(p) for p in params] for _ in range(BEFORE + AFTER)]
    content = {name: record(name, gradients) for name in OPTIMIZERS}
    file = Path(__file__).with_name(f"checkpoint_v{FORMAT}.pt")
    torch.save({"gradients": gradients[BEFORE:], "optimizers": content}, file)
    print(f"{file.name}: {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
