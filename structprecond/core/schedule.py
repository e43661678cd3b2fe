"""Who is refreshed when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from structprecond.core.bucket import Bucket


def take_turns(buckets: Sequence[Bucket], intervals: Mapping[int, int | bool]) -> None:
    """Spread the rows of all buckets over the steps of their interval, the costliest first.

    Args:
        buckets: The buckets, whose `turns` are set.
        intervals: The refresh interval of every param group, by its id.
    """
    load: dict[int, list[int]] = {}
    for bucket in sorted(buckets, key=Bucket.refresh_cost, reverse=True):
        every = intervals[id(bucket.group)]
        if isinstance(every, bool):
            continue
        steps = load.setdefault(every, [0] * every)
        for row in range(bucket.rows):
            lightest = min(range(every), key=steps.__getitem__)
            steps[lightest] += bucket.refresh_cost()
            bucket.turns[row] = lightest
