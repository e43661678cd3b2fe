"""The core's own counters and flags for each row of a stack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Self

import torch
from torch import Tensor

from structprecond.core.state import State
from structprecond.core.units import Unit

UNASSIGNED = -1
"""The phase offset of rows that have none yet."""
UNSEEDED = -1
"""The seed of rows that have none yet."""


@dataclass
class Counters(State):
    """Counters and flags of rows, all `(b,)` on the CPU.

    Args:
        step: The number of updates of each row, int64.
        skipped: The number of steps that each row skipped because its gradient was not finite or
            would have made its state or parameters non-finite, int64.
        failed: The number of refreshes in which each row kept its old basis or root because a
            decomposition failed, int64.
        initialized: Whether the strategy has seen the first gradient of each row, bool.
        overdue: Whether each row missed a refresh because it was not live, bool.
        phase_offset: The phase offset of each row's refreshes, in steps before its multiples of the
            interval, int64; `UNASSIGNED` until refreshes are staggered, see `refresh.stagger`.
        seed: The seed of each row's random numbers, int64; `UNSEEDED` until `seed_rows`.
    """

    step: Tensor
    skipped: Tensor
    failed: Tensor
    initialized: Tensor
    overdue: Tensor
    phase_offset: Tensor
    seed: Tensor

    @classmethod
    def of(cls, units: Sequence[Unit]) -> Self:
        """Return the initial counters of the rows of some units."""
        rows = sum(unit.rows for unit in units)

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, dtype=dtype, device="cpu")

        return cls(
            step=zeros(torch.int64),
            skipped=zeros(torch.int64),
            failed=zeros(torch.int64),
            initialized=zeros(torch.bool),
            overdue=zeros(torch.bool),
            phase_offset=zeros(torch.int64).fill_(UNASSIGNED),
            seed=zeros(torch.int64).fill_(UNSEEDED),
        )

    def seed_rows(self, units: Sequence[Unit], seed: int) -> None:
        """Give seeds to the rows that have none.

        Args:
            units: The units of the rows.
            seed: What all random numbers depend on.
        """
        without = self.seed == UNSEEDED
        if not bool(without.any()):
            return
        # by name, so that random numbers do not depend on the order of the rows
        seeds = [
            _seed(seed, unit.label, row)
            for unit in units
            for row in unit.row_numbers or range(unit.rows)
        ]
        self.seed[without] = torch.tensor(seeds, dtype=torch.int64, device="cpu")[without]


def _seed(seed: int, label: str, row: int) -> int:
    """Return a seed that depends on another one, the unit and the row number."""
    text = f"{seed}/{label}/{row}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
