"""Every strategy of the library fulfills the contract, in one test class each."""

from __future__ import annotations

from structprecond.testing.table import CONTRACTS

# pytest collects classes by their names in the module
globals().update(
    {f"Test{''.join(filter(str.isalnum, name))}": tests for name, tests in CONTRACTS.items()}
)
