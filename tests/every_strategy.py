"""The strategies of the table, for tests that run on all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import structprecond
from structprecond import Strategy, StructuredOptimizer
from structprecond.testing.table import STRATEGIES

Make = Callable[..., StructuredOptimizer]

PROTOCOL = {name: usage for name, usage in STRATEGIES.items() if usage.protocol}
"""Those whose optimizers need nothing but gradients."""

MAKERS: dict[str, Make] = {name: usage.make for name, usage in PROTOCOL.items()}
every_strategy = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)

OPTIMIZERS: tuple[Any, ...] = tuple(
    dict.fromkeys(
        usage.optimizer for usage in STRATEGIES.values() if usage.optimizer != StructuredOptimizer
    )
)
"""The optimizers of the library, each once."""


def strategy_of(optimizer: Any) -> type[Strategy[Any]]:
    """Return the strategy of an optimizer by name."""
    strategy: type[Strategy[Any]] = getattr(structprecond, f"{optimizer.__name__}Strategy")
    return strategy
