"""The optimizer: the only step loop."""

from __future__ import annotations

import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from structprecond.core import checkpoint
from structprecond.core.batch_size import BatchSizeCounter, GetBatchSize
from structprecond.core.bucket import Bucket
from structprecond.core.build import check_rules, make_buckets, named_group
from structprecond.core.entry import Entry
from structprecond.core.finite import (
    unstable_units,
    with_large_gradient,
    with_nonfinite_gradient,
)
from structprecond.core.inspection import check_tensors, check_values
from structprecond.core.memory import keep_freed_memory
from structprecond.core.naming import unwrap
from structprecond.core.rounding import Rounding
from structprecond.core.routing import Routes, as_routing, check_names
from structprecond.core.schedule import take_turns
from structprecond.errors import (
    GradientError,
    HyperparameterError,
    StructPrecondError,
)
from structprecond.groups import PreconditionerGroup
from structprecond.linalg.precision import step_precision
from structprecond.structures.spec import PerAxis, StructureSpec

# what copies and pickles carry: no views, nothing that others put here
_COPIED = (
    "defaults",
    "param_groups",
    "model",
    "refresh",
    "nonfinite",
    "maximize",
    "rounding",
    "buckets",
    "_names",
    "_global_step",
    "_samples",
    "_counter",
    "_warned",
)
Nonfinite = Literal["skip", "raise", "ignore"]
Refresh = Literal["synchronous", "staggered"]

# keys of a param group that are no hyperparameters: torch's own, ours, and what users may add
_TORCH_KEYS = {"params", "param_names", "name", "initial_lr"}
_MOST_NAMES = 5
_CONFIGURATION = ("strategy", "structures", "preconditioner_dtypes", "combine_params")


