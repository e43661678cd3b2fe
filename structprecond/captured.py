"""Steps from a CUDA graph, where nothing has to be decided on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from structprecond.core.bucket import Inputs
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.state import ALL_ROWS
from structprecond.errors import StructPrecondError
from structprecond.linalg.precision import without_autocast
from structprecond.strategies.moments import all_alike


class CapturedStep:
    """Calls `optimizer.step()`, from a CUDA graph wherever it can: one launch for all kernels.

    A step is recorded when all that it does is known beforehand: every parameter has a gradient, no
    basis or root is refreshed (SIRF-Shampoo's refreshes, which are products alone, are recorded as
    well), no unit is at its first step, and the interval of refreshes is a number. Steps of another
    kind run as usual, in between. A step is recorded again, which takes longer than a plain step,
    when gradients stand elsewhere, or when the batch size or a hyperparameter other than `lr` has
    changed. `lr` and the number of the step are inputs of the graph.

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
        >>> step = CapturedStep(SOAP(model, nonfinite="ignore"))
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> step()  # the first one only initializes, so it runs as usual
        >>> step.replays
        0
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
        self._inputs: list[Inputs] = []
        # one graph for steps with a refresh, and one for those without
        self._graphs: dict[tuple[bool, ...], tuple[Any, Callable[[], None]]] = {}

    @without_autocast()
    def __call__(self) -> None:
        """Make one step.

        Raises:
            StructPrecondError: As `optimizer.step()`, or if parameters are not on one CUDA device.
        """
        optimizer = self.optimizer
        live = optimizer._checked_live()
        due = self._due(live)
        kind = None if due is None else self._kind()
        if due is None or kind is None:
            optimizer.step()
            return
        self._write_inputs()
        known, replay = self._graphs.get(due, (None, None))
        if replay is None or known != kind:
            self._graphs.pop(due, None)
            replay = self._record_step()
            self._graphs[due] = kind, replay
        for bucket in optimizer.buckets:
            bucket.count(ALL_ROWS)
        optimizer._count_step(optimizer.batch_size)
        replay()
        self.replays += 1

    def _due(self, live: Sequence[Sequence[bool]]) -> tuple[bool, ...] | None:
        """Return which buckets are refreshed; None if something has to be decided on the way."""
        optimizer = self.optimizer
        if any(callable(bucket.interval) for bucket in optimizer.buckets):
            return None
        intervals = optimizer._refresh_intervals()
        answers = []
        for bucket, alive in zip(optimizer.buckets, live, strict=True):
            if not all(alive) or not bool(bucket.begun.all()) or bool(bucket.overdue.any()):
                return None
            due = bucket.due(bucket.layout.live_rows(alive), intervals[id(bucket)])
            if bool(due.any()) and (bucket.strategy.refresh_waits or not bool(due.all())):
                return None
            answers.append(bool(due.any()))
        return tuple(answers)

    def _kind(self) -> Any:
        """Return all else that a recorded step depends on but its inputs; None if unknown."""
        places, values = [], []
        for bucket in self.optimizer.buckets:
            grads = [p.grad for p in bucket.params if p.grad is not None]
            tensors = [*bucket.params, *grads, *bucket.state.named_tensors().values()]
            places += [(t.data_ptr(), t.stride(), t.dtype, t.device) for t in tensors]
            hp = bucket.hyperparameters
            for name in bucket.strategy.hyperparameters:
                value = hp[name]
                if isinstance(value, torch.Tensor) and name != "lr":
                    if value.device.type != "cpu":
                        return None
                    value = value.tolist()
                values.append(None if name == "lr" else value)
        strategies = [bucket.strategy for bucket in self.optimizer.buckets]
        return places, values, strategies, self.optimizer.batch_size, self.optimizer.maximize

    def _write_inputs(self) -> None:
        """Write what differs from replay to replay where the graphs read it."""
        buckets = self.optimizer.buckets
        if [inputs.lr.device for inputs in self._inputs] != [bucket.device for bucket in buckets]:
            self._graphs.clear()
            self._inputs = [
                Inputs(
                    torch.empty(bucket.rows, dtype=torch.float64, device=bucket.device),
                    torch.empty((), dtype=bucket.dtype, device=bucket.device),
                )
                for bucket in buckets
            ]
        for bucket, inputs in zip(buckets, self._inputs, strict=True):
            lr = bucket.hyperparameters["lr"]
            # numbers are arguments of kernels; copies from the host would wait for the device
            if isinstance(lr, torch.Tensor):
                inputs.lr.copy_(lr)
            else:
                inputs.lr.fill_(lr)
            if all_alike(bucket.steps):
                inputs.steps.fill_(int(bucket.steps[0]))
            else:
                inputs.steps.copy_(bucket.steps)

    def _record_step(self) -> Callable[[], None]:
        """Record a step, which changes nothing."""
        for bucket, inputs in zip(self.optimizer.buckets, self._inputs, strict=True):
            bucket.inputs = inputs
        try:
            return _record(self.optimizer)
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
