"""Holders: which ranks hold which part of a tensor."""

from __future__ import annotations

from collections.abc import Sequence

from structprecond.core.boxes import Box


class Holders:
    """The boxes of a tensor, and the ranks that hold them.

    Args:
        boxes: The box that each rank holds.

    Example:
        >>> top, bottom = Box((0,), (2,)), Box((2,), (2,))
        >>> Holders([top, top, bottom]).of(Box((1,), (2,)))
        [(Box(offset=(1,), size=(1,)), [0, 1]), (Box(offset=(2,), size=(1,)), [2])]
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.boxes = boxes
        self._ranks: dict[Box, list[int]] = {}
        for rank, box in enumerate(boxes):
            self._ranks.setdefault(box, []).append(rank)
        # many parameters share their shape, and so their parts
        self._known: dict[Box, list[tuple[Box, list[int]]]] = {}

    def of(self, part: Box) -> list[tuple[Box, list[int]]]:
        """Return the boxes into which a part is cut, each with the ranks that hold it."""
        if part not in self._known:
            cuts = ((part.cut(box), ranks) for box, ranks in self._ranks.items())
            self._known[part] = [(cut, ranks) for cut, ranks in cuts if cut is not None]
        return self._known[part]
