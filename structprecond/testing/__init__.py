"""Contract suites: subclass one, and your own structure, grouping rule or strategy is tested.

Needs pytest and hypothesis. The suites check structures against dense arithmetic and strategies
against themselves, saved and resumed, copied, and disturbed, so they ask for nothing but what is
under test.
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
