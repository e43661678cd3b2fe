"""What a plan finds: the costs of each rank, and of each unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from structprecond.core.naming import describe_shape
from structprecond.tables import human, lay_out


@dataclass(frozen=True)
class RankCost:
    """What one rank keeps, computes and sends.

    Args:
        owned: The number of units, or of rows of stacked units, that it owns.
        state_bytes: The bytes of its state.
        step_operations: The operations of a step without refreshes.
        refresh_operations: The operations to refresh all that it owns once.
        slowest_operations: The operations of its slowest step: with all refreshes, or, if they are
            staggered, with those of the costliest turn.
        collect_sent: The bytes of gradients and parameters that it sends to owners in a step.
        collect_received: The bytes of those that it receives as an owner.
        spread_sent: The bytes of updated parameters that it sends as an owner.
        spread_received: The bytes of those that it receives.
    """

    owned: int
    state_bytes: int
    step_operations: int
    refresh_operations: int
    slowest_operations: int
    collect_sent: int
    collect_received: int
    spread_sent: int
    spread_received: int


@dataclass(frozen=True)
class UnitCost:
    """What a unit costs, all of its rows together.

    Args:
        name: The names of its parameters.
        shape: The shape of one row.
        owned: The number of parts that have an owner each: its rows, or 1.
        state_bytes: The bytes of its state.
    """

    name: str
    shape: tuple[int, ...]
    owned: int
    state_bytes: int

    def __str__(self) -> str:
        """Return its name, shape and state."""
        rows = f"{self.owned} rows of " * (self.owned > 1)
        return f"{self.name} ({rows}{describe_shape(self.shape)}, {human(self.state_bytes)})"


@dataclass(frozen=True)
class Forecast:
    """What an optimizer costs on each rank; print it for a table.

    Args:
        mesh: The dimensions of the mesh.
        world: The number of ranks.
        ranks: The costs of each rank among those that share the state: all, or those of one shard
            group, whose replicas cost the same.
        units: The units, the largest state first.
        parameter_bytes: The bytes of all parameters.
        collectives: The number of collectives in a step.
        advice: What would be cheaper.
    """

    mesh: str
    world: int
    ranks: tuple[RankCost, ...]
    units: tuple[UnitCost, ...]
    parameter_bytes: int
    collectives: int
    advice: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """The bytes of all state, without replicas."""
        return sum(rank.state_bytes for rank in self.ranks)

    def largest(self, field: str) -> int:
        """Return the largest value of a field of `RankCost`."""
        return max(_values(self.ranks, field))

    def ideal(self, field: str) -> float:
        """Return the value of a field if all ranks had the same."""
        return sum(_values(self.ranks, field)) / len(self.ranks)

    def ratio(self, field: str) -> float:
        """Return the largest value of a field over the ideal; 1 if all are 0."""
        ideal = self.ideal(field)
        return self.largest(field) / ideal if ideal else 1.0

    def __str__(self) -> str:
        """Return a table of what the ranks cost, the totals, and the advice."""
        table: list[tuple[str, ...]] = [("per rank", "largest", "ideal", "largest / ideal")]
        for title, field, unit in _LINES:
            values = self.largest(field), self.ideal(field)
            written = [human(v) if unit == "bytes" else _count(v) for v in values]
            table.append((title, *written, f"{self.ratio(field):.2f}"))
        lines = lay_out(table)
        groups = self.world // len(self.ranks)
        idle = sum(rank.owned == 0 for rank in self.ranks)
        owners = f"{len(self.ranks):,} ranks own {len(self.units):,} units"
        return "\n".join(
            [
                *lines,
                lines[1],
                f"{self.mesh}: {owners}" + f" in each of {groups:,} groups" * (groups > 1),
                f"{idle:,} ranks own nothing, {self.collectives} collectives a step",
                f"state {human(self.state_bytes)} in all, parameters {human(self.parameter_bytes)}",
                f"largest units: {', '.join(map(str, self.units[:3]))}",
                *(f"- {line}" for line in self.advice),
            ]
        )

    def by_rank(self) -> str:
        """Return a table with one line per rank."""
        table: list[tuple[str, ...]] = [("rank", "owned", *(title for title, _, _ in _LINES))]
        for number, rank in enumerate(self.ranks):
            values = [
                human(getattr(rank, field)) if unit == "bytes" else _count(getattr(rank, field))
                for _, field, unit in _LINES
            ]
            table.append((str(number), str(rank.owned), *values))
        return "\n".join(lay_out(table))


_LINES = (
    ("state", "state_bytes", "bytes"),
    ("operations of a step", "step_operations", ""),
    ("operations of a refresh", "refresh_operations", ""),
    ("operations of the slowest step", "slowest_operations", ""),
    ("sent to owners", "collect_sent", "bytes"),
    ("received by owners", "collect_received", "bytes"),
    ("sent by owners", "spread_sent", "bytes"),
    ("received from owners", "spread_received", "bytes"),
)


def _values(ranks: Sequence[RankCost], field: str) -> list[int]:
    return [getattr(rank, field) for rank in ranks]


def _count(number: float) -> str:
    """Return a number with three digits.

    Example:
        >>> _count(0), _count(1234567)
        ('0', '1.23e+06')
    """
    return f"{number:.3g}"
