"""Estimates, against optimizers that were really built and stepped."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from structprecond import SOAP, AdamW, Muon, SIRFShampoo, estimate
from structprecond.core.strategy import interval_of
from structprecond.errors import StructPrecondError
from tests.every_strategy import Make, every_strategy


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(24, 24) for _ in range(3)]
    return nn.Sequential(nn.Linear(8, 24), *layers, nn.LayerNorm(24), nn.Linear(24, 5))


def fill_gradients(model):
    for p in model.parameters():
        p.grad = torch.randn_like(p)


def bytes_of(optimizer):
    tensors = [t for bucket in optimizer.buckets for t in bucket.named_tensors().values()]
    return sum(t.numel() * t.element_size() for t in tensors)


@every_strategy
def test_bytes_and_products_are_those_of_a_real_step(make: Make):
    model = network()
    costs = estimate(model, make)
    optimizer = make(model)
    assert costs.state_bytes == bytes_of(optimizer)
    for group in optimizer.param_groups:
        for bucket in optimizer.buckets:  # refreshes need products too
            group |= {f"{bucket.prefix}{interval_of(bucket.strategy)}": 1000}
    for _ in range(12):  # the first ones differ: moments and roots begin
        fill_gradients(model)
        with FlopCounterMode(display=False) as counted:
            optimizer.step()
    assert costs.step_flops == pytest.approx(counted.get_total_flops(), rel=0.05)


def test_the_copy_takes_no_memory_and_the_model_keeps_its_own():
    model = network()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    seen = []

    def make(copy, **settings):
        seen.append(copy)
        return SOAP(copy, **settings)

    estimate(model, make, lr=0.1)
    assert {p.device.type for p in seen[0].parameters()} == {"meta"}
    for name, p in model.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])


def test_tied_and_frozen_parameters_stay_so():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False))
    model[2].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    costs = estimate(model, AdamW)
    # two moments each; the table has the frozen bias without state
    entries = 50 * 8 + 8 * 8
    assert 0 <= costs.state_bytes - 2 * 4 * entries < 200
    assert [row.live for row in costs.description.rows].count(False) == 1
    assert len(costs.costs) == 2


def test_structures_and_routes_show_in_the_estimate():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 10, bias=False))
    dense, diagonal = (estimate(model, SOAP, structures=s) for s in ("dense", "diagonal"))
    # the factor and the basis of both axes of both matrices
    assert dense.state_bytes - diagonal.state_bytes == 4 * 2 * (2 * 64**2 + 64**2 + 10**2)
    assert diagonal.step_flops == diagonal.refresh_flops == 0
    # rotate, rotate back and average along two axes: two operations each
    assert dense.step_flops == sum(3 * 2 * 64 * n * (64 + n) for n in (64, 10))
    assert dense.mean_flops == dense.step_flops + dense.refresh_flops / 10
    names = {cost.row.names[0]: cost.row.strategy for cost in estimate(model, Muon).costs}
    assert names == {"0.weight": "MuonStrategy", "1.weight": "AdamWStrategy"}


def test_batch_sizes_and_bf16_parameters():
    costs = estimate(network().bfloat16(), SIRFShampoo, batch_size=4)
    assert costs.description.parameter_bytes == 2 * sum(p.numel() for p in network().parameters())
    assert costs.step_flops > 0


def test_the_table_has_a_line_per_stack_and_the_totals():
    text = str(estimate(network(), SOAP))
    assert "0.weight" in text
    assert "1.weight and 2 more" in text
    assert text.splitlines()[-1].startswith("a step takes ")


def test_a_model_is_needed():
    with pytest.raises(StructPrecondError, match="needs the model"):
        estimate(SOAP, network())  # type: ignore[arg-type]


def test_an_optimizer_of_this_library_is_needed():
    def make(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    with pytest.raises(StructPrecondError, match="made a SGD"):
        estimate(network(), make)