class StructuredOptimizer(Optimizer):
    """An optimizer that runs a strategy over stacks of a model's parameters.

    Named optimizers such as `SIRFShampoo` are facades of this class. The user's `param_groups` stay
    as given. A param group may carry its own `strategy`, `structures`, `preconditioner_dtypes` and
    `combine_params` beside its hyperparameters.

    `optimizer.state[p]` shows the state of the unit whose first parameter is `p`, as views under
    stable names; it exists from construction on.

    With parameters on the CPU, an optimizer tells glibc to keep freed memory, in the whole process
    and for good, as soon as it is made, copied, unpickled or moved there. The environment variable
    `STRUCTPRECOND_KEEP_FREED_MEMORY=0` prevents that.

    Args:
        model: The model; or parameters, named parameters or group dicts, as torch optimizers take
            them, for rules that do not look at modules.
        params: The parameters to optimize, or group dicts. Default: all parameters of the model,
            the frozen ones included, which take part as soon as they are thawed.
        strategy: The rule that turns gradients into update directions; or a dict that gives each
            role (see `infer_roles`) or name pattern one, and a "default" one:
            `{"conv": SOAPStrategy(), "*.gate.weight": AdamWStrategy(), "default": MuonStrategy()}`.
            Patterns go before roles. A unit of several parameters goes where its first one goes.
        hyperparameters: Values for the strategy's hyperparameters; the rest get their defaults.
            Those of the default strategy have their own names, those of the others begin with the
            strategy's name (`adamw_betas`), and their learning rate is the group's lr times
            `adamw_lr_scale`, 1.0 by default.
        structures: The structure of every Kronecker factor: a name for all, or a dict from the
            order of a tensor to a name or a tuple of names. Default: `"dense"`.
        preconditioner_dtypes: The dtype of every Kronecker factor, given like `structures`; None
            for the dtype of the computation, float32, or float64 for float64 parameters.
        combine_params: The grouping rules, most important first. Default: what the strategies
            like best, which is each parameter by itself for most; experts that are routed by role
            are a stack.
        batch_size: The number of samples behind a gradient, or a callable from a forward's inputs
            to it; only for strategies that need it.
        refresh: When rows are refreshed that have the same interval: all in the same step
            ("synchronous", as published), or in turns ("staggered"), each still once per interval.
        nonfinite: What to do with a unit whose gradient is not finite, or is so large that state
            or parameters would no longer be: "skip" it (it stays as it is, and is counted),
            "raise" before anything is changed, or "ignore" the check.
        rounding: How parameters in bfloat16 or float16 are written back, after updates in float32:
            rounded to the "nearest", where updates below the last digit get lost; "stochastic", up
            or down at random, so that they count on average; or "kahan", where what rounding took
            is kept in the state, in the parameter's dtype, and added to the next update.
        maximize: Whether to maximize. Default: False.
        verbose_init: Whether to print what is treated how. Default: False.

    Attributes:
        global_step: The number of steps made.
        skipped: How often a unit was skipped for its gradient, see `nonfinite`.
        failed: How often a row kept its last basis or root because a decomposition failed.

    Raises:
        StructPrecondError: If an argument is wrong; the subclasses say which kind.

    Example:
        >>> from structprecond import SIRFShampooStrategy
        >>> model = nn.Linear(3, 2)
        >>> optimizer = StructuredOptimizer(model, strategy=SIRFShampooStrategy(), batch_size=8)
        >>> model(torch.ones(8, 3)).sum().backward()
        >>> optimizer.step()
    """

    STATE_ATTRIBUTES: tuple[str, ...] = ("global_step", "batch_size")
    """Attributes beside `state` that checkpoints carry."""

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        strategy: Routes,
        hyperparameters: Mapping[str, Any] | None = None,
        structures: StructureSpec = "dense",
        preconditioner_dtypes: PerAxis[torch.dtype | None] = None,
        combine_params: Sequence[PreconditionerGroup] | None = None,
        batch_size: int | GetBatchSize | None = None,
        refresh: Refresh = "synchronous",
        nonfinite: Nonfinite = "skip",
        rounding: Rounding = "nearest",
        maximize: bool = False,
        verbose_init: bool = False,
    ) -> None:
        if nonfinite not in ("skip", "raise", "ignore"):
            raise StructPrecondError(
                f"nonfinite must be 'skip', 'raise' or 'ignore', got {nonfinite!r}."
            )
        if isinstance(model, nn.Module):
            params = unwrap(model).named_parameters() if params is None else params
        elif params is not None:
            raise StructPrecondError(
                f"params= selects parameters of a model, but the first argument is a "
                f"{type(model).__name__}. Pass the model first, or the parameters alone."
            )
        self.model = model if isinstance(model, nn.Module) else None
        if not isinstance(maximize, bool):
            raise StructPrecondError(f"maximize must be True or False, got {maximize!r}.")
        if refresh not in ("synchronous", "staggered"):
            raise StructPrecondError(
                f"refresh must be 'synchronous' or 'staggered', got {refresh!r}."
            )
        if rounding not in get_args(Rounding):
            raise StructPrecondError(
                f"rounding must be 'nearest', 'stochastic' or 'kahan', got {rounding!r}."
            )
        self.refresh, self.nonfinite, self.maximize = refresh, nonfinite, maximize
        self.rounding = rounding
        self.buckets: list[Bucket] = []
        self._names: dict[nn.Parameter, str] = {}
        self._entries: dict[nn.Parameter, Entry] = {}
        self._global_step = torch.zeros((), dtype=torch.int64, device="cpu")
        self._samples = torch.zeros((), dtype=torch.int64, device="cpu")
        self._counter: BatchSizeCounter | None = None
        self._warned: set[str] = set()
        self._turns_for: tuple[Any, ...] = ()
        self._used_rules: set[str] = set()
        routing = as_routing(strategy)
        try:
            hyperparameters = dict(hyperparameters or {})
        except (TypeError, ValueError):
            raise StructPrecondError(
                f"hyperparameters is a dict from names to values, got {hyperparameters!r}."
            ) from None
        check_names(routing, set(hyperparameters))
        defaults = {
            **{name: h.default for name, h in routing.hyperparameters.items()},
            **hyperparameters,
            "strategy": strategy,
            "structures": structures,
            "preconditioner_dtypes": preconditioner_dtypes,
            "combine_params": combine_params,
        }
        _keep_the_compiler_out()
        super().__init__(model if params is None else params, defaults)  # type: ignore[arg-type]
        routing.check_used(self._used_rules)
        if batch_size is not None:
            self.batch_size = batch_size
        if verbose_init:
            from structprecond.report import describe

            print(describe(self))

    # --- parameters ------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, with its own hyperparameters and configuration if it has some.

        Raises:
            StructPrecondError: If the group is wrong; then nothing is added.
        """
        model = None if self.model is None else unwrap(self.model)
        group = named_group(model, param_group)
        usual = as_routing(self.defaults["strategy"])
        if isinstance(group.get("strategy"), str):
            group["strategy"] = usual.only(group["strategy"])
        routing = as_routing(group.get("strategy", usual))
        known = routing.hyperparameters
        given = set(group) & set(known)
        if unknown := set(group) - set(known) - set(_CONFIGURATION) - _TORCH_KEYS:
            raise HyperparameterError(
                f"Unknown keys {sorted(unknown)} in a param group of "
                f"{type(routing.main).__name__}. Its hyperparameters are "
                f"{', '.join(sorted(known))}."
            )
        for name, hyperparameter in known.items():
            # those of another strategy may share a name but not a meaning, except for lr
            shared = name == "lr" or name not in routing.main.hyperparameters
            shared = (shared or type(routing.main) is type(usual.main)) and name in self.defaults
            group.setdefault(name, self.defaults[name] if shared else hyperparameter.default)
        own_routing = "strategy" in group
        rules = group.setdefault("combine_params", self.defaults["combine_params"])
        group["combine_params"] = check_rules(rules)
        super().add_param_group(group)
        try:
            for name in set(group) - set(known) - set(_CONFIGURATION) - _TORCH_KEYS:
                del group[name]
            check_values(group)
            names = self._labels(group)
            buckets = make_buckets(model, group, routing, names, self.rounding)
            routing.check_read(given, [bucket.strategy for bucket in buckets])
            used = {rule for bucket in buckets for rule in bucket.rules}
            if own_routing:
                routing.check_used(used)
        except BaseException:
            self.param_groups.pop()
            raise
        self._used_rules |= used
        self._names |= names
        self.buckets += buckets
        for bucket in buckets:
            self._show(bucket)

    def _labels(self, group: Mapping[str, Any]) -> dict[nn.Parameter, str]:
        """Return the names of a param group's parameters, or their places in `param_groups`."""
        number, params = len(self.param_groups) - 1, group["params"]
        labels = group.get("param_names") or [
            f"param_groups[{number}]['params'][{i}]" for i in range(len(params))
        ]
        if len(labels) != len(params):
            raise StructPrecondError(
                f"A param group has {len(params)} parameters, but {len(labels)} param_names."
            )
        return dict(zip(params, labels, strict=True))

    def name_of(self, param: nn.Parameter) -> str:
        """Return the name of a parameter: the model's, or else its place in `param_groups`."""
        return self._names[param]

    def _show(self, bucket: Bucket) -> None:
        """Let `state` show the rows of a bucket, under the first parameter of each unit.

        The others show the counters alone: torch expects every parameter to have some state.
        """
        keep_freed_memory(bucket.device)
        shared = {"global_step": self._global_step, "batch_size": self._samples}
        for unit, tensors in zip(bucket.units, bucket.unit_tensors(), strict=True):
            for p in unit.params:
                own = tensors if p is unit.params[0] else {}
                self.state[p] = self._entries[p] = Entry(unit.label, own | shared)

    def _per_unit(self, part: Callable[[Any], tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Return a part of the state, a tuple of stacked matrices, for every unit."""
        return [
            tuple(
                None if m is None else m[span if unit.rule.stacked else span.start]
                for m in part(bucket.state)
            )
            for bucket in self.buckets
            for unit, span in zip(bucket.units, bucket.spans, strict=True)
        ]

    # --- counters --------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """The number of steps made."""
        return int(self._global_step)

    @property
    def skipped(self) -> int:
        """How often a unit was skipped because its gradient was not finite, or too large."""
        return sum(int(b.skipped[span.start]) for b in self.buckets for span in b.spans)

    @property
    def failed(self) -> int:
        """How often one of the tensors in `state` kept its last basis or inverse root.

        That happens where a matrix can be decomposed neither in float32 nor in float64. The next
        refresh tries again.
        """
        return sum(int(bucket.failed.sum()) for bucket in self.buckets)

    @property
    def batch_size(self) -> int | None:
        """The number of samples behind the gradients; None if it is not known.

        Assign an integer to fix it, or a callable on a forward's inputs to have it counted.
        """
        return (int(self._samples) if self._counter is None else self._counter.count) or None

    @batch_size.setter
    def batch_size(self, value: int | GetBatchSize) -> None:
        if callable(value):
            if self.model is None:
                raise StructPrecondError(
                    "The batch size is counted in the forward passes of the model, but the "
                    "optimizer was given parameters only. Pass the model as the first argument, "
                    "or batch_size= as an integer."
                )
            counter = BatchSizeCounter(value)
            counter.watch(self.model, self)
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            counter = None
            self._samples.fill_(value)
        else:
            raise HyperparameterError(
                f"batch_size must be an integer of at least 1, or a callable from the tuple of a "
                f"forward's inputs to one, got {value!r}."
            )
        if self._counter is not None:
            self._counter.close()
        self._counter = counter

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        self._watch()
        if self._counter is not None:
            self._counter.start_anew()

    # --- the step --------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step.

        Args:
            closure: Computes the loss and the gradients; called once, before anything else.

        Returns:
            What the closure returned.

        Raises:
            StructPrecondError: If a hyperparameter, a parameter or a gradient cannot be used, or
                with `nonfinite="raise"` a gradient is not finite or too large; nothing has been
                changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @step_precision()
    def _step(self) -> None:
        live = self._checked_live()
        batch_size = self._known_batch_size(live)
        grads: deque[Tensor] = deque()
        large: list[nn.Parameter] = []
        if self.nonfinite != "ignore":
            grads.extend(map(Bucket.gather, self.buckets, live))
            large = with_large_gradient(self.buckets, live, grads)
        if large:
            self._drop(live, with_nonfinite_gradient(large), "not finite")
        refresh = self._refresh_intervals()
        if large:
            unstable = self._unstable(live, large, grads, refresh, batch_size)
            self._drop(live, unstable, "too large to compute with")
        failed = [bucket.failed.clone() for bucket in self.buckets]
        for bucket, alive in zip(self.buckets, live, strict=True):
            bucket.step(
                alive,
                # held by nothing else, so that it is freed before the next bucket needs memory
                grads.popleft() if grads else bucket.gather(alive),
                *self._arguments(bucket, refresh, batch_size),
            )
        if all(bucket.inputs is None for bucket in self.buckets):
            self._count_step(batch_size)
        self._warn_of_failures(failed)

    def _checked_live(self) -> list[list[bool]]:
        """Check all that a step needs, and return for each bucket which units take part."""
        self._watch()
        for group in self.param_groups:
            check_values(group)
        live = [bucket.layout.live() for bucket in self.buckets]
        for bucket, alive in zip(self.buckets, live, strict=True):
            check_tensors(bucket, alive, self._names)
        self._follow()
        return live

    def _count_step(self, batch_size: int | None) -> None:
        self._global_step += 1
        self._samples.fill_(batch_size or 0)
        if self._counter is not None:
            self._counter.start_anew()

    def _follow(self) -> None:
        """Notice parameters that were moved and state entries that were replaced."""
        for bucket in self.buckets:
            devices = {p.device for p in bucket.params}
            if self.rounding != "nearest" and any(
                p.dtype != bucket.key.param_dtype for p in bucket.params
            ):
                raise StructPrecondError(
                    f"Parameters were converted from {bucket.key.param_dtype} after the optimizer "
                    f"was made, with rounding={self.rounding!r}: "
                    f"{_enumerate([self._names[p] for p in bucket.params])}. Convert the model "
                    "first, and then build the optimizer."
                )
            if devices != {bucket.device}:
                if len(devices) > 1:
                    raise StructPrecondError(
                        f"Parameters that are stacked together are on several devices: "
                        f"{', '.join(f'{self._names[p]} on {p.device}' for p in bucket.params)}. "
                        "Move the whole model, or build a new optimizer."
                    )
                bucket.move(devices.pop())
                self._show(bucket)
        if list(map(id, self.state.values())) == list(map(id, self._entries.values())):
            return
        for first, entry in self._entries.items():
            shown = self.state.get(first, {})
            if shown is not entry:
                entry.adopt(shown)
                self.state[first] = entry

    def _live_params(self, live: Sequence[Sequence[bool]]) -> list[nn.Parameter]:
        return [
            p
            for bucket, alive in zip(self.buckets, live, strict=True)
            for p in bucket.layout.live_params(alive)
        ]

    def _unstable(
        self,
        live: Sequence[Sequence[bool]],
        large: Sequence[nn.Parameter],
        grads: Sequence[Tensor],
        refresh: Mapping[int, int | bool],
        batch_size: int | None,
    ) -> list[nn.Parameter]:
        """Return the parameters of units with large gradients that would not stay finite."""
        known = {id(p) for p in large}
        found = []
        for bucket, alive, grad in zip(self.buckets, live, grads, strict=True):
            suspects = [
                on and any(id(p) in known for p in unit.params)
                for unit, on in zip(bucket.units, alive, strict=True)
            ]
            if any(suspects):
                args = self._arguments(bucket, refresh, batch_size)
                unstable = unstable_units(bucket, suspects, grad, *args)
                units = [unit for unit, bad in zip(bucket.units, unstable, strict=True) if bad]
                found += [p for unit in units for p in unit.params]
        return found

    def _drop(self, live: list[list[bool]], params: Sequence[nn.Parameter], problem: str) -> None:
        """Take the units of some parameters out of `live`."""
        if not params:
            return
        bad = {id(p) for p in params}
        labels = [self._names[p] for p in self._live_params(live) if id(p) in bad]
        message = f"The gradients of {_enumerate(labels)} are {problem} at step {self.global_step}"
        if self.nonfinite == "raise":
            raise GradientError(f"{message}; nothing was changed.")
        self._warn_once(
            "skipped",
            f"{message}. Their parameters and state stay as they are for this step; further "
            "steps are skipped without a warning and counted in optimizer.skipped.",
        )
        for bucket, alive in zip(self.buckets, live, strict=True):
            for i, unit in enumerate(bucket.units):
                if alive[i] and any(id(p) in bad for p in unit.params):
                    alive[i] = False
                    bucket.skipped[bucket.spans[i]] += 1

    def _warn_of_failures(self, before: Sequence[Tensor]) -> None:
        """Warn if the failures of any row are more than they were before."""
        labels = [
            unit.label
            for bucket, old in zip(self.buckets, before, strict=True)
            if not torch.equal(bucket.failed, old)
            for unit, span in zip(bucket.units, bucket.spans, strict=True)
            if not torch.equal(bucket.failed[span], old[span])
        ]
        if labels:
            self._warn_once(
                "failed",
                f"Matrices of {_enumerate(labels)} could not be decomposed at step "
                f"{self.global_step - 1}. They keep their last basis or inverse root until the "
                "next refresh; further failures are counted in optimizer.failed without a warning.",
            )

    def _warn_once(self, counter: str, message: str) -> None:
        if counter not in self._warned:
            self._warned.add(counter)
            warnings.warn(message, stacklevel=9)  # the line that calls `step`, through torch

    def _arguments(
        self, bucket: Bucket, refresh: Mapping[int, int | bool], batch_size: int | None
    ) -> tuple[Any, ...]:
        """Return what a bucket's step needs to know besides who is live, and the gradients."""
        return refresh[id(bucket)], self.global_step, batch_size, self.maximize

    def _known_batch_size(self, live: Sequence[Sequence[bool]]) -> int | None:
        if self.batch_size is None:
            for bucket, alive in zip(self.buckets, live, strict=True):
                if bucket.strategy.needs_batch_size and any(alive):
                    raise StructPrecondError(
                        f"{type(bucket.strategy).__name__} needs the batch size, but no gradient "
                        "flowed back through a forward pass of the model in training mode. Pass "
                        "batch_size= as an integer, or assign one to optimizer.batch_size."
                    )
        return self.batch_size

    def _refresh_intervals(self) -> dict[int, int | bool]:
        """Return every bucket's refresh interval, with callables asked once about this step."""
        answers: dict[int, int | bool] = {}
        asked: dict[int, bool] = {}
        for bucket in self.buckets:
            every = bucket.interval
            if callable(every):
                if id(every) not in asked:
                    asked[id(every)] = bool(every(self.global_step))
                every = asked[id(every)]
            answers[id(bucket)] = every
        if self.refresh == "staggered":
            key = tuple(answers.items())
            if key != self._turns_for:
                take_turns(self.buckets, answers)
                self._turns_for = key
        return answers

    # --- checkpoints and copies ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's layout: tensors (copies) and plain values only.

        The state of a unit stands under its first parameter. Callables, strategies, rules and
        structures are described, not saved.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = checkpoint.save(self)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            result = post_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, whole or not at all.

        State keeps the dtypes and devices it has here. Parameters are matched by name if both sides
        know names, else by order.

        Raises:
            CheckpointError: If it does not fit; the message lists what differs.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = pre_hook(self, state_dict)
            state_dict = state_dict if result is None else result
        samples = int(self._samples)
        checkpoint.load(self, state_dict)
        if self._counter is None:
            self._samples.fill_(samples)  # a batch size that is given here stays
        else:
            self._counter.count = int(self._samples)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles need: the stacks themselves, not hundreds of views."""
        return {key: self.__dict__[key] for key in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle."""
        fresh: dict[str, Any] = {
            "state": defaultdict(dict),
            "_entries": {},
            "_turns_for": (),
            "_used_rules": set(),
        }
        super().__setstate__({**state, **fresh})
        _keep_the_compiler_out()
        for bucket in self.buckets:
            self._show(bucket)
        self._watch()

    def _watch(self) -> None:
        """Let the counter of a copy watch the copy of the model, as soon as that is complete."""
        if self._counter is None or self.model is None or self._counter.watching:
            return
        if "_forward_hooks" in self.model.__dict__:
            self._counter.watch(self.model, self)


@cache
def _keep_the_compiler_out() -> None:
    """Let torch.compile leave steps to Python: their bookkeeping would be compiled every time.

    As a decorator it would import the compiler together with this module, which takes a second;
    torch does so itself when it makes an optimizer.
    """
    step = torch.compiler.disable(StructuredOptimizer._step)
    StructuredOptimizer._step = step  # type: ignore[method-assign]


def _enumerate(labels: Sequence[str]) -> str:
    """Name the first few."""
    rest = len(labels) - _MOST_NAMES
    return ", ".join(labels[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
