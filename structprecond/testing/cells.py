"""One cell of the conformance matrix: an interrupted run must continue bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from structprecond.core.policies import (
    CapRMS,
    CautiousDecay,
    CautiousUpdate,
    Hyperball,
    MatchRMS,
    Policy,
)
from structprecond.testing.comparing import first_difference
from structprecond.testing.runs import PRECISIONS, Make, Precision, Run
from structprecond.testing.situations import SAVED_AT, SITUATIONS, STEPS, Situation

NO_STRUCTURE = "-"
"""The structure of a strategy without Kronecker factors."""

STRUCTURES = (
    "dense",
    "diagonal",
    "block2diagonal",
    "hierarchical1_1",
    "triltoeplitz",
    "triutoeplitz",
    "triltopleftdiag",
    "trilbottomrightdiag",
    "triutopleftdiag",
    "triubottomrightdiag",
    "none",
)
"""One name per structure of `SUPPORTED_STRUCTURES`."""


NO_POLICY = "-"
"""The policies of a strategy without any."""

POLICIES: dict[str, tuple[Policy, ...]] = {
    "MatchRMS": (MatchRMS(0.1),),
    "CapRMS": (CapRMS(0.1),),
    "CautiousUpdate": (CautiousUpdate(),),
    "CautiousDecay": (CautiousDecay(),),
    "Hyperball": (Hyperball(),),
    "three": (CautiousUpdate(), MatchRMS(0.1), Hyperball()),
}
"""Policies by name."""


@dataclass(frozen=True)
class Cell:
    """A combination of settings.

    Args:
        structure: The structure of all factors, or `NO_STRUCTURE`.
        precision: The dtypes of storage and computation.
        situation: The course of training.
        check: The kind of interruption, a key of `CHECKS`.
        policies: The policies, a key of `POLICIES`. Default: `NO_POLICY`.
    """

    structure: str
    precision: Precision
    situation: Situation
    check: str
    policies: str = NO_POLICY

    def __str__(self) -> str:
        settings = (self.structure, self.precision, self.situation, self.check, self.policies)
        return ", ".join(map(str, settings))

    @property
    def overrides(self) -> dict[str, Any]:
        """The arguments that replace the strategy's own."""
        structures = {} if self.structure == NO_STRUCTURE else {"structures": self.structure}
        policies = {} if self.policies == NO_POLICY else {"policies": POLICIES[self.policies]}
        return structures | policies


def _resume(run: Run, make: Make, cell: Cell) -> Run:
    # another seed, so that values that are not loaded differ
    fresh = Run(make, cell.situation, cell.precision, cell.overrides, seed=1)
    return fresh.load(run.save(), run.done)


def _deepcopy(run: Run, make: Make, cell: Cell) -> Run:
    return run.with_copy(*copy.deepcopy((run.model, run.optimizer, run.scaler)))


def _pickle(run: Run, make: Make, cell: Cell) -> Run:
    return run.with_copy(*pickle.loads(pickle.dumps((run.model, run.optimizer, run.scaler))))


CHECKS: dict[str, Callable[[Run, Make, Cell], Run]] = {
    "resume": _resume,
    "deepcopy": _deepcopy,
    "pickle": _pickle,
}
"""Functions that make a second run from an interrupted one, by name."""

FACTORS = {"precision": PRECISIONS, "situation": SITUATIONS, "check": tuple(CHECKS)}
"""The settings for every strategy, besides its structures."""


def run_cell(make: Make, *cells: Cell) -> None:
    """Interrupt a run, continue it in a second run, and then continue the first one.

    Args:
        make: Builds the optimizer.
        cells: The settings. Cells that differ only in the check share the first run.

    Raises:
        AssertionError: If the runs end in different bits, if the interruption or the second run
            changes the first one, or if a step breaks a promise, see `Run`.
    """
    first = cells[0]
    run = Run(make, first.situation, first.precision, first.overrides).train_until(SAVED_AT)
    held = run.optimizer.state_dict()
    at_fork = copy.deepcopy(run.values())
    others = {cell.check: CHECKS[cell.check](run, make, cell) for cell in cells}
    for check, other in others.items():
        _assert_same(other, at_fork, f"{check} changes the run that it interrupts")
        other.train_until(STEPS)
        _assert_same(run, at_fork, f"the run after {check} changes the first run")
    run.train_until(STEPS)
    for check, other in others.items():
        _assert_same(other, run.values(), f"the runs differ after {check}")
    difference = first_difference(held, at_fork["optimizer"])
    assert difference is None, f"training changes a returned state_dict: {difference}"
    assert first_difference(run.values()["model"], at_fork["model"]), "no step changed the model"


def _assert_same(run: Run, values: dict[str, Any], what: str) -> None:
    difference = first_difference(run.values(), values)
    assert difference is None, f"{what}: {difference}"
