"""The exchanges of one step: what has been collected, has arrived and has been spread."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from structprecond.core.bucket import Bucket
from structprecond.core.exchange import Exchange


class Traffic:
    """Makes the exchanges of a step, in the same order on all ranks.

    It knows what is done, so a step that fails between any two exchanges goes on from there: other
    ranks wait for what this one sends.

    Args:
        exchanges: The exchanges; more may be added.

    Attributes:
        agreed: Whether all ranks make the step, so that the others wait for this one.
    """

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self._exchanges = exchanges
        self._common = 0  # how many took part in an agreed step, so that all ranks have them
        self._reset()

    def _reset(self) -> None:
        self.agreed = False
        # for each exchange, the buckets that this rank still has to update
        self._waiting = defaultdict[int, set[Bucket]](set)
        self._collected = self._arrived = self._spread = 0

    def begin(self) -> None:
        """Start to bring gradients to the owners where all ranks are known to do the same."""
        self._reset()
        self._collect(self._common)

    def _collect(self, number: int) -> None:
        while self._collected < number:
            self._exchanges[self._collected].collect()
            self._collected += 1

    def await_update(self, number: int, bucket: Bucket) -> None:
        """Note that an exchange spreads only after a bucket is updated."""
        self._waiting[number].add(bucket)

    def arrive(self) -> None:
        """Wait for the gradients."""
        self._common = len(self._exchanges)
        self._collect(self._common)
        while self._arrived < self._common:
            self._exchanges[self._arrived].arrive()
            self._arrived += 1

    def moved(self, number: int, bucket: Bucket) -> None:
        """Note that a bucket of an exchange is updated; start to send what is complete."""
        self._waiting[number].discard(bucket)
        while self._spread < len(self._exchanges) and not self._waiting[self._spread]:
            self._spread_next()

    def _spread_next(self) -> None:
        self._exchanges[self._spread].spread()
        self._spread += 1

    def finish(self) -> None:
        """Send the rest, and wait for everything."""
        while self._spread < len(self._exchanges):
            self._spread_next()
        for exchange in self._exchanges:
            exchange.finish()

    def fail(self) -> None:
        """Go on as the other ranks do: they stop as well, or wait for the parameters."""
        if self.agreed:
            self.arrive()
            self.finish()
            return
        for exchange in self._exchanges:
            exchange.drop()

    def abandon(self) -> None:
        """Free what was under way; nothing more will arrive."""
        for exchange in self._exchanges:
            exchange.free()
