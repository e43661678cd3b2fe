"""Replays steps from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from structprecond.core.optimizer import StructuredOptimizer
from structprecond.core.step import Plan, Recorded
from structprecond.core.team import Replicas
from structprecond.errors import StructPrecondError
from structprecond.linalg.precision import step_precision, without_autocast


class CapturedStep:
    """Replays `optimizer.step()` from a CUDA graph where possible: one launch for all kernels.

    A step is captured if it needs no decision on the host: every parameter has a gradient, no unit
    is at its first step, the refresh interval is a number, and no matrix is decomposed.
    (SIRF-Shampoo's refreshes are captured: they only multiply.) All other steps run as usual. A
    step is captured again, which takes longer than a plain step, if gradients have moved in memory
    or if the batch size or a hyperparameter other than `lr` has changed. `lr` and the step number
    are inputs of the graph.

    Gradients must stay in place: call `optimizer.zero_grad(set_to_none=False)`. They are not
    checked for infinities, which would need a host-device sync: clip them first. The optimizer's
    hooks do not run around replayed steps. Not yet run on a GPU.

    Args:
        optimizer: An optimizer with `nonfinite="ignore"` and all parameters on one CUDA device.

    Attributes:
        replays: The number of replayed steps.

    Raises:
        StructPrecondError: If the optimizer is not from this library, checks gradients, or makes
            its steps together with other ranks.

    Example:
        >>> from structprecond import SOAP
        >>> model = torch.nn.Linear(4, 2)
        >>> step = CapturedStep(SOAP(model, nonfinite="ignore"))
        >>> model(torch.ones(8, 4)).square().mean().backward()
        >>> step()  # the first step only initializes, so it is not captured
        >>> step.replays
        0
    """

    def __init__(self, optimizer: StructuredOptimizer) -> None:
        if not isinstance(optimizer, StructuredOptimizer):
            raise StructPrecondError(
                f"CapturedStep takes an optimizer of this library, got {optimizer!r}. Build one, "
                "such as SOAP(model)."
            )
        if optimizer.nonfinite != "ignore":
            raise StructPrecondError(
                f"nonfinite={optimizer.nonfinite!r} checks gradients on the host, but a graph "
                'cannot wait. Build the optimizer with nonfinite="ignore".'
            )
        self.optimizer = optimizer
        self._check_team()
        self.replays = 0
        self._inputs: list[Recorded] = []
        # one graph for steps with a refresh, and one for those without
        self._graphs: dict[tuple[bool, ...], tuple[Any, Callable[[], None]]] = {}

    @without_autocast()
    def __call__(self) -> None:
        """Make one step.

        Raises:
            StructPrecondError: As `optimizer.step()`, or if parameters are not on one CUDA device,
                or on several ranks by now.
        """
        self._check_team()
        # a callable interval is called in every step, which a graph cannot do
        if any(callable(bucket.interval) for bucket in self.optimizer.buckets):
            self.optimizer.step()
            return
        plans = self.optimizer.plan()
        due = self._due(plans)
        kind = None if due is None else self._kind(plans)
        if due is None or kind is None:
            self.optimizer.step()
            return
        self._write_inputs(plans)
        known, replay = self._graphs.get(due, (None, None))
        if replay is None or known != kind:
            self._graphs.pop(due, None)
            replay = _record(plans)
            self._graphs[due] = kind, replay
        for plan in plans:
            plan.count(plan.bucket.layout.live_rows(plan.live))
        self.optimizer.count_step()
        replay()
        self.replays += 1

    def _check_team(self) -> None:
        """Raise `StructPrecondError` if other ranks take part in a step, which a graph cannot ask.

        The model may have been sharded after the optimizer was built.
        """
        self.optimizer._follow(quiet=True)
        team = self.optimizer.team
        if isinstance(team, Replicas):
            raise StructPrecondError(
                f"CapturedStep replays the steps of one process, but {team.agreement.ranks.size} "
                "ranks make those of this optimizer together. Call optimizer.step() on all of them."
            )

    def _due(self, plans: Sequence[Plan]) -> tuple[bool, ...] | None:
        """Return which buckets are refreshed; None if the step cannot be captured."""
        answers = []
        for plan in plans:
            bucket, counters = plan.bucket, plan.bucket.counters
            ready = all(plan.live) and bool(counters.initialized.all())
            if not ready or bool(counters.overdue.any()):
                return None
            due = plan.due()
            # a bucket that has not been refreshed yet may decompose matrices
            waits = bucket.refresh_decomposes is not False or not bool(due.all())
            if bool(due.any()) and waits:
                return None
            answers.append(bool(due.any()))
        return tuple(answers)

    def _kind(self, plans: Sequence[Plan]) -> Any:
        """Return what a captured step depends on besides its inputs; None if unknown."""
        places, values = [], []
        for plan in plans:
            bucket = plan.bucket
            grads = [p.grad for p in bucket.params if p.grad is not None]
            tensors = [*bucket.params, *grads, *bucket.state.named_tensors().values()]
            places += [(t.data_ptr(), t.stride(), t.dtype, t.device) for t in tensors]
            for name, value in bucket.hyperparameters.items():
                if isinstance(value, torch.Tensor) and name != "lr":
                    if value.device.type != "cpu":
                        return None
                    value = value.tolist()
                values.append(None if name == "lr" else value)
        strategies = [plan.bucket.strategy for plan in plans]
        return places, values, strategies, self.optimizer.batch_size, self.optimizer.maximize

    def _write_inputs(self, plans: Sequence[Plan]) -> None:
        """Write the inputs of the graphs."""
        sizes = [(plan.bucket.rows, plan.bucket.device) for plan in plans]
        if [(len(r.t), r.lr.device) for r in self._inputs] != sizes:
            self._graphs.clear()
            self._inputs = [
                Recorded(
                    torch.empty(p.bucket.rows, dtype=torch.float64, device=p.bucket.device),
                    torch.empty((), dtype=p.bucket.dtype, device=p.bucket.device),
                    torch.empty(p.bucket.rows, dtype=torch.int64, device=p.bucket.device),
                )
                for p in plans
            ]
        for plan, recorded in zip(plans, self._inputs, strict=True):
            plan.recorded = recorded
            lr, t = plan.bucket.hyperparameters["lr"], plan.bucket.counters.step + 1
            if plan.bucket.rounding == "stochastic":
                recorded.seeds.copy_(plan.bucket.counters.seed)
            # numbers are kernel arguments; copies from the host would sync
            if isinstance(lr, torch.Tensor):
                recorded.lr.copy_(lr)
            else:
                recorded.lr.fill_(lr)
            if bool((t == t[0]).all()):
                recorded.t.fill_(int(t[0]))
            else:
                recorded.t.copy_(t)


def _record(plans: Sequence[Plan]) -> Callable[[], None]:
    """Capture a step without running it; return the function that replays it."""
    devices = {plan.bucket.device for plan in plans}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        raise StructPrecondError(
            f"CapturedStep needs all parameters on one CUDA device, but they are on "
            f"{', '.join(sorted(map(str, devices)))}. Call optimizer.step() instead."
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(devices.pop()), torch.cuda.graph(graph):
        apply_all(plans)
    return graph.replay


@torch.no_grad()
@step_precision()
def apply_all(plans: Sequence[Plan]) -> None:
    """Apply the plans of all buckets."""
    for plan in plans:
        plan.apply()
