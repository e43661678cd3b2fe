"""Every strategy of the library keeps the contract; one class of tests each."""

from __future__ import annotations

from structprecond.testing.table import CONTRACTS

# pytest collects classes by the names that they have in the module
globals().update(
    {f"Test{''.join(filter(str.isalnum, name))}": tests for name, tests in CONTRACTS.items()}
)
