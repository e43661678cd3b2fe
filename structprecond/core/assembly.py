"""What an optimizer makes of its param groups: a team, units and their stacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from structprecond.core.agreement import Facts
from structprecond.core.boxes import describe_placed
from structprecond.core.bucket import Bucket
from structprecond.core.build import RoutedUnit, route_units
from structprecond.core.entry import Entries
from structprecond.core.follow import Follower
from structprecond.core.naming import unwrap
from structprecond.core.param_groups import labels_of
from structprecond.core.ranks import Mesh
from structprecond.core.rounding import Rounding
from structprecond.core.routing import as_routing
from structprecond.core.team import Alone
from structprecond.core.teams import find_team
from structprecond.errors import GroupError

Group = dict[str, Any]
State = MutableMapping[Any, Any]


@dataclass(frozen=True)
class Made:
    """What is made of some param groups, before it is used.

    Args:
        team: The team that trains them.
        names: The names of their parameters.
        units: Their units.
        buckets: The stacks of those that this rank owns and that are not frozen.
    """

    team: Alone
    names: dict[nn.Parameter, str]
    units: list[RoutedUnit]
    buckets: list[Bucket]


class Assembly:
    """The team, units and stacks of all param groups.

    Args:
        model: The model; None if only parameters are known.
        mesh: The ranks that shall own rows, if the user names them.
        rounding: How low-precision parameters are rounded.

    Attributes:
        team: The team that trains the parameters.
        buckets: The stacks.
        frozen: The units without state, as none of their parameters requires a gradient.
        names: The names of all parameters.
        rules: The roles and patterns that have routed units to strategies.
        follower: What the optimizer uses of param groups and model.
    """

    def __init__(self, model: nn.Module | None, mesh: Mesh | None, rounding: Rounding) -> None:
        self.team = Alone()  # first: it may refuse to be copied
        self._model, self._mesh, self._rounding = model, mesh, rounding
        self.buckets: list[Bucket] = []
        self.frozen: list[RoutedUnit] = []
        self.names: dict[nn.Parameter, str] = {}
        self.rules: set[str] = set()
        # in the last step
        self._thawed: tuple[list[RoutedUnit], list[Bucket]] = ([], [])
        self.follower = Follower(self.buckets, self.frozen, self.names)

    def make(self, groups: Sequence[Group], global_step: int) -> Made:
        """Make units and stacks of the last group, and of all if they need another team.

        Args:
            groups: All groups, complete.
            global_step: The number of steps made.

        Raises:
            StructPrecondError: If the settings of the group do not fit its parameters, or if state
                would be lost; nothing is changed.
        """
        *others, new = groups
        names = labels_of(new, len(others))
        known = []
        if self.names:
            problem = self.team.problem_with(names)
            if problem is None:
                return self._make([(new, names)], self.team)
            if self.follower.refusal is not None:
                raise self.follower.refusal
            self._check_unused(f"a new param group has {problem}", global_step)
            known = [(group, {p: self.names[p] for p in group["params"]}) for group in others]
        return self._make([*known, (new, names)])

    def _make(
        self, groups: Iterable[tuple[Group, dict[nn.Parameter, str]]], team: Alone | None = None
    ) -> Made:
        """Make units and stacks of groups, given with the names of their parameters.

        Args:
            groups: The groups with these names.
            team: The team that trains them. Default: None, a new one.
        """
        model = None if self._model is None else unwrap(self._model)
        names: dict[nn.Parameter, str] = {}
        units = []
        for group, own in groups:
            units += route_units(model, group, as_routing(group["strategy"]), own)
            names |= own
        if team is None:
            team = find_team(self.team, self._model, self._mesh, list(names))
        awake = [routed for routed in units if not routed.frozen]
        return Made(team, names, units, team.make_buckets(awake, self._rounding))

    def _check_unused(self, what: str, global_step: int) -> None:
        """Raise `GroupError` if there is state that cannot be made anew."""
        if not global_step and not any(bool(b.counters.initialized.any()) for b in self.buckets):
            return
        after = f"{global_step} steps" if global_step else "it was given state"
        raise GroupError(
            f"After {after}, the optimizer cannot follow this: {what}. The parameters decide which "
            "rank keeps which state, so nothing was changed. Build the optimizer after all such "
            "changes, and load there what state_dict() returned before them."
        )

    def use(self, made: Made, entries: Entries, state: State) -> None:
        """Add what was made to what there is; what has another team replaces that.

        Args:
            made: What was made.
            entries: The entries of the state.
            state: The optimizer's state, where the new one is shown.
        """
        if made.team is not self.team:
            self.team = made.team
            for old in (self.buckets, self.frozen, self.names):
                old.clear()
        self.names |= made.names
        self.rules |= {routed.route.rule for routed in made.units}
        frozen = [routed for routed in made.units if routed.frozen]
        self.frozen += frozen
        self._add(made.buckets, frozen, entries, state)

    def _add(
        self,
        buckets: Sequence[Bucket],
        frozen: Iterable[RoutedUnit],
        entries: Entries,
        state: State,
    ) -> None:
        """Add stacks, and show the state of their units and of others."""
        self.buckets += buckets
        entries.show(buckets, state)
        for unit, shown in [*self.team.adopt(), *((routed.unit, {}) for routed in frozen)]:
            entries.show_unit(unit, state, shown)

    def thaw(self, thawed: Callable[[RoutedUnit], bool], entries: Entries, state: State) -> None:
        """Give state to frozen units that need it.

        Args:
            thawed: Whether a unit needs state.
            entries: The entries of the state.
            state: The optimizer's state.
        """
        awake = [routed for routed in self.frozen if thawed(routed)]
        if not awake:
            return
        buckets = self.team.make_buckets(awake, self._rounding)
        self.frozen[:] = [routed for routed in self.frozen if routed not in awake]
        self._thawed = awake, buckets
        for bucket in buckets:
            bucket.counters.overdue[:] = True  # they missed all refreshes so far
        self._add(buckets, [], entries, state)

    def show(self, entries: Entries, state: State) -> None:
        """Show the state of everything in another optimizer's entries, as for copies.

        Args:
            entries: The entries of the state.
            state: The optimizer's state.
        """
        entries.show(self.buckets, state)
        for routed in self.frozen:
            entries.show_unit(routed.unit, state, {})

    @contextmanager
    def thawing(self, entries: Entries, state: State) -> Iterator[None]:
        """Freeze again what is thawed in a block that raises: other ranks have not thawed it.

        Args:
            entries: The entries of the state.
            state: The optimizer's state.
        """
        self._thawed = [], []
        try:
            yield
        except BaseException:
            units, buckets = self._thawed
            if units:
                self.buckets[:] = [bucket for bucket in self.buckets if bucket not in buckets]
                self.frozen += units
                self.team.give_up()
                for routed in units:
                    entries.show_unit(routed.unit, state, {})
            raise

    def follow(
        self,
        groups: Sequence[Group],
        global_step: int,
        entries: Entries,
        state: State,
        quiet: bool = False,
    ) -> None:
        """Follow changes of param groups and of the model, or refuse them all.

        Before the first step, everything is made anew if the state cannot stay where it is.

        Args:
            groups: The param groups; lists of parameters get the model's new ones.
            global_step: The number of steps made.
            entries: The entries of the state.
            state: The optimizer's state.
            quiet: Whether to leave it to a later call to raise.

        Raises:
            StructPrecondError: If a change cannot be followed; nothing is changed.
        """
        with self.follower.refusing(quiet):
            # conversions and the like keep the identity of parameters
            converted = not global_step and not self.team.can_follow({p: p for p in self.names})
            change = self.follower.find(self._model, groups, converted)
            if change is None:
                return
            if self.team.can_follow(change.new):
                self.follower.follow(change, entries, state)
                self.team.regroup(change.groups)
                return
            self._check_unused(change.describe(self.names), global_step)
            made = self._make(change.named(self.names))
            # nothing below can fail
            entries.renew(change.new, state)
            self.use(made, entries, state)
            self.follower.note(change)

    def meet(self, follow: Callable[..., None]) -> None:
        """Check before the first step that all ranks train the same parameters; share the seed.

        Args:
            follow: Calls `follow`, given `quiet`.
        """

        def parameters() -> Facts:
            follow()
            placed = {name: describe_placed(p) for p, name in self.names.items()}
            return {"the parameters": placed}

        follow(quiet=True)  # after this, the team is that of all ranks
        self.team.meet(parameters, self.buckets)
