"""What happens during training: the size of updates, and the state of factors, per parameter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from structprecond.checks import check_count
from structprecond.core.boxes import is_dtensor
from structprecond.core.bucket import Bucket
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.errors import StructPrecondError
from structprecond.linalg.eigen import off_diagonal_ratio, rayleigh_quotients
from structprecond.structures.blockwise import BlockwiseMatrix
from structprecond.tables import lay_out

Log = Callable[[dict[str, float], int], object]
"""Takes the numbers of a watched step by name, and the number of the step, from 0."""


@dataclass(frozen=True)
class ParameterNumbers:
    """What a step did to one parameter.

    Args:
        name: Its name in the model.
        grad_norm: The Frobenius norm of its gradient; NaN without one.
        update_rms: The root mean square of its change, weight decay included.
        weight_rms: The root mean square of its entries before the step.
    """

    name: str
    grad_norm: float
    update_rms: float
    weight_rms: float

    @property
    def ratio(self) -> float:
        """The update as a part of the weight; NaN for a parameter of zeros."""
        return self.update_rms / self.weight_rms if self.weight_rms else float("nan")


@dataclass(frozen=True)
class UnitNumbers:
    r"""The state of one unit after a step.

    Args:
        name: The names of its parameters.
        updates: The number of its updates; the smallest one of its rows.
        skipped: The number of steps that it skipped because of its gradient.
        failed: The number of refreshes of its rows that failed.
        condition: The largest condition number of its factors, from the quotients
            \(\mathrm{diag}(Q^\top S Q)\) in the bases; infinite for a singular factor, NaN without
            bases.
        staleness: The largest distance of its bases from eigenbases,
            \(\|\mathrm{offdiag}(Q^\top S Q)\|_F / \|S\|_F\), from 0 to 1; NaN without bases.
    """

    name: str
    updates: int
    skipped: int
    failed: int
    condition: float
    staleness: float


@dataclass(frozen=True)
class Diagnosis:
    """The numbers of one step; print them for two tables.

    Args:
        step: The number of the step, from 0.
        seconds: The time of the step.
        parameters: One entry per parameter.
        units: One entry per unit that this rank updates.
    """

    step: int
    seconds: float
    parameters: tuple[ParameterNumbers, ...]
    units: tuple[UnitNumbers, ...]

    def as_dict(self) -> dict[str, float]:
        """Return all numbers that are not NaN, under names such as "update_rms/fc.weight".

        TensorBoard and other trackers show the names as one chart a parameter.
        """
        found = {"step_seconds": self.seconds}
        for one in self.parameters:
            values = {f.name: getattr(one, f.name) for f in fields(one)} | {"ratio": one.ratio}
            found |= {f"{key}/{one.name}": v for key, v in values.items() if key != "name"}
        for unit in self.units:
            values = {f.name: getattr(unit, f.name) for f in fields(unit)}
            found |= {f"{key}/{unit.name}": float(v) for key, v in values.items() if key != "name"}
        return {key: value for key, value in found.items() if value == value}

    def __str__(self) -> str:
        """Return a table of parameters and one of units."""
        table = [("parameter", "grad norm", "update rms", "weight rms", "update / weight")]
        for one in self.parameters:
            numbers = (one.grad_norm, one.update_rms, one.weight_rms, one.ratio)
            table.append((one.name, *map(_short, numbers)))  # type: ignore[arg-type]
        units: list[tuple[str, ...]] = [
            ("unit", "updates", "skipped", "failed", "condition", "staleness")
        ]
        for unit in self.units:
            counts = map(str, (unit.updates, unit.skipped, unit.failed))
            units.append((unit.name, *counts, _short(unit.condition), _short(unit.staleness)))
        title = f"step {self.step}: {1e3 * self.seconds:.1f} ms"
        return "\n".join([title, "", *lay_out(table), "", *lay_out(units)])


class Diagnostics:
    r"""Watches every n-th step of an optimizer: sizes of updates, condition of factors, counters.

    It hooks into `step`, so it works in trainers that make the steps themselves. A step that is not
    watched costs nothing. A watched one copies the parameters and compares them afterwards, takes
    three products for each factor with a basis, and waits once for the device.

    With parameters that are sharded over ranks, watch on all ranks: the sizes need all shards. The
    units are those that the rank owns.

    Args:
        optimizer: An optimizer of this library, or a SAM around one.
        every: The interval of watched steps, the first one included. Default: 50.
        log: Takes the numbers of a watched step as a dict, and the step's number:
            `lambda numbers, step: wandb.log(numbers, step)`, or `to_tensorboard(writer)`.
            Default: None.

    Raises:
        StructPrecondError: If the optimizer is not from this library.

    Example:
        >>> from structprecond import SOAP
        >>> model = nn.Linear(3, 2)
        >>> optimizer = SOAP(model)
        >>> with Diagnostics(optimizer, every=2) as watched:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.eye(3)).square().sum().backward()
        ...         optimizer.step()
        >>> watched.latest.step, [one.name for one in watched.latest.parameters]
        (2, ['weight', 'bias'])
    """

    def __init__(self, optimizer: Optimizer, *, every: int = 50, log: Log | None = None) -> None:
        own = getattr(optimizer, "base_optimizer", optimizer)
        if not isinstance(own, StructuredOptimizer):
            raise StructPrecondError(
                f"Diagnostics watches optimizers of this library, got a {type(own).__name__}. "
                "Build one, such as SOAP(model)."
            )
        check_count(every=every)
        if log is not None and not callable(log):
            raise StructPrecondError(
                f"log must be callable with a dict and a step, got {log!r}. For TensorBoard's "
                "writer, pass log=to_tensorboard(writer)."
            )
        self._latest: Diagnosis | None = None
        self._optimizer, self._every, self._log = own, every, log
        self._before: list[tuple[nn.Parameter, Tensor]] | None = None
        self._started = 0.0
        self._handles = [
            own.register_step_pre_hook(self._arrive),
            own.register_step_post_hook(self._leave),
        ]

    @property
    def latest(self) -> Diagnosis:
        """The numbers of the last watched step.

        Raises:
            StructPrecondError: If no step was watched yet.
        """
        if self._latest is None:
            raise StructPrecondError("No step was watched yet. Make a step first.")
        return self._latest

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _arrive(self, *_: Any) -> None:
        self._before = None
        if self._optimizer.global_step % self._every == 0:
            params = [p for group in self._optimizer.param_groups for p in group["params"]]
            self._before = [(p, p.detach().clone()) for p in params]
            self._started = self._now()

    @torch.no_grad()
    def _leave(self, *_: Any) -> None:
        if self._before is None:
            return
        seconds, own = self._now() - self._started, self._optimizer
        names = [own.name_of(p) for p, _ in self._before]
        sizes = torch.stack([_sizes(p, old) for p, old in self._before]).tolist()
        self._before = None
        self._latest = Diagnosis(
            own.global_step - 1,
            seconds,
            tuple(ParameterNumbers(n, *numbers) for n, numbers in zip(names, sizes, strict=True)),
            tuple(unit for bucket in own.buckets for unit in _units(bucket)),
        )
        if self._log is not None:
            self._log(self._latest.as_dict(), self._latest.step)

    def _now(self) -> float:
        """Return the time once the devices have done what they were told."""
        for device in {bucket.device for bucket in self._optimizer.buckets}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return time.perf_counter()


def to_tensorboard(writer: Any) -> Log:
    """Return a `log` for `Diagnostics` that writes scalars.

    Args:
        writer: A `torch.utils.tensorboard.SummaryWriter`, or another object with
            `add_scalar(name, value, step)`.
    """

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return log


def _sizes(p: nn.Parameter, old: Tensor) -> Tensor:
    """Return the norm of the gradient, and the root mean squares of update and weight `(3,)`."""
    grad = torch.full((), float("nan")) if p.grad is None else _norm(p.grad)
    root = max(p.numel(), 1) ** 0.5
    change = p.detach().to(_wide(p)) - old.to(_wide(p))
    # on the CPU, since parameters may lie on several devices
    return torch.stack([t.float().cpu() for t in (grad, _norm(change) / root, _norm(old) / root)])


def _norm(tensor: Tensor) -> Tensor:
    found: Any = torch.linalg.vector_norm(tensor.to(_wide(tensor)))
    whole: Tensor = found.full_tensor() if is_dtensor(found) else found
    return whole


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _units(bucket: Bucket) -> Iterator[UnitNumbers]:
    conditions, staleness = _of_bases(bucket)
    counters = bucket.counters
    for unit, span in zip(bucket.units, bucket.spans, strict=True):
        yield UnitNumbers(
            unit.label,
            int(counters.step[span].min()),
            int(counters.skipped[span].max()),
            int(counters.failed[span].sum()),
            float(conditions[span].max()),
            float(staleness[span].max()),
        )


def _of_bases(bucket: Bucket) -> tuple[Tensor, Tensor]:
    """Return the largest condition number and staleness of each row's factors, NaN without."""
    factors, bases = (getattr(bucket.state, name, ()) for name in ("factors", "bases"))
    found = []
    for S, Q in zip(factors, bases, strict=False):
        if not isinstance(S, BlockwiseMatrix) or not isinstance(Q, BlockwiseMatrix):
            continue
        for name, blocks in S.named_tensors().items():
            if not blocks.numel():  # no block of another size at the end
                continue
            basis = Q.named_tensors()[name]
            values = rayleigh_quotients(blocks, basis).abs()
            ratio = values.amax(-1) / values.amin(-1)
            each = torch.stack([ratio, off_diagonal_ratio(blocks, basis)])
            found.append(each.reshape(2, bucket.rows, -1).amax(-1))
    if not found:
        found = [torch.full((2, bucket.rows), float("nan"))]
    conditions, staleness = torch.stack(found).amax(0).cpu()
    return conditions, staleness


def _short(number: float) -> str:
    return "-" if number != number else f"{number:.3g}"
