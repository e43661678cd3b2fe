"""A LightningModule with an optimizer of this library, a schedule, and SAM.

    python examples/integrations/lightning_module.py

Lightning passes a closure to `step`, which SAM calls twice; so automatic optimization works for
both.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from structprecond import SAM, SOAP


class Regression(lightning.LightningModule):  # type: ignore[misc]
    """A small network.

    Args:
        optimizer: The class of the optimizer.
        steps: The length of the schedule.
        sam: Whether SAM wraps the optimizer.
        settings: More keywords of the optimizer.
    """

    def __init__(
        self, optimizer: Any = SOAP, steps: int = 60, sam: bool = False, **settings: Any
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.optimizer, self.steps, self.sam, self.settings = optimizer, steps, sam, settings
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        loss: Tensor = (self.layers(x) - y).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        made = self.optimizer(self, lr=0.01, **self.settings)
        optimizer = SAM(None, made) if self.sam else made
        schedule = CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_trainer(steps: int, folder: str | None = None) -> Any:
    """Return a quiet trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        default_root_dir=folder,
        enable_checkpointing=False,
        **quiet,
    )


def loader(samples: int = 320) -> Any:
    """Return batches of 32 in a fixed order."""
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sin().cumsum(1)), batch_size=32)


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sam", action="store_true")
    args = parser.parse_args(argv)
    module = Regression(steps=args.steps, sam=args.sam)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        make_trainer(args.steps).fit(module, loader())
    return module.losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
