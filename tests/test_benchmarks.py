"""The benchmarks run, shortened, and their figures are correct."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import compiled
import contestants
import plans
import pytest
import roofline
import scaling
import step_time
import torch
import workloads
from torch import nn

from structprecond import SOAP, AdamW, SIRFShampoo
from structprecond.plan import plan
from structprecond.strategies.kl import KLShampooStrategy


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A workload of a few small matrices."""

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleList([nn.Embedding(5, 6), *(nn.Linear(6, 4) for _ in range(3))])

    monkeypatch.setitem(workloads.WORKLOADS, "tiny", model)
    threads = torch.get_num_threads()
    yield "tiny"
    torch.set_num_threads(threads)


def test_races_have_the_same_rules_for_all(tiny: str) -> None:
    # both time the same step: our Muon and torch's end up in the same place
    ours = workloads.WORKLOADS[tiny]()
    theirs = copy.deepcopy(ours)
    pairs = [
        (ours, contestants.RACES["muon, float32"][contestants.OURS](ours)),
        (theirs, contestants.RACES["muon, float32"]["torch"](theirs)),
    ]
    start = [p.detach().clone() for p in ours.parameters()]
    for seed in range(3):
        for model, optimizer in pairs:
            workloads.fill_gradients(model, seed)
            optimizer.step()
    # except for epsilons and the settings of AdamW for the embedding and the biases
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        if p.shape == (4, 6):
            assert (p - q).norm() < 1e-3 * (q - before).norm()
        assert not torch.equal(q, before)


def test_a_race_sums_up_cycles_and_state(tiny: str) -> None:
    builds = {
        contestants.OURS: AdamW,
        "torch": lambda model: torch.optim.AdamW(model.parameters()),
        "missing": lambda model: __import__("no_such_package"),
    }
    results = step_time.race(tiny, "adamw", builds, cycles=1, device="cpu")  # type: ignore[arg-type]
    assert [r.name for r in results] == [contestants.OURS, "torch"]
    for result in results:
        assert 0 < result.mean <= result.worst < 1000
        # two moments in float32, and a few counters
        assert 8 <= result.state < 16
    table = step_time.report(results)
    ratio = f"{results[1].mean / results[0].mean:.2f}"
    assert f"| tiny | torch | {results[1].mean:.1f} | {results[1].worst:.1f} |" in table
    assert f" {ratio} | " in table


def test_state_outside_of_the_state_dict_counts() -> None:
    model = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert step_time.state_bytes(optimizer) == 0
    optimizer.hidden = {"factors": [torch.ones(3, 3), torch.ones(2, dtype=torch.float64)]}  # type: ignore[attr-defined]
    assert step_time.state_bytes(optimizer) == 9 * 4 + 2 * 8
    optimizer.owner = SimpleNamespace(optimizer=optimizer)  # type: ignore[attr-defined]
    optimizer.owner.owner = optimizer.owner  # type: ignore[attr-defined]
    assert step_time.state_bytes(optimizer) == 9 * 4 + 2 * 8
    ours = SIRFShampoo(model, batch_size=4)
    views = sum(t.numel() * t.element_size() for e in ours.state.values() for t in e.values())
    assert step_time.state_bytes(ours) == views


