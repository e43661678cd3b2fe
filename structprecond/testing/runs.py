"""One run of a strategy: a model, its optimizer, and the promises that every step must keep."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.units import Unit
from structprecond.testing.comparing import first_difference, same_bits
from structprecond.testing.models import loss_of
from structprecond.testing.situations import Situation

_OVERFLOWS = (5, 16)
"""Steps with infinite gradients, which a scaler must skip."""

_SLOWED_AT = 3
"""The step at which learning rates are halved, unknown to a new optimizer."""

_SHARED = {"global_step", "batch_size", "overdue", "phase_offset"}
"""Values in a state entry that may change in steps without its unit."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of storage and computation.

    Args:
        name: Its name.
        dtype: The dtype of the parameters.
        scaled: Whether the forward pass is in float16, with a `GradScaler`.
    """

    name: str
    dtype: torch.dtype
    scaled: bool = False

    def __str__(self) -> str:
        return self.name


# torch's scaler refuses float16 gradients, so mixed precision has float32 parameters
PRECISIONS = (
    Precision("float64", torch.float64),
    Precision("float32", torch.float32),
    Precision("bfloat16", torch.bfloat16),
    Precision("float16", torch.float16),
    Precision("float16 scaled", torch.float32, scaled=True),
)


class Make(Protocol):
    """Builds the optimizer under test."""

    def __call__(self, model: nn.Module, **overrides: Any) -> StructuredOptimizer:
        """Return an optimizer of the model, with some arguments replaced."""


class Run:
    """A model in training.

    Args:
        make: Builds the optimizer.
        situation: The course of training.
        precision: The dtypes of storage and computation.
        overrides: Arguments for `make`.
        seed: The seed of the model's initial weights. Default: 0.
    """

    def __init__(
        self,
        make: Make,
        situation: Situation,
        precision: Precision,
        overrides: Mapping[str, Any],
        seed: int = 0,
    ) -> None:
        self.situation, self.precision, self.done = situation, precision, 0
        torch.manual_seed(seed)
        self.model: nn.Module = situation.model().to(precision.dtype)
        if situation.added:
            later = tuple(f"{layer}." for layer in situation.added)
            named = self.model.named_parameters()
            overrides = {**overrides, "params": [p for n, p in named if not n.startswith(later)]}
        self.optimizer = make(self.model, **overrides)
        self.scaler = (
            GradScaler("cpu", init_scale=1024.0, growth_interval=5) if precision.scaled else None
        )

    # --- training --------------------------------------------------------------------------------

    def train_until(self, end: int) -> Self:
        """Make and check the steps up to `end`."""
        for step in range(self.done, end):
            self._add_groups(step)
            if step == _SLOWED_AT:
                for group in self.optimizer.param_groups:
                    group["lr"] *= 0.5
            self.situation.freeze(self.model, step)
            self.optimizer.zero_grad()
            self._backward(step)
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            before = Before(self, skipped=self.scaler is not None and step in _OVERFLOWS)
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
            before.check(self)
        self.done = end
        self._check_finite()
        return self

    def _add_groups(self, step: int) -> None:
        for layer, start in self.situation.added.items():
            if step == start:
                params = list(self.model.get_submodule(layer).parameters())
                self.optimizer.add_param_group({"params": params, "lr": 0.01})

    def _backward(self, step: int) -> None:
        parts = self.situation.micro_batches
        for part in range(parts):
            with torch.autocast("cpu", torch.float16, enabled=self.precision.scaled):
                loss = loss_of(self.model, step, part, self.precision.dtype) / parts
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                p.grad = torch.ones_like(p)  # stale, must not be used
            elif self.situation.lacks_gradient(name, step):
                p.grad = None
            elif self.scaler is not None and step in _OVERFLOWS and p.grad is not None:
                p.grad.fill_(torch.inf)

    def _check_finite(self) -> None:
        for name, p in self.model.named_parameters():
            assert p.isfinite().all(), f"{name} is not finite after {self.done} steps"
        for bucket in self.optimizer.buckets:
            for name, t in bucket.named_tensors().items():
                assert t.isfinite().all(), f"{name} is not finite after {self.done} steps"

    # --- copies ----------------------------------------------------------------------------------

    def with_copy(self, model: nn.Module, optimizer: Any, scaler: GradScaler | None) -> Run:
        """Return a run that continues from here with other objects."""
        run = object.__new__(Run)
        run.__dict__.update(self.__dict__, model=model, optimizer=optimizer, scaler=scaler)
        return run

    def save(self) -> io.BytesIO:
        """Write a checkpoint of model, optimizer and scaler."""
        file = io.BytesIO()
        parts = (self.model, self.optimizer, self.scaler)
        torch.save([None if part is None else part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO, done: int) -> Self:
        """Load a checkpoint that was written after `done` steps."""
        for step in range(done):
            self._add_groups(step)
        model, optimizer, scaler = torch.load(file, weights_only=True)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        if self.scaler is not None:
            self.scaler.load_state_dict(scaler)
        self.done = done
        return self

    def values(self) -> dict[str, Any]:
        """Return all values of a run: parameters, state, counters, scale."""
        optimizer = self.optimizer
        return {
            "model": self.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "counters": [optimizer.global_step, optimizer.batch_size, optimizer.skipped],
        }


class Before:
    """The values that a step must not change: gradients, and units that take no part.

    Args:
        run: The run, with gradients, before the step.
        skipped: Whether no unit takes part.
    """

    def __init__(self, run: Run, skipped: bool) -> None:
        named = list(run.model.named_parameters())
        units = [unit for bucket in run.optimizer.buckets for unit in bucket.units]
        units += [routed.unit for routed in run.optimizer.frozen_units]
        live = [not skipped and all(map(_is_live, unit.params)) for unit in units]
        pausing = [unit for unit, takes_part in zip(units, live, strict=True) if not takes_part]
        moving = {p for unit, m in zip(units, live, strict=True) if m for p in unit.params}
        self.grads = [(name, p, _copy(p.grad)) for name, p in named]
        self.params = [(name, p, p.detach().clone()) for name, p in named if p not in moving]
        self.states = [(unit, self._state(run, unit)) for unit in pausing]

    @staticmethod
    def _state(run: Run, unit: Unit) -> dict[str, Tensor]:
        entry = run.optimizer.state[unit.params[0]]
        return {name: t.clone() for name, t in entry.items() if name not in _SHARED}

    def check(self, run: Run) -> None:
        """Check the values after the step."""
        for name, p, grad in self.grads:
            if p.grad is None or grad is None:
                assert p.grad is grad, f"the gradient of {name} came or went in step()"
            else:
                assert same_bits(p.grad, grad), f"the gradient of {name} was changed by step()"
        for unit, state in self.states:
            difference = first_difference(self._state(run, unit), state)
            assert difference is None, f"{unit.label} took no part, but {difference}"
        for name, p, value in self.params:
            assert same_bits(p, value), f"{name} took no part, but moved"


def _is_live(p: Tensor) -> bool:
    return p.requires_grad and p.grad is not None


def _copy(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
