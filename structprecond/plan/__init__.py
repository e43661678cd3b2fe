"""Tells what an optimizer costs on each of many ranks, without any: `python -m structprecond.plan`.

No module of the library imports this package, which imports `torch.distributed`.
"""

from structprecond.plan.forecast import Forecast, RankCost, UnitCost
from structprecond.plan.make import plan

__all__ = ["Forecast", "RankCost", "UnitCost", "plan"]
