"""Steps from a CUDA graph, where nothing has to be decided on the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from structprecond.core.bucket import Bucket, Inputs
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.errors import StructPrecondError


class CapturedStep:
    """Calls `optimizer.step()`, from a CUDA graph wherever it can: one launch for all kernels.

    A step is recorded when all that it does is known beforehand: every parameter has a gradient, no
    basis or root is refreshed (SIRF-Shampoo's refreshes, which are products alone, are recorded as
    well), and no unit is at its first step. Steps of another kind run as usual, in between. A step
    is recorded again when gradients stand elsewhere, or when a hyperparameter other than `lr` or
    the batch size has changed. `lr` and the number of the step are inputs of the graph.

    Gradients have to stay where they are: call `optimizer.zero_grad(set_to_none=False)`. Whether
    they are finite is not asked, since the answer would stall the device: clip them before. Hooks
    of the optimizer run when a step is recorded, not when it is replayed. Not yet run on a GPU.

    Args:
        optimizer: The optimizer, made with `nonfinite="ignore"`, of parameters on one CUDA device.

    Attributes:
        replays: How many steps were replayed.

    Raises:
        StructPrecondError: If the optimizer is another one, or looks at gradients.

    Example:
        >>> from structprecond import SOAP
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = SOAP(model, nonfinite="ignore")
        >>> if torch.cuda.is_available():
        ...     step = CapturedStep(SOAP(model.cuda(), nonfinite="ignore"))
        ...     model(torch.ones(8, 4, device="cuda")).square().mean().backward()
        ...     step()
    """

    def __init__(self, optimizer: StructuredOptimizer) -> None:
        if not isinstance(optimizer, StructuredOptimizer):
            raise StructPrecondError(
                f"CapturedStep takes an optimizer of this library, got {optimizer!r}."
            )
        if optimizer.nonfinite != "ignore":
            raise StructPrecondError(
                f"nonfinite={optimizer.nonfinite!r} looks at gradients, for which a graph cannot "
                'wait. Build the optimizer with nonfinite="ignore".'
            )
        self.optimizer = optimizer
        self.replays = 0
        self._inputs: dict[int, Inputs] = {}
        self._recorded: Any = None
        self._replay: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        """Make one step.

        Raises:
            StructPrecondError: As `optimizer.step()`, or if parameters are not on one CUDA device.
        """
        optimizer = self.optimizer
        kind = self._kind()
        if kind is None:
            optimizer.step()
            return
        for bucket in optimizer.buckets:
            self._write_inputs(bucket)
        if kind == self._recorded:
            optimizer.count_step()
        else:
            self._recorded = None
            self._record_step()
            self._recorded = kind
        self._replay()
        self.replays += 1

    @torch.no_grad()
    def _kind(self) -> Any:
        """Return all that a recorded step depends on but its inputs; None if it cannot be."""
        optimizer = self.optimizer
        optimizer.look()
        if any(callable(bucket.interval) for bucket in optimizer.buckets):
            return None
        intervals = optimizer.refresh_intervals()
        kinds = []
        for bucket in optimizer.buckets:
            live = bucket.layout.live()
            if not all(live) or not bool(bucket.begun.all()) or bool(bucket.overdue.any()):
                return None
            due = bucket.due(bucket.layout.live_rows(live), intervals[id(bucket)])
            if bool(due.any()) and (bucket.strategy.refresh_waits or not bool(due.all())):
                return None
            places = [
                (p.data_ptr(), p.grad.data_ptr()) for p in bucket.params if p.grad is not None
            ]
            hp = bucket.hyperparameters
            values = [
                id(value) if isinstance(value, torch.Tensor) else value
                for value in (hp[name] for name in bucket.strategy.hyperparameters if name != "lr")
            ]
            kinds.append((bool(due.any()), bucket.strategy, places, values))
        return kinds, optimizer.batch_size, optimizer.maximize

    def _write_inputs(self, bucket: Bucket) -> None:
        """Write what differs from replay to replay where the graph reads it."""
        if id(bucket) not in self._inputs:
            self._inputs[id(bucket)] = Inputs(
                torch.empty(bucket.rows, dtype=torch.float64, device=bucket.device),
                torch.empty((), dtype=bucket.dtype, device=bucket.device),
            )
        inputs = self._inputs[id(bucket)]
        inputs.steps.copy_(bucket.steps)
        lr = bucket.hyperparameters["lr"]
        # a number becomes an argument of a kernel, a tensor may be on the device
        inputs.lr.copy_(lr) if isinstance(lr, torch.Tensor) else inputs.lr.fill_(lr)

    def _record_step(self) -> None:
        """Record a step, which counts it on the host and leaves the device to the replay."""
        for bucket in self.optimizer.buckets:
            bucket.inputs = self._inputs[id(bucket)]
        try:
            self._replay = _record(self.optimizer)
        finally:
            for bucket in self.optimizer.buckets:
                bucket.inputs = None


def _record(optimizer: StructuredOptimizer) -> Callable[[], None]:
    """Record a step as a graph; return what replays it."""
    devices = {bucket.device for bucket in optimizer.buckets}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise StructPrecondError(
            f"CUDA graphs are recorded on one CUDA device, but parameters are on "
            f"{', '.join(sorted(map(str, devices)))}. Call optimizer.step() there."
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(devices.pop()), torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay
