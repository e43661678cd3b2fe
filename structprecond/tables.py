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


def human(size: float) -> str:
    """Return a number of bytes in a unit that fits it.

    Example:
        >>> human(170), human(3 * 2**20)
        ('170 B', '3.0 MiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
