"""Who is refreshed when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush

from structprecond.core.bucket import Bucket


def take_turns(buckets: Sequence[Bucket], intervals: Mapping[int, int | bool]) -> None:
    """Spread the rows of all buckets over the steps of their interval, the costliest first.

    Args:
        buckets: The buckets, whose `turns` are set.
        intervals: The refresh interval of every bucket, by its id.
    """
    waiting: dict[int, list[tuple[int, str, Bucket, int]]] = {}
    for bucket in buckets:
        every = intervals[id(bucket)]
        if not isinstance(every, bool):
            # by name, so that turns do not depend on the order of registration
            rows = (
                (-bucket.refresh_cost(), unit.label, bucket, row)
                for unit, span in zip(bucket.units, bucket.spans, strict=True)
                for row in range(span.start, span.stop)
            )
            waiting.setdefault(every, []).extend(rows)
    for every, rows_of_all in waiting.items():
        rows_of_all.sort(key=lambda entry: entry[:2])
        # the load of each step and the step; more steps than rows are not needed
        steps = [(0, step) for step in range(min(every, len(rows_of_all)))]
        for cost, _, bucket, row in rows_of_all:
            load, step = heappop(steps)
            bucket.turns[row] = step
            heappush(steps, (load - cost, step))
