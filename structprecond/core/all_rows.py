"""The rows of all ranks in one bucket, over which refreshes are staggered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from structprecond.core.bucket import Bucket, BucketKey, interval_in
from structprecond.core.build import RoutedUnit
from structprecond.core.counters import Counters
from structprecond.core.units import Unit

Row = tuple[str, int]
"""The names of a unit's parameters, and the number of a row."""


class AllRows:
    """Counters of all rows of a bucket, the same on every rank.

    They are right only after `learn`: between two assignments of phase offsets, no rank needs those
    of others.

    Args:
        key: What the units have in common.
        routed: The units.

    Attributes:
        first: The first one, whose param group has their interval.
    """

    def __init__(self, key: BucketKey, routed: Sequence[RoutedUnit]) -> None:
        self.key, self.first = key, routed[0]
        self.units: list[Unit] = [one.unit for one in routed]
        self.spans: list[slice] = []
        self._place: dict[Row, int] = {}
        for unit in self.units:
            start = len(self._place)
            self._place |= {(unit.label, row): start + row for row in range(unit.rows)}
            self.spans.append(slice(start, start + unit.rows))
        self.rows = len(self._place)
        self.counters = Counters.of(self.units)
        self.staggered_over: int | None = None

    @property
    def interval(self) -> Any:
        """The current refresh interval; False if the strategy has no refreshes."""
        first = self.first
        return interval_in(first.group, first.route.strategy, first.prefix)

    def learn(self, known: dict[Row, tuple[int, int]]) -> None:
        """Note updates and phase offsets of rows; those of other buckets are ignored."""
        for row, (step, offset) in known.items():
            if row in self._place:
                self.counters.step[self._place[row]] = step
                self.counters.phase_offset[self._place[row]] = offset

    def offsets_of(self, units: Sequence[Unit]) -> Tensor:
        """Return the phase offsets of a rank's rows."""
        places = [self._place[row] for row in rows_of_units(units)]
        return self.counters.phase_offset[torch.tensor(places, dtype=torch.int64, device="cpu")]


def rows_of_units(units: Sequence[Unit]) -> list[Row]:
    """Return the rows of units, in the order of their stack."""
    return [(u.label, row) for u in units for row in u.row_numbers or range(u.rows)]


def known_rows(bucket: Bucket) -> dict[Row, tuple[int, int]]:
    """Return updates and phase offsets of a rank's rows."""
    counters = bucket.counters
    numbers = zip(counters.step.tolist(), counters.phase_offset.tolist(), strict=True)
    return dict(zip(rows_of_units(bucket.units), numbers, strict=True))
