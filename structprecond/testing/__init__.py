"""Contract suites: subclass one to test your own structure, grouping or strategy.

Needs pytest and hypothesis. The suites compare structures with dense arithmetic, and strategies
with saved, copied and disturbed runs of themselves, so you supply only the class under test.
"""

from structprecond.testing.covering import covering_array
from structprecond.testing.groups import PreconditionerGroupContract
from structprecond.testing.strategies import StrategyContract
from structprecond.testing.structures import StructuredMatrixContract

__all__ = [
    "PreconditionerGroupContract",
    "StrategyContract",
    "StructuredMatrixContract",
    "covering_array",
]
