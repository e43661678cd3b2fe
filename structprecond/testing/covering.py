"""Covering arrays: few cases that cover all pairs of settings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from heapq import heapify, heappop, heappushpop
from itertools import combinations, product
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]


def all_cases(
    factors: Mapping[str, Sequence[Hashable]],
    excluded: Callable[[Case], bool] = lambda case: False,
) -> list[Case]:
    """Return the product of the factors' values in order, without excluded cases."""
    cases = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in cases if not excluded(case)]


def pairs(case: Case) -> list[Pair]:
    """Return the pairs of settings in a case."""
    return list(combinations(case.items(), 2))


def covering_array(
    factors: Mapping[str, Sequence[Hashable]],
    excluded: Callable[[Case], bool] = lambda case: False,
) -> list[Case]:
    """Choose cases that cover every possible pair of values of two factors.

    Greedy: the next case covers the most new pairs; ties go to the first in the full product. The
    choice is deterministic.

    Args:
        factors: The values of each factor, by name.
        excluded: Returns whether a case is impossible. Pairs that occur only in impossible cases
            are not covered.

    Returns:
        The cases, in the order in which they were chosen.

    Example:
        >>> bits = {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
        >>> [tuple(case.values()) for case in covering_array(bits)]
        [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    """
    cases = all_cases(factors, excluded)
    pairs_of = [pairs(case) for case in cases]
    missing = {pair for found in pairs_of for pair in found}
    # the number of new pairs only falls, so an old count is a bound, and few need a recount
    waiting = [(-len(found), i) for i, found in enumerate(pairs_of)]
    heapify(waiting)
    chosen: list[Case] = []
    while missing:
        _, i = heappop(waiting)
        while waiting:
            entry = (-sum(pair in missing for pair in pairs_of[i]), i)
            if entry <= waiting[0]:
                break
            _, i = heappushpop(waiting, entry)
        missing.difference_update(pairs_of[i])
        chosen.append(cases[i])
    return chosen
