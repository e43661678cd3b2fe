"""Training for a fixed number of steps: the loop that the examples and benchmarks share."""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm


class Task(ABC):
    """Something to train: a model, batches, a loss, and how good the model is.

    Weights and batches depend only on the seed: with the same seed, two optimizers start from the
    same weights and see the same batches.
    """

    @abstractmethod
    def model(self) -> nn.Module:
        """Return a new model, from torch's random numbers."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Any]:
        """Draw batches endlessly; equal seeds draw equal batches."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the training loss of a batch."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> float:
        """Return the validation loss."""


@dataclass
class Run:
    """The settings and the results of a training run.

    Attributes:
        name: The optimizer's name.
        lr: The peak learning rate.
        seed: The seed of the weights and of the batches.
        steps: The length of the schedule.
        curve: (step, training seconds so far, validation loss); evaluations are not timed.
        step_seconds: The time of a training step: the median over stretches of 20 steps of their
            mean. It includes rare expensive steps, but not busy moments of the machine.
        diverged: Whether a non-finite loss ended the run early.
    """

    name: str
    lr: float
    seed: int
    steps: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    step_seconds: float = math.nan
    diverged: bool = False

    @property
    def final_loss(self) -> float:
        """The last validation loss, infinite for a run that diverged."""
        return math.inf if self.diverged else self.curve[-1][2]

    def time_to(self, loss: float) -> tuple[float, float] | None:
        """Return the step and the seconds at which the validation loss reached `loss`.

        Interpolates linearly between evaluations. None if the loss was never reached.
        """
        for before, after in pairwise(self.curve):
            if after[2] <= loss < before[2]:
                part = (before[2] - loss) / (before[2] - after[2])
                step = before[0] + part * (after[0] - before[0])
                return step, before[1] + part * (after[1] - before[1])
        return None


def linear_schedule(step: int, steps: int) -> float:
    """Warm up linearly over a tenth of the steps, then decay linearly to 0 at `steps`."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))


def train(
    run: Run,
    make_optimizer: Callable[[nn.Module, float], Optimizer],
    task: Task,
    *,
    eval_every: int = 20,
    quiet: bool | None = False,
) -> Run:
    """Train a new model.

    Args:
        run: The settings, and the record to fill in.
        make_optimizer: Makes the optimizer from the model and the peak learning rate.
        task: What to train.
        eval_every: The number of steps between two evaluations.
        quiet: Whether to hide the progress bar. None hides it without a terminal.

    Returns:
        The record.
    """
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = make_optimizer(model, run.lr)
    schedule = LambdaLR(optimizer, lambda step: linear_schedule(step, run.steps))
    run.curve.append((0, 0.0, task.evaluate(model)))
    seconds: list[float] = []
    drawn = islice(task.batches(run.seed), run.steps)
    bar = tqdm(drawn, desc=run.name, total=run.steps, unit="step", disable=quiet)
    for step, batch in enumerate(bar, start=1):
        start = time.perf_counter()
        loss = task.loss(model, batch)
        if not math.isfinite(value := loss.item()):
            run.diverged = True
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds.append(time.perf_counter() - start)
        if step % eval_every == 0 or step == run.steps:
            run.curve.append((step, sum(seconds), task.evaluate(model)))
        bar.set_postfix(loss=f"{value:.3f}", validation=f"{run.curve[-1][2]:.3f}", refresh=False)
    run.diverged |= not math.isfinite(run.curve[-1][2])
    stretches = [statistics.fmean(seconds[i : i + 20]) for i in range(0, len(seconds), 20)]
    run.step_seconds = statistics.median(stretches) if stretches else math.nan
    return run
