"""Tables in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def lay_out(table: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: its header, a rule, and the rows, with aligned columns.

    Example:
        >>> lay_out([("name", "rows"), ("fc.weight", "2")])
        ['name       rows', '---------------', 'fc.weight  2']
    """
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    header, *rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )
    return [header, "-" * max(map(len, (header, *rows))), *rows]
