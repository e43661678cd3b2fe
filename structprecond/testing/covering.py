"""Few cases that cover all pairs: what a full product of settings would find, mostly."""

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
    """Return the product of the factors' values, without what is excluded, in their order."""
    cases = (dict(zip(factors, values, strict=True)) for values in product(*factors.values()))
    return [case for case in cases if not excluded(case)]


def pairs(case: Case) -> list[Pair]:
    """Return the pairs of settings that a case tries together."""
    return list(combinations(case.items(), 2))


def covering_array(
    factors: Mapping[str, Sequence[Hashable]],
    excluded: Callable[[Case], bool] = lambda case: False,
) -> list[Case]:
    """Choose cases that together try every pair of values of two factors that is possible.

    Greedy: the next case is the one that tries most new pairs, the first of them in the order of
    the full product. So the choice is the same every time.

    Args:
        factors: The values of each factor, by its name.
        excluded: Whether a case is impossible. Pairs that occur in impossible cases only are
            not covered.

    Returns:
        The cases, the most telling ones first.

    Example:
        >>> bits = {"a": [0, 1], "b": [0, 1], "c": [0, 1]}
        >>> [tuple(case.values()) for case in covering_array(bits)]
        [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    """
    cases = all_cases(factors, excluded)
    pairs_of = [pairs(case) for case in cases]
    missing = {pair for found in pairs_of for pair in found}
    # the number of new pairs only falls, so an old one is a bound and few have to be counted anew
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
