"""Owners are those of a plain search, and holders cover each part once."""

from __future__ import annotations

import itertools
import random

import torch

from structprecond.core.boxes import Box
from structprecond.core.holders import Holders
from structprecond.core.ownership import Item, Loads, assign
from structprecond.core.units import Unit

RULE = torch.nn.Identity()  # no item looks at it


def items(count: int, seed: int) -> list[Item]:
    """Return items of few different costs, so that many loads are equal."""
    numbers = random.Random(seed)
    units = [Unit(RULE, (), (f"unit{i}",), torch.Size([1]), 1) for i in range(count)]  # type: ignore[arg-type]
    return [
        Item(unit, None, numbers.choice([0.1, 0.3, 1.0, 7.5]), numbers.choice([4, 12, 80]))
        for unit in units
    ]


def search(items: list[Item], ranks: int, loads: Loads) -> list[int]:
    """Return the owners by the definition: the largest share first, to the least loaded rank."""
    total = sum(loads.work) + sum(item.work for item in items)
    total_bytes = sum(loads.state_bytes) + sum(item.state_bytes for item in items)
    owners = {}
    largest = {i: max(it.work / total, it.state_bytes / total_bytes) for i, it in enumerate(items)}
    for i in sorted(largest, key=lambda i: (-largest[i], items[i].unit.label)):
        after = [
            max(
                (loads.work[rank] + items[i].work) / total,
                (loads.state_bytes[rank] + items[i].state_bytes) / total_bytes,
            )
            for rank in range(ranks)
        ]
        owners[i] = after.index(min(after))
        loads.work[owners[i]] += items[i].work
        loads.state_bytes[owners[i]] += items[i].state_bytes
    return [owners[i] for i in range(len(items))]


def test_owners_and_loads_are_those_of_a_search_over_all_ranks() -> None:
    for seed, ranks in itertools.product(range(5), (1, 2, 7, 40)):
        fast, plain = Loads.none(ranks), Loads.none(ranks)
        for group in range(2):  # the loads carry over
            some = items(60, seed + 100 * group)
            assert assign(some, fast) == search(some, ranks, plain)
            assert fast == plain


def test_every_entry_of_a_part_is_in_one_box_of_all_ranks_that_hold_it() -> None:
    # 3 x 2 tiles of a 7 x 5 tensor, each on two ranks
    rows, columns = [(0, 3), (3, 3), (6, 1)], [(0, 4), (4, 1)]
    tiles = [Box((a, b), (n, m)) for (a, n), (b, m) in itertools.product(rows, columns)]
    boxes = tiles + tiles
    part = Box((2, 1), (4, 4))
    covered = torch.zeros(7, 5, dtype=torch.int64)
    for box, ranks in Holders(boxes).of(part):
        (y, x), (height, width) = box.offset, box.size
        covered[y : y + height, x : x + width] += 1
        held = [boxes[rank] for rank in range(12) if boxes[rank].cut(box) == box]
        assert [boxes[rank] for rank in ranks] == held
        assert len(ranks) == 2
    expected = torch.zeros(7, 5, dtype=torch.int64)
    expected[2:6, 1:5] = 1
    assert torch.equal(covered, expected)
