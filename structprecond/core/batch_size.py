"""The number of samples behind the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from structprecond.checks import A_COUNT, is_count
from structprecond.core.inputs import GetBatchSize as GetBatchSize
from structprecond.core.passes import BatchSizeCounter, is_complete
from structprecond.errors import HyperparameterError, StructPrecondError


class Samples:
    """The number of samples behind the gradients: fixed, or counted in forward passes.

    Args:
        model: The model; None if only parameters are known.

    Attributes:
        shown: The number as a 0-d int64 tensor, for checkpoints.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.shown = torch.zeros((), dtype=torch.int64, device="cpu")
        self._counter: BatchSizeCounter | None = None
        self._total: int | None = None

    @property
    def counts(self) -> bool:
        """Whether the number is counted, and not a fixed one."""
        return self._counter is not None

    def note_total(self, total: int | None) -> None:
        """Note the number of samples behind the gradients of this step, counted on all ranks.

        None if it is not counted.
        """
        self._total = total

    @property
    def count(self) -> int | None:
        """The number of samples; None if it is unknown."""
        return (int(self.shown) if self._counter is None else self._counter.count) or None

    def assign(self, value: int | GetBatchSize, optimizer: Optimizer) -> None:
        """Fix the number, or count it with a callable on the inputs of forward passes.

        Raises:
            StructPrecondError: If counting needs a model, but there is none.
            HyperparameterError: If the value is neither a positive integer nor a callable.
        """
        counter = None
        if callable(value):
            if self.model is None:
                raise StructPrecondError(
                    "Counting the batch size needs the model, but the optimizer was given only "
                    "parameters. Pass the model as first argument, or batch_size= as an integer."
                )
            counter = BatchSizeCounter(value)
            counter.watch(self.model, optimizer)
        elif is_count(value):
            self.shown.fill_(value)
        else:
            raise HyperparameterError(
                f"batch_size must be {A_COUNT}, or a callable that returns one for the tuple of a "
                f"forward's inputs, got {value!r}."
            )
        if self._counter is not None:
            self._counter.close()
        self._counter = counter

    def watch(self, optimizer: Optimizer) -> None:
        """Let a copied counter watch the copied model, once the model is complete."""
        if self._counter is None or self.model is None or self._counter.watching:
            return
        if is_complete(self.model):
            self._counter.watch(self.model, optimizer)

    def use(self) -> None:
        """Store the number in `shown` after a step; the next gradient starts a new count."""
        self.shown.fill_((self.count if self._total is None else self._total) or 0)
        self._total = None
        if self._counter is not None:
            self._counter.use()

    def clear(self) -> None:
        """Let the next gradient start a new count."""
        if self._counter is not None:
            self._counter.start_anew()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Adopt the number loaded into `shown`, unless a fixed one was given."""
        given = int(self.shown)
        yield
        if self._counter is None:
            self.shown.fill_(given)
        else:
            self._counter.count = int(self.shown)
