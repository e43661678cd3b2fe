"""Batch norm counts only the first pass of SAM."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD

from structprecond import (
    SAM,
    SOAP,
    freeze_batch_norm,
)
from tests.helpers import (
    data,
    same_bits,
)
from tests.sharpness.helpers import closure_of, fail, train


class Normed(nn.Module):
    """A model with batch norm of several kinds."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4, momentum=momentum)
        self.no_statistics = nn.BatchNorm1d(4, track_running_stats=False)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.no_statistics(self.norm(self.first(x)).tanh()))
        return output


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("training", [True, False])
def test_freeze_batch_norm(training: bool, momentum: float | None) -> None:
    model = Normed(momentum).double()
    for step in range(2):
        model(data(step)[0])
    model.train(training)
    expected = copy.deepcopy(model)(data(2)[0])
    before = statistics(model)
    with freeze_batch_norm(model), freeze_batch_norm(model.norm):
        assert same_bits(model(data(2)[0]).detach(), expected.detach())
    assert same_bits(statistics(model), before)
    assert list(before) == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    with pytest.raises(RuntimeError, match="out of luck"), freeze_batch_norm(model):
        fail()
    assert model.norm.track_running_stats
    assert not model.no_statistics.track_running_stats
    model.train()
    model(data(3)[0])
    assert not same_bits(statistics(model), before)


@pytest.mark.parametrize("known", ["params", "base"])
def test_closure_counts_the_first_pass_alone_in_batch_norm(known: str) -> None:
    model = Normed().double()
    twin = copy.deepcopy(model)
    sam = SAM(model, SGD, lr=0.1) if known == "params" else SAM(None, SOAP(model))
    train(model, sam, 1)
    twin(data(0)[0])
    assert same_bits(statistics(model), statistics(twin))
    calls = 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("out of data")
        return closure_of(model, 0)()

    with pytest.raises(RuntimeError, match="out of data"):
        sam.step(closure)
    assert model.norm.track_running_stats


def test_model_that_is_not_known_is_left_alone() -> None:
    model = Normed().double()
    twin = copy.deepcopy(model)
    train(model, SAM(model.parameters(), SGD, lr=0.0), 1)
    for _ in range(2):
        twin(data(0)[0])
    assert model.norm.num_batches_tracked == twin.norm.num_batches_tracked == 2
