"""The rows of all ranks in one bucket, over which refreshes are staggered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from structprecond.core.bucket import Bucket, BucketKey, interval_in
from structprecond.core.build import RoutedUnit
from structprecond.core.counters import Counters
from structprecond.core.units import Unit

Known: TypeAlias = Mapping[int, tuple[int, int]]
"""Updates and phase offsets of rows, by their place among all rows of a bucket."""


class AllRows:
    """Counters of all rows of a bucket, the same on every rank.

    They are right only after `learn`: between two assignments of phase offsets, no rank needs those
    of others.

    Args:
        key: What the units have in common.
        units: The units, each with what this rank owns of it.

    Attributes:
        first: The first one, whose param group has their interval.
    """

    def __init__(self, key: BucketKey, units: Sequence[tuple[RoutedUnit, Unit | None]]) -> None:
        self.key, self.first = key, units[0][0]
        self.units: list[Unit] = [routed.unit for routed, _ in units]
        self.spans: list[slice] = []
        # by this rank's units themselves: names may be equal
        self._places: dict[Unit, list[int]] = {}
        start = 0
        for unit, (_, mine) in zip(self.units, units, strict=True):
            if mine is not None:
                own = range(unit.rows) if mine.row_numbers is None else mine.row_numbers
                self._places[mine] = [start + row for row in own]
            self.spans.append(slice(start, start + unit.rows))
            start += unit.rows
        self.rows = start
        self.counters = Counters.of(self.units)
        self.staggered_over: int | None = None

    @property
    def interval(self) -> Any:
        """The current refresh interval; False if the strategy has no refreshes."""
        first = self.first
        return interval_in(first.group, first.route.strategy, first.prefix)

    def known(self, bucket: Bucket) -> Known:
        """Return updates and phase offsets of this rank's rows, for the other ranks."""
        counters = bucket.counters
        numbers = zip(counters.step.tolist(), counters.phase_offset.tolist(), strict=True)
        return dict(zip(self._places_of(bucket), numbers, strict=True))

    def learn(self, known: Known) -> None:
        """Note updates and phase offsets of rows of any rank."""
        for place, (step, offset) in known.items():
            self.counters.step[place] = step
            self.counters.phase_offset[place] = offset

    def offsets_of(self, bucket: Bucket) -> Tensor:
        """Return the phase offsets of this rank's rows."""
        places = torch.tensor(self._places_of(bucket), dtype=torch.int64, device="cpu")
        return self.counters.phase_offset[places]

    def _places_of(self, bucket: Bucket) -> list[int]:
        return [place for unit in bucket.units for place in self._places[unit]]
