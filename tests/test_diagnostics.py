"""Diagnostics, against numbers computed by hand around a step."""

import math

import pytest
import torch
from torch import nn

from structprecond import SAM, SOAP, AdamW, Diagnostics, KLShampoo, Muon, to_tensorboard
from structprecond.errors import StructPrecondError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model):
    model.zero_grad()
    model(torch.linspace(-1, 1, 30).reshape(5, 6)).square().sum().backward()


def train(model, optimizer, steps):
    for _ in range(steps):
        backward(model)
        optimizer.step()


@pytest.mark.parametrize("optimizer", [SOAP, Muon, AdamW])
def test_sizes_are_those_around_the_step(optimizer):
    model = network()
    made = optimizer(model, lr=0.1)
    train(model, made, 3)
    backward(model)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.double() for name, p in model.named_parameters()}
    with Diagnostics(made, every=1) as watched:
        made.step()
    assert watched.latest.step == 3
    assert [one.name for one in watched.latest.parameters] == list(before)
    for one in watched.latest.parameters:
        change = model.get_parameter(one.name).detach().double() - before[one.name]
        assert one.update_rms == pytest.approx(change.square().mean().sqrt().item(), rel=1e-5)
        weight = before[one.name].square().mean().sqrt().item()
        assert one.weight_rms == pytest.approx(weight, rel=1e-5)
        assert one.ratio == pytest.approx(one.update_rms / weight, rel=1e-5)
        assert one.grad_norm == pytest.approx(grads[one.name].norm().item(), rel=1e-5)


@pytest.mark.parametrize("structure", ["dense", "block4diagonal"])
@pytest.mark.parametrize("optimizer", [SOAP, KLShampoo])
def test_condition_and_staleness_of_dense_oracles(optimizer, structure):
    model = nn.Linear(8, 12, bias=False)
    made = optimizer(model, lr=0.1, structures=structure, precondition_frequency=3)
    with Diagnostics(made, every=1) as watched:
        for i in range(5):
            torch.manual_seed(i)
            model.weight.grad = torch.randn(12, 8)
            made.step()
    state = made.buckets[0].state
    conditions, ratios = [], []
    for S, Q in zip(state.factors, state.bases, strict=True):
        rotated = Q.to_dense()[0].double().T @ S.to_dense()[0].double() @ Q.to_dense()[0].double()
        size = 4 if structure == "block4diagonal" else len(rotated)
        for start in range(0, len(rotated), size):
            block = rotated[start : start + size, start : start + size]
            values = block.diagonal()
            conditions.append((values.max() / values.min()).item())
            ratios.append(((block - values.diag()).norm() / block.norm()).item())
    (unit,) = watched.latest.units
    assert unit.condition == pytest.approx(max(conditions), rel=1e-3)
    assert unit.staleness == pytest.approx(max(ratios), rel=1e-3)
    assert 0 < unit.staleness < 1
    assert unit.updates == 4  # the first gradient only initializes


def test_only_every_nth_step_is_watched_and_logged():
    model = network()
    seen: list[tuple[dict[str, float], int]] = []
    optimizer = SOAP(model)
    watched = Diagnostics(
        optimizer, every=4, log=lambda numbers, step: seen.append((numbers, step))
    )
    train(model, optimizer, 9)
    assert [step for _, step in seen] == [0, 4, 8]
    assert seen[2][0] == watched.latest.as_dict()
    numbers = seen[2][0]
    assert numbers["update_rms/0.weight"] > 0
    assert numbers["updates/2.weight"] == 8
    assert numbers["step_seconds"] > 0
    assert not any(map(math.isnan, numbers.values()))
    watched.close()
    train(model, optimizer, 4)
    assert len(seen) == 3


def test_watching_changes_nothing():
    plain, watched = network(), network()
    train(plain, SOAP(plain), 6)
    optimizer = SOAP(watched)
    with Diagnostics(optimizer, every=2):
        train(watched, optimizer, 6)
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)


def test_skipped_units_and_missing_gradients_show():
    model = network()
    optimizer = SOAP(model)
    train(model, optimizer, 2)
    backward(model)
    model[2].weight.grad[0, 0] = float("nan")
    model[4].bias.grad = None
    watched = Diagnostics(optimizer, every=1)
    with pytest.warns(UserWarning, match=r"2\.weight"):
        optimizer.step()
    skipped = {unit.name: unit.skipped for unit in watched.latest.units}
    assert skipped == {name: int(name == "2.weight") for name in skipped}
    sizes = {one.name: one for one in watched.latest.parameters}
    assert sizes["2.weight"].update_rms == 0
    assert math.isnan(sizes["4.bias"].grad_norm)
    assert "grad_norm/4.bias" not in watched.latest.as_dict()


def test_sam_and_low_precision():
    model = network().bfloat16()
    optimizer = SAM(None, SOAP(model, lr=0.1))

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(5, 6, dtype=torch.bfloat16)).square().sum()
        loss.backward()
        return loss

    with Diagnostics(optimizer, every=1) as watched:
        for _ in range(2):
            optimizer.step(closure)
    assert watched.latest.step == 1
    assert watched.latest.parameters[0].update_rms > 0


def test_tables_and_tensorboard():
    written = {}

    class Writer:
        def add_scalar(self, name, value, step):
            written[name, step] = value

    model = network()
    optimizer = SOAP(model)
    with Diagnostics(optimizer, log=to_tensorboard(Writer())) as watched:
        train(model, optimizer, 1)
    assert written["weight_rms/0.weight", 0] == watched.latest.parameters[0].weight_rms
    text = str(watched.latest)
    assert "update / weight" in text
    assert "staleness" in text
    assert text.count("0.weight") == 2


def test_mistakes():
    model = network()
    with pytest.raises(StructPrecondError, match="optimizers of this library, got a SGD"):
        Diagnostics(torch.optim.SGD(model.parameters()))
    with pytest.raises(StructPrecondError, match="every"):
        Diagnostics(SOAP(model), every=0)
    with pytest.raises(StructPrecondError, match="No step was watched"):
        print(Diagnostics(SOAP(model)).latest)
    with pytest.raises(StructPrecondError, match="to_tensorboard"):
        Diagnostics(SOAP(model), log=object())  # type: ignore[arg-type]
