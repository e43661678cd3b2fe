"""A small convolutional classifier of scikit-learn's handwritten digits, with augmentation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from training import Task

BATCH, TRAINED_ON = 64, 1200


class Digits(Task):
    """Digits of 8 x 8 pixels, moved by up to one pixel; the loss is the cross-entropy."""

    steps = 300
    samples = BATCH

    def __init__(self) -> None:
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(data.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        self._images, self._labels = images[:TRAINED_ON], labels[:TRAINED_ON]
        self._held_out = images[TRAINED_ON:], labels[TRAINED_ON:]

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(32 * 16, 64),
            nn.GELU(),
            nn.Linear(64, 10),
        )

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        padded = F.pad(self._images, (1, 1, 1, 1))
        while True:
            chosen = torch.randint(TRAINED_ON, (BATCH,), generator=generator)
            down, right = torch.randint(3, (2,), generator=generator).tolist()
            yield padded[chosen, :, down : down + 8, right : right + 8], self._labels[chosen]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        return self.loss(model, self._held_out).item()
