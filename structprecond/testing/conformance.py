"""Writes the page of the conformance matrix: `python -m structprecond.testing.conformance`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from structprecond.testing.cells import CHECKS, NO_STRUCTURE, POLICIES, Cell
from structprecond.testing.runs import PRECISIONS
from structprecond.testing.situations import SAVED_AT, SITUATIONS, STEPS
from structprecond.testing.strategies import StrategyContract
from structprecond.testing.table import CONTRACTS

_COMMAND = "python -m structprecond.testing.conformance"
_PASSED = "✓"
_PAGE = """# Conformance

Every strategy trains a small model in every situation, with every structure, in every precision.
After {saved_at} steps, the run is interrupted in {ways}.
It must then continue to step {steps} with the same bits as an uninterrupted run. No step may change
gradients or units without a gradient, and all values must stay finite. {passed} cells pass. This
command writes the page:

```bash
{command}
```

It takes a quarter of an hour. With `--pairs` it covers every pair of settings in two minutes, as
the tests do. `structprecond.testing.StrategyContract` tests your own strategy in the same way.

## Strategies and situations

{situations}
## Strategies, structures and precisions

A reason instead of {mark} means that the strategy refuses the structure with a `StructureError` at
construction. Strategies without factors have the structure {without} and ignore the defaults,
`auto` and `dense`. "float16 scaled" is mixed precision: float32 parameters, forward passes in
float16 under `torch.autocast`, and `torch.amp.GradScaler`, which refuses float16 parameters.

{structures}
## Strategies and policies

With the first structure of the table above, in all precisions and situations. {no_decay} means
that the strategy has no decoupled weight decay for `CautiousDecay` to change. "three" is
`CautiousUpdate`, `MatchRMS` and `Hyperball`, in this order.

{policies}"""
_NO_DECAY = "no decay"


@dataclass
class Result:
    """The results of one strategy.

    Args:
        contract: Its contract.
        ran: The cells that were run.
        failed: The failed cells, with reasons.
        accepted: The structures that it wrongly accepts.
    """

    contract: type[StrategyContract]
    ran: Sequence[Cell]
    failed: Mapping[Cell, str] = field(default_factory=dict)
    accepted: Sequence[str] = ()

    def mark(self, **settings: object) -> str:
        """Return the mark for the cells with the given settings."""
        cells = [c for c in self.ran if all(getattr(c, k) == v for k, v in settings.items())]
        failed = sum(cell in self.failed for cell in cells)
        if not cells:
            raise ValueError(f"No cell with {settings} was run.")
        return f"✗ {failed} of {len(cells)}" if failed else _PASSED


def examine(contract: type[StrategyContract], pairs: bool = False) -> Result:
    """Run the cells of one strategy.

    Args:
        contract: Its contract.
        pairs: Whether to cover only every pair of settings, instead of the full product.
    """
    cells = contract.covering_cells() if pairs else contract.cells()
    tests = contract()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failed = {cell: str(error) for cell, error in tests.failures(cells)}
    return Result(contract, cells, failed, tests.accepted())


def render(results: Mapping[str, Result], command: str = _COMMAND) -> str:
    """Return the page.

    Args:
        results: The results of each strategy by name.
        command: The command that writes the page.
    """
    ran = sum(len(result.ran) for result in results.values())
    failed = sum(len(result.failed) for result in results.values())
    situations = _table(
        ["strategy", *(s.name for s in SITUATIONS)],
        ([name, *(r.mark(situation=s) for s in SITUATIONS)] for name, r in results.items()),
    )
    structures = _table(
        ["strategy", "structure", *(p.name for p in PRECISIONS)],
        (row for name, result in results.items() for row in _structure_rows(name, result)),
    )
    failures = "".join(
        f"- {name}, {cell}: {reason.splitlines()[0] if reason else 'no message'}\n"
        for name, result in results.items()
        for cell, reason in result.failed.items()
    )
    text = _PAGE.format(
        saved_at=SAVED_AT,
        ways=f"{len(CHECKS)} ways ({', '.join(CHECKS)})",
        steps=STEPS,
        passed=f"{ran - failed} of {ran}",
        command=command,
        situations=situations,
        mark=_PASSED,
        without=NO_STRUCTURE,
        structures=structures,
        no_decay=f'"{_NO_DECAY}"',
        policies=_table(
            ["strategy", *POLICIES],
            ([name, *_policy_marks(result)] for name, result in results.items()),
        ),
    )
    return text + (f"\n## Failures\n\n{failures}" if failures else "")


def _structure_rows(name: str, result: Result) -> Iterable[list[str]]:
    contract = result.contract
    for structure in contract.structures:
        marks = (result.mark(structure=structure, precision=p) for p in PRECISIONS)
        yield [name, structure, *marks]
    refused = [s for s in contract.refused() if s not in result.accepted]
    if refused:
        yield [name, ", ".join(refused), *[contract.refusal] * len(PRECISIONS)]
    if result.accepted:
        yield [name, ", ".join(result.accepted), *["✗ not refused"] * len(PRECISIONS)]


def _policy_marks(result: Result) -> Iterable[str]:
    ran = {cell.policies for cell in result.ran}
    return (result.mark(policies=name) if name in ran else _NO_DECAY for name in POLICIES)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and write the page; return 1 if something fails."""
    parser = argparse.ArgumentParser(prog=_COMMAND, description="Write the conformance matrix.")
    parser.add_argument("--output", type=Path, default=Path("docs/conformance.md"))
    parser.add_argument("--pairs", action="store_true", help="pairs of settings only: minutes")
    parser.add_argument("--only", choices=CONTRACTS, help="one strategy")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {}
    for name, contract in CONTRACTS.items():
        if given.only in (None, name):
            results[name] = examine(contract, given.pairs)
            ran, failed = len(results[name].ran), len(results[name].failed)
            print(f"{name}: {ran - failed} of {ran} cells pass", flush=True)
    command = " ".join([_COMMAND, *(["--pairs"] if given.pairs else [])])
    given.output.write_text(render(results, command), encoding="utf-8")
    return int(any(result.failed or result.accepted for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
