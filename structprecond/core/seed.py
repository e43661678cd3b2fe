"""The seed that the random numbers of all ranks depend on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from structprecond.core.bucket import Bucket


@dataclass
class Seed:
    """The seed of the first rank, once the others know it.

    Args:
        own: That of this rank. Default: torch's.
        common: That of the first rank; None until the ranks have met.
    """

    own: int = field(default_factory=torch.initial_seed)
    common: int | None = None

    def give_to(self, buckets: Iterable[Bucket]) -> None:
        """Give seeds to the rows that have none, if the seed is known."""
        if self.common is not None:
            for bucket in buckets:
                bucket.counters.seed_rows(bucket.units, self.common)
