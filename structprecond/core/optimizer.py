"""The optimizer: torch's interface around the steps of buckets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import nn

from structprecond.core import options, param_groups
from structprecond.core.agreement import facts_of
from structprecond.core.assembly import Assembly
from structprecond.core.batch_size import GetBatchSize, Samples
from structprecond.core.bucket import Bucket
from structprecond.core.build import RoutedUnit
from structprecond.core.chosen_policies import Policies, as_policies
from structprecond.core.compiler import leave_to_python
from structprecond.core.costs import too_high
from structprecond.core.decay import as_rules
from structprecond.core.entry import Entries
from structprecond.core.inspection import check_batch_size, check_values
from structprecond.core.naming import unwrap
from structprecond.core.options import Nonfinite, Refresh
from structprecond.core.ranks import Mesh
from structprecond.core.refresh import RefreshSchedule, warning_of_failures
from structprecond.core.report import describe
from structprecond.core.resumable import Resumable
from structprecond.core.rounding import Rounding
from structprecond.core.routing import Routes, UserRoutes, as_routing, settle, with_defaults
from structprecond.core.step import Plan
from structprecond.core.team import Alone
from structprecond.core.teams import apart
from structprecond.core.updates import all_or_nothing
from structprecond.core.warn import warn_once
from structprecond.groups import PreconditionerGroup
from structprecond.linalg.precision import step_precision
from structprecond.structures.spec import PerAxis, StructureSpec

# the attributes that copies and pickles keep: no views, nothing that other code adds
_COPIED = (
    "defaults param_groups model refresh nonfinite maximize rounding _global_step _samples "
    "_warned _assembly"
).split()


class StructuredOptimizer(options.SharedKeywords, Resumable):
    """An optimizer that runs a strategy over stacks of a model's parameters.

    Named optimizers such as `SIRFShampoo` are facades of this class. `param_groups` stay as given.
    A param group may have its own `strategy`, `structures`, `preconditioner_dtypes`,
    `combine_params`, `no_decay` and `policies` besides its hyperparameters.

    `optimizer.state[p]` shows the state of the unit whose first parameter is `p`, as views under
    stable names. It exists from construction on. Where rows have owners, it shows the rows that
    this rank owns, which may be none; `state_dict` returns those of all ranks.

    An optimizer with parameters on the CPU makes glibc keep freed memory, in the whole process and
    permanently. The environment variable `STRUCTPRECOND_KEEP_FREED_MEMORY=0` prevents that.

    Args:
        model: The model. Parameters, named parameters or group dicts, as for torch's optimizers,
            also work with groupings that need no modules.
        params: The parameters to optimize, or group dicts. Default: all parameters of the model.
            Frozen ones take part once they are thawed.
        strategy: The strategy for all units; or a dict from roles (see `infer_roles`) and name
            patterns to strategies, with a "default":
            `{"conv": SOAPStrategy(), "*.gate.weight": "adamw", "default": "muon"}`. A name such as
            "adamw" stands for the strategy with its defaults, here `AdamWStrategy()`. Patterns take
            precedence over roles. A unit follows the route of its first parameter.
        hyperparameters: Values of hyperparameters; the others get their defaults. The default
            strategy's have their own names, those of the others are prefixed with the strategy's
            name (`adamw_betas`). A strategy's learning rate is the group's lr times its
            `adamw_lr_scale`, 1.0 by default. A given `weight_decay` is that of all strategies.
        batch_size: The number of samples behind a gradient, or a callable that returns it for a
            forward's inputs; only for strategies that need it.

    Attributes:
        global_step: The number of steps made.
        skipped: The number of times a unit was skipped because of its gradient, see `nonfinite`.
        failed: The number of times a failed decomposition left a row its last basis or root.

    Example:
        >>> from structprecond import SIRFShampooStrategy
        >>> model = nn.Linear(3, 2)
        >>> optimizer = StructuredOptimizer(model, strategy=SIRFShampooStrategy(), batch_size=8)
        >>> model(torch.ones(8, 3)).sum().backward()
        >>> optimizer.step()
    """

    # what checkpoints hold beside `state`
    STATE_ATTRIBUTES: tuple[str, ...] = ("global_step", "batch_size")

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        params: Iterable[Any] | None = None,
        *,
        strategy: Routes,
        routes: UserRoutes | None = None,
        no_decay: Sequence[str] = (),
        hyperparameters: Mapping[str, Any] | None = None,
        batch_size: int | GetBatchSize | None = None,
        structures: StructureSpec = "auto",
        preconditioner_dtypes: PerAxis[torch.dtype | None] = None,
        combine_params: Sequence[PreconditionerGroup] | None = None,
        policies: Policies | None = None,
        refresh: Refresh = "synchronous",
        nonfinite: Nonfinite = "skip",
        rounding: Rounding = "nearest",
        maximize: bool = False,
        verbose_init: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        options.check_values(nonfinite, refresh, rounding, maximize, verbose_init)
        given = param_groups.parameters_of(model, params, type(self).__name__)
        self.model = model if isinstance(model, nn.Module) else None
        self.refresh, self.nonfinite, self.maximize = refresh, nonfinite, maximize
        self.rounding = rounding
        self._global_step = torch.zeros((), dtype=torch.int64, device="cpu")
        self._samples = Samples(self.model)
        self._warned: set[str] = set()
        self._assembly = Assembly(self.model, mesh, rounding)
        self._start_anew()
        settled = settle(strategy, routes)
        routing = as_routing(settled)
        defaults = {
            **with_defaults(routing, hyperparameters),
            "strategy": settled,
            "structures": structures,
            "preconditioner_dtypes": preconditioner_dtypes,
            "combine_params": combine_params,
            "no_decay": as_rules(no_decay),
            "policies": as_policies(policies),
        }
        leave_to_python(StructuredOptimizer, "_step")
        super().__init__(given, defaults)
        made = self._assembly
        param_groups.check_rules(self.defaults, made.rules, made.names)
        warn_once(self._warned, "expensive", too_high(self.buckets))
        if batch_size is not None:
            self.batch_size = batch_size
        if verbose_init and self.team.speaks:
            print(describe(self))

    def _start_anew(self) -> None:
        """Make the attributes that copies and pickles do not keep."""
        self._schedule = RefreshSchedule(self.refresh == "staggered")
        self._entries = Entries(global_step=self._global_step, batch_size=self._samples.shown)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, optionally with its own hyperparameters and configuration.

        Raises:
            StructPrecondError: If the group is wrong; then nothing is added.
        """
        self._follow(quiet=True)
        model = None if self.model is None else unwrap(self.model)
        new = param_groups.NewGroup(model, param_group, self.defaults, type(self))
        super().add_param_group(new.group)
        try:
            new.drop_unread()
            check_values(new.group)
            made = self._assembly.make(self.param_groups, self.global_step)
            new.check(made.units, made.names)
            self._assembly.follower.add(self.model, new.group)
        except BaseException:
            self.param_groups.pop()
            raise
        self._assembly.use(made, self._entries, self.state)
        warn_once(self._warned, "keys", new.misspelt)
        if model is None:
            warn_once(self._warned, "roles", new.roles_in_doubt(made.units))

    @property
    def buckets(self) -> list[Bucket]:
        """The stacks of units that this process updates."""
        return self._assembly.buckets

    @property
    def frozen_units(self) -> list[RoutedUnit]:
        """The units that have no state so far, as none of their parameters requires a gradient."""
        return self._assembly.frozen

    @property
    def team(self) -> Alone:
        """The team that trains the parameters."""
        return self._assembly.team

    def name_of(self, param: nn.Parameter) -> str:
        """Return the name of a parameter in the model, or else its place in `param_groups`."""
        return self._assembly.names[param]

    # --- counters --------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """The number of steps made."""
        return int(self._global_step)

    @property
    def skipped(self) -> int:
        """The number of times a unit was skipped for a non-finite or too large gradient.

        If rows have owners, only those of this rank count: reading an attribute does not wait for
        other ranks. Sum over the ranks of one replica for all. A unit whose rows have several
        owners counts at that of its first row.
        """
        return sum(
            int(bucket.counters.skipped[span.start])
            for bucket in self.buckets
            for unit, span in zip(bucket.units, bucket.spans, strict=True)
            if unit.row_numbers is None or unit.row_numbers[0] == 0
        )

    @property
    def failed(self) -> int:
        """The number of times a row kept its last basis or root, as decompositions failed.

        If rows have owners, only those of this rank count, as in `skipped`.
        """
        return sum(int(bucket.counters.failed.sum()) for bucket in self.buckets)

    @property
    def batch_size(self) -> int | None:
        """The number of samples behind the gradients, counted on this rank or given for all ranks.

        None if it is unknown.

        Assign an integer to fix it, or a callable on a forward's inputs to count it.
        """
        return self._samples.count

    @batch_size.setter
    def batch_size(self, value: int | GetBatchSize) -> None:
        self._samples.assign(value, self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad`."""
        self._follow(quiet=True)
        super().zero_grad(set_to_none)
        self._samples.watch(self)
        self._samples.clear()

    # --- the step --------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make one step; return the return value of the closure.

        Args:
            closure: Computes the loss and the gradients; called once, at the start.

        Raises:
            StructPrecondError: If a hyperparameter, a parameter, a gradient or what a hook returns
                is invalid, or a gradient is not finite or too large with `nonfinite="raise"`.
                Nothing is changed, nor by an error that a hook or your own strategy raises.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @step_precision()
    def _step(self) -> None:
        # given last: as errors, warnings on one rank would break a step that others make
        warnings: dict[str, str | None] = {}
        if self.global_step == 0 or not self.team.has_met:
            self._assembly.meet(self._follow)
            counts = self._samples.counts
            warnings["apart"] = apart(self.team, self.model, self.rounding, counts)
        try:
            with self.team.step(self.buckets):
                plans = self.plan()
                idle = self._assembly.follower.idle([plan.live for plan in plans])
                warnings["idle"] = idle
                self.team.arrive(self.buckets)
                with all_or_nothing(plans) as updates:
                    note = partial(warnings.__setitem__, "skipped")
                    prepare = partial(updates.prepare, self.nonfinite, note, self.team.exclude)
                    self.team.confirm(prepare, plans, self.nonfinite == "raise")
                    failed = updates.apply(self.team.moved)
            warnings["failed"] = warning_of_failures(failed, self.global_step)
            self.count_step()
        finally:
            for kind, message in warnings.items():
                warn_once(self._warned, kind, message)

    def plan(self) -> list[Plan]:
        """Check all inputs of a step, or raise; return its plan for each bucket."""
        facts = partial(facts_of, self.param_groups, self._global_step)
        with self._assembly.thawing(self._entries, self.state):
            samples, schedule = self._samples, self._schedule
            return self.team.agree(self._plan, facts, samples, schedule, self.nonfinite)

    def _plan(self) -> list[Plan]:
        """Check this rank's inputs; return its plan."""
        self._samples.watch(self)
        self._follow()
        self._assembly.follower.check_groups()
        self._thaw(lambda routed: not routed.frozen)
        live = self.team.check(self.param_groups, self.buckets, self._assembly.names)
        self._entries.follow(self.buckets, self.state, self._assembly.names)
        step, batch_size = self.global_step, self.batch_size
        check_batch_size(batch_size, self.buckets, live)
        intervals = self.team.intervals(self._schedule, self.buckets, step)
        return [
            Plan(bucket, alive, every, step, batch_size, self.maximize)
            for bucket, alive, every in zip(self.buckets, live, intervals, strict=True)
        ]

    def _thaw(self, thawed: Callable[[RoutedUnit], bool]) -> None:
        """Give state to frozen units that need it."""
        self._assembly.thaw(thawed, self._entries, self.state)

    def _follow(self, quiet: bool = False) -> None:
        """Follow changes of `param_groups` and of the model; refuse others, or wait if `quiet`."""
        shown = (self._entries, self.state)
        self._assembly.follow(self.param_groups, self.global_step, *shown, quiet)

    def count_step(self) -> None:
        """Count a step after its plans were applied."""
        self._samples.use()
        self._global_step += 1

    # --- copies ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the stacks themselves for copies and pickles, not hundreds of views."""
        return {key: self.__dict__[key] for key in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle."""
        super().__setstate__({**state, "state": defaultdict(dict)})
        leave_to_python(StructuredOptimizer, "_step")
        self._start_anew()
        self._assembly.show(self._entries, self.state)
        self._samples.watch(self)