def test_tables_plot_and_json(
    tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "times.json"
    arguments = ["--workloads", tiny, "--races", "muon, float32", "--cycles", "1"]
    results = step_time.main([*arguments, "--threads", "1", "--json", str(out)])
    assert [r.name for r in results] == [contestants.OURS, "torch"]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert [entry["name"] for entry in json.loads(out.read_text())["results"]] == [
        contestants.OURS,
        "torch",
    ]
    capsys.readouterr()
    assert step_time.main(["--report", str(out)]) == results
    assert "| tiny | torch |" in capsys.readouterr().out


def test_the_floor_counts_what_cannot_be_saved() -> None:
    model = nn.ModuleList([nn.Linear(8, 4) for _ in range(3)])
    soap = roofline.soap_floor(model)
    # project, project back and outer products: 3 of 2 m n (m + n) each
    matrices = 3 * 2 * 4 * 8 * (4 + 8) * 3
    refreshes = 3 * (2 * 2 * 4 * 8 * (4 + 8) + 2 * (4**3 + 8**3)) / 10
    assert soap.flops() == pytest.approx(matrices + refreshes)
    assert sum(soap.decompositions.values()) == pytest.approx(0.2)
    assert soap.bytes == 4 * (7 * 3 * 36 + 3 * 3 * (16 + 64))
    muon = roofline.muon_floor(nn.ModuleList([nn.Linear(4, 4, bias=False)]))
    assert muon.flops() == 5 * 3 * 2 * 4**3
    assert muon.bytes == 4 * 5 * 16


def test_the_roofline_table(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--workloads", tiny, "--cycles", "1", "--threads", "1"]
    rows = roofline.main(arguments)
    assert [row[0] for row in rows] == ["soap", "muon, float32"]
    assert all(0 < floor < measured for _, _, floor, measured in rows)
    assert "| soap | tiny |" in capsys.readouterr().out


def test_gradients_depend_on_the_seed_alone() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(3, 2)
    workloads.fill_gradients(first, seed=1)
    workloads.fill_gradients(second, seed=1)
    assert first.weight.grad is not None
    assert torch.equal(first.weight.grad, second.weight.grad)  # type: ignore[arg-type]
    workloads.fill_gradients(second, seed=2)
    assert not torch.equal(first.weight.grad, second.weight.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "matrices", "numel"),
    [
        # 6 layers of 12 d^2 and 2 d, and the embedding
        ("W1", 36, 6 * (12 * 256**2 + 2 * 256) + 1024 * 256),
        ("W2", 200, 200 * (64**2 + 64)),
        ("W3", 24, 4 * 12 * 768**2),
        ("W4", 10, 9 * (4 * 64**2 + 64 * 128 + 3 * 128**2 + 128 * 256 + 256**2)),
    ],
)
def test_workloads_are_as_stated(name: str, matrices: int, numel: int) -> None:
    with torch.device("meta"):
        model = workloads.WORKLOADS[name]()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(linear) == matrices
    assert sum(p.numel() for p in model.parameters()) == numel


def test_staggered_refreshes_take_part(tiny: str) -> None:
    model = workloads.WORKLOADS[tiny]()
    optimizer = contestants.RACES["soap"]["structprecond, staggered"](model)
    assert isinstance(optimizer, SOAP)
    assert optimizer.refresh == "staggered"


def test_growth_is_fitted_and_reported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "import_seconds", partial(scaling.import_seconds, repeats=1))
    assert scaling.exponent([1, 2, 4], [3.0, 24.0, 192.0]) == pytest.approx(3.0)
    threads = torch.get_num_threads()
    arguments = ["--counts", "1", "2", "--widths", "2", "4", "--params", "1", "2"]
    found = scaling.main([*arguments, "--cycles", "1", "--threads", "1"])
    torch.set_num_threads(threads)
    assert len(found) == 12
    assert "| soap | 1: " in capsys.readouterr().out


def test_importing_does_not_import_the_compiler() -> None:
    script = "import sys, structprecond; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.filterwarnings("ignore")
def test_compiled_methods_are_timed_and_put_back(tiny: str) -> None:
    eager = KLShampooStrategy._direction
    arguments = ["--workloads", tiny, "--optimizers", "KLShampoo", "--cycles", "1"]
    ((workload, name, ratio),) = compiled.main([*arguments, "--threads", "1"])
    assert (workload, name) == (tiny, "KLShampoo")
    assert ratio > 0
    assert KLShampooStrategy._direction is eager


@pytest.mark.filterwarnings("ignore")
def test_compiled_steps_are_the_steps(tiny: str) -> None:
    model = workloads.WORKLOADS[tiny]()
    build, owner, methods = compiled.CASES["KLShampoo"]
    both = [
        step_time.Contestant("eager", build, model),
        compiled.Compiled("compiled", build, model, owner, methods),
    ]
    seen = []
    for contestant in both:
        for seed in range(3):
            contestant.step(seed)
        seen.append([p.detach().clone() for p in contestant.model.parameters()])
    for p, q in zip(*seen, strict=True):
        assert torch.allclose(p, q, atol=1e-5)


PAGE = plans.PAGE.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:Some Kronecker factors")
@pytest.mark.parametrize("model", plans.MODELS)
@pytest.mark.parametrize("optimizer", ["SOAP", "Muon"])
def test_the_page_of_plans_has_the_figures_of_today(model: str, optimizer: str) -> None:
    build, make = plans.MODELS[model], plans.OPTIMIZERS[optimizer]
    ends = [plan(build, make, world=world) for world in (plans.WORLDS[0], plans.WORLDS[-1])]
    shown = [
        [line.split(" | ")[2], line.split(" | ")[-1].removesuffix(" |")]
        for line in PAGE.splitlines()
        if line.startswith(f"| {model} | {optimizer} |")
    ]
    measures = (plans.state, plans.slowest, plans.busiest)
    assert shown == [[show(forecast) for forecast in ends] for show in measures]


@pytest.mark.filterwarnings("ignore:Some Kronecker factors")
def test_the_page_of_plans_has_the_remedies_of_today() -> None:
    assert plans.remedies() in PAGE


@pytest.mark.parametrize(
    ("model", "millions"), [("GPT-2 124M", 124), ("Llama 1B", 1236), ("Llama 7B", 6738)]
)
def test_language_models_have_the_sizes_of_their_names(model: str, millions: int) -> None:
    with torch.device("meta"):
        made = plans.MODELS[model]()
    assert round(sum(p.numel() for p in made.parameters()) / 1e6) == millions
