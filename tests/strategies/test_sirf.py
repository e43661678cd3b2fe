"""SIRF-Shampoo against the published implementation."""

from __future__ import annotations

import pytest

import structprecond
from structprecond import SIRFShampoo
from tests import golden


def _structures(value: object) -> object:
    """Undo what JSON makes of `{2: ("dense", "diagonal")}`."""
    if not isinstance(value, dict):
        return value
    return {int(k): tuple(v) if isinstance(v, list) else v for k, v in value.items()}


@pytest.mark.parametrize("name", golden.names("sirf_"))
def test_reproduces_the_published_trajectory(name: str) -> None:
    recorded = golden.load(name)
    kwargs = recorded.kwargs
    kwargs["structures"] = _structures(kwargs["structures"])
    rules = tuple(getattr(structprecond, rule)() for rule in recorded.meta["combine_params"])
    model = recorded.model()
    optimizer = SIRFShampoo(model, combine_params=rules, **kwargs)
    assert recorded.replay(model, optimizer) < 1e-9
