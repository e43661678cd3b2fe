"""The optimizer: torch's interface around the steps of buckets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from structprecond.core import checkpoint, options, param_groups
from structprecond.core.agreement import facts_of
from structprecond.core.batch_size import GetBatchSize, Samples
from structprecond.core.bucket import Bucket
from structprecond.core.build import RoutedUnit, route_units, thaw
from structprecond.core.compiler import leave_to_python
from structprecond.core.costs import too_high
from structprecond.core.decay import as_rules
from structprecond.core.entry import Entries
from structprecond.core.follow import Follower
from structprecond.core.inspection import check_batch_size, check_values
from structprecond.core.naming import unwrap
from structprecond.core.options import Nonfinite, Refresh
from structprecond.core.ranks import Mesh
from structprecond.core.refresh import RefreshSchedule, warning_of_failures
from structprecond.core.report import describe
from structprecond.core.rounding import Rounding
from structprecond.core.routing import Routes, UserRoutes, as_routing, settle, with_defaults
from structprecond.core.step import Plan
from structprecond.core.team import Alone
from structprecond.core.teams import find_team
from structprecond.core.updates import all_or_nothing
from structprecond.core.warn import warn_once
from structprecond.groups import PreconditionerGroup
from structprecond.linalg.precision import step_precision
from structprecond.structures.spec import PerAxis, StructureSpec

# the attributes that copies and pickles keep: no views, nothing that other code adds
_COPIED = (
    "defaults param_groups model refresh nonfinite maximize rounding buckets frozen_units "
    "_names _global_step _samples _warned _follower _mesh team"
).split()


class StructuredOptimizer(options.SharedKeywords, Optimizer):
    """An optimizer that runs a strategy over stacks of a model's parameters.

    Named optimizers such as `SIRFShampoo` are facades of this class. `param_groups` stay as given.
    A param group may have its own `strategy`, `structures`, `preconditioner_dtypes` and
    `combine_params` besides its hyperparameters.

    `optimizer.state[p]` shows the state of the unit whose first parameter is `p`, as views under
    stable names. It exists from construction on.

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
        self.buckets, self.frozen_units = list[Bucket](), list[RoutedUnit]()
        self._names: dict[nn.Parameter, str] = {}
        self._global_step = torch.zeros((), dtype=torch.int64, device="cpu")
        self._samples = Samples(self.model)
        self._warned: set[str] = set()
        self._mesh, self.team = mesh, Alone()
        self._follower = Follower(self.buckets, self.frozen_units, self._names)
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
        }
        leave_to_python(StructuredOptimizer, "_step")
        super().__init__(given, defaults)
        rules = self.team.rules(self.buckets)
        param_groups.check_rules(self.defaults, rules, self.frozen_units, self._names)
        warn_once(self._warned, "expensive", too_high(self.buckets))
        if batch_size is not None:
            self.batch_size = batch_size
        if verbose_init:
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
        group = param_groups.with_names(model, param_group)
        routing = param_groups.routing_of(group, as_routing(self.defaults["strategy"]))
        own = set(group)
        misspelt = param_groups.check_keys(group, routing, type(self))
        given = param_groups.complete(group, routing, self.defaults)
        kept = set(group)
        super().add_param_group(group)
        try:
            param_groups.drop_unread(group, kept, self.defaults)
            check_values(group)
            names = param_groups.labels_of(group, len(self.param_groups) - 1)
            units = route_units(model, group, routing, names)
            routing.check_read(given, [routed.route.strategy for routed in units])
            param_groups.check_own_rules(group, own, routing, units, names.values())
            self.team = find_team(self.team, self.model, self._mesh, group["params"])
            awake = [routed for routed in units if not routed.frozen]
            buckets = self.team.make_buckets(awake, self.rounding)
            self._follower.add(self.model, group)
        except BaseException:
            self.param_groups.pop()
            raise
        self._names |= names
        self._show(buckets, [routed for routed in units if routed.frozen])
        warn_once(self._warned, "keys", misspelt)
        if model is None:
            doubts = param_groups.roles_in_doubt(group, routing, awake, type(self).__name__)
            warn_once(self._warned, "roles", doubts)

    def _show(self, buckets: Sequence[Bucket], frozen: Sequence[RoutedUnit] = ()) -> None:
        """Add what is new, and show the state of buckets, and that frozen units have none."""
        self.frozen_units += [routed for routed in frozen if routed not in self.frozen_units]
        self.buckets += [bucket for bucket in buckets if bucket not in self.buckets]
        self.team.adopt()
        self._entries.show(buckets, self.state)
        for routed in frozen:
            self._entries.show_unit(routed.unit, self.state, {})

    def name_of(self, param: nn.Parameter) -> str:
        """Return the name of a parameter in the model, or else its place in `param_groups`."""
        return self._names[param]

    # --- counters --------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """The number of steps made."""
        return int(self._global_step)

    @property
    def skipped(self) -> int:
        """The number of times a unit was skipped for a non-finite or too large gradient."""
        return sum(int(b.counters.skipped[span.start]) for b in self.buckets for span in b.spans)

    @property
    def failed(self) -> int:
        """The number of times a row kept its last basis or root, as decompositions failed."""
        return sum(int(bucket.counters.failed.sum()) for bucket in self.buckets)

    @property
    def batch_size(self) -> int | None:
        """The number of samples behind the gradients, counted on this rank or given for all ranks.

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
        with self.team.step(self.buckets):
            plans = self.plan()
            warn_once(self._warned, "idle", self._follower.idle([plan.live for plan in plans]))
            self.team.arrive(self.buckets)
            with all_or_nothing(plans) as updates:
                warn = partial(warn_once, self._warned, "skipped")
                prepare = partial(updates.prepare, self.nonfinite, warn, self.team.exclude)
                self.team.confirm(prepare, plans, self.nonfinite == "raise")
                failed = updates.apply(self.team.moved)
        warn_once(self._warned, "failed", warning_of_failures(failed, self.global_step))
        self.count_step()

    def plan(self) -> list[Plan]:
        """Check all inputs of a step, or raise; return its plan for each bucket."""
        facts = partial(facts_of, self.param_groups, self._global_step)
        return self.team.agree(self._plan, facts, self._samples, self._schedule, self.nonfinite)

    def _plan(self) -> list[Plan]:
        """Check this rank's inputs; return its plan."""
        self._samples.watch(self)
        self._follow()
        self._follower.check_groups()
        self._thaw(lambda routed: not routed.frozen)
        live = self.team.check(self.param_groups, self.buckets, self._names)
        self._entries.follow(self.buckets, self.state, self._names)
        step, batch_size = self.global_step, self.batch_size
        check_batch_size(batch_size, self.buckets, live)
        intervals = self.team.intervals(self._schedule, self.buckets, step)
        return [
            Plan(bucket, alive, every, step, batch_size, self.maximize)
            for bucket, alive, every in zip(self.buckets, live, intervals, strict=True)
        ]

    def _thaw(self, thawed: Callable[[RoutedUnit], bool]) -> None:
        """Give state to frozen units that need it."""
        make = partial(self.team.make_buckets, rounding=self.rounding)
        self._show(thaw(self.frozen_units, thawed, make))

    def _follow(self, quiet: bool = False) -> None:
        """Follow changes of `param_groups` and of the model; refuse others, or wait if `quiet`."""
        self._follower.update(self.model, self.param_groups, self._entries, self.state, quiet)

    def count_step(self) -> None:
        """Count a step after its plans were applied."""
        self._samples.use()
        self._global_step += 1

    # --- checkpoints and copies ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state in torch's layout: only copied tensors and plain values.

        The state of a unit is under its first parameter. Callables, strategies, groupings and
        structures are described, not saved.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        self._follow()
        saved = checkpoint.save(self._follower.used_groups(), self.state)
        return checkpoint.hooked(self, "state_dict_post", saved)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict as a whole or not at all.

        The state keeps its live dtypes and devices. Parameters are matched by name if both sides
        have names, else by order.

        Raises:
            CheckpointError: If it does not fit; the message lists the differences.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        state_dict = checkpoint.hooked(self, "load_state_dict_pre", state_dict)
        self._follow()
        used = self._follower.used_groups(check=True)
        saved = checkpoint.with_state(used, state_dict)
        self._thaw(lambda routed: routed.unit.params[0] in saved)
        with self._samples.loading():
            checkpoint.load(self.param_groups, used, self.state, self._names, state_dict)
        self._schedule.adopt(self.team.stacks(self.buckets))
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the stacks themselves for copies and pickles, not hundreds of views."""
        return {key: self.__dict__[key] for key in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle."""
        super().__setstate__({**state, "state": defaultdict(dict)})
        leave_to_python(StructuredOptimizer, "_step")
        self._start_anew()
        self._show(self.buckets, self.frozen_units)
        self._samples.watch(self)
