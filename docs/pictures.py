"""Draws the structures for docs/structures.md, from what the classes store.

Usage: python docs/pictures.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from structprecond.structures import structure_class

FOLDER = Path(__file__).parent / "images" / "structures"
NAMES = (
    "dense diagonal block4diagonal hierarchical2_2 triltoeplitz triutoeplitz triltopleftdiag "
    "triutopleftdiag trilbottomrightdiag triubottomrightdiag"
).split()
SIZE, CELL, GAP = 10, 12, 1
# hues that are visible on white and on black
HUES = "#5c6bc0 #7e57c2 #ab47bc #ec407a #ef5350 #ff7043 #ffa726 #d4b106 #9ccc65 #26a69a".split()


def numbered(name: str) -> Tensor:  # (SIZE, SIZE)
    """Return a matrix whose entries number the stored numbers from 1 on; 0 is no entry."""
    matrix = structure_class(name).zeros(SIZE)
    first = 1
    for tensor in matrix.named_tensors().values():
        tensor.copy_(torch.arange(first, first + tensor.numel()).view(tensor.shape))
        first += tensor.numel()
    return matrix.to_dense().round().long()


def count(name: str) -> int:
    """Return how many numbers a structure stores."""
    return int(numbered(name).max())


def picture(name: str) -> str:
    """Return an SVG: a square for each entry, of one color where all stored numbers occur once."""
    matrix = numbered(name).tolist()
    entries = [number for row in matrix for number in row if number]
    repeated = len(set(entries)) < len(entries)
    side = SIZE * CELL + GAP
    paths: dict[str, str] = {}
    for y, row in enumerate(matrix):
        for x, number in enumerate(row):
            square = f"M{x * CELL + GAP} {y * CELL + GAP}h{CELL - GAP}v{CELL - GAP}h{GAP - CELL}z"
            fill = _fill(number, repeated)
            paths[fill] = paths.get(fill, "") + square
    squares = "".join(f'<path fill="{fill}" d="{path}"/>\n' for fill, path in paths.items())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}" '
        f'width="{side}" height="{side}">\n{squares}</svg>\n'
    )


def _fill(number: int, repeated: bool) -> str:
    if number == 0:
        return "#8883"
    return HUES[(number - 1) % len(HUES)] if repeated else HUES[0]


def main() -> None:
    """Write the pictures, and print the numbers that each structure stores."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (FOLDER / f"{name}.svg").write_text(picture(name), encoding="utf-8")
        print(f"{name}: {count(name)} numbers")


if __name__ == "__main__":
    main()
