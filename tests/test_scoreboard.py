"""The scoreboard: its search, its records, its tasks and its tables."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import report
import scoreboard
import torch
from char_lm import Shape, load_corpus
from entrants import BASELINE, ENTRANTS, KNOWN, RIVAL, VARIANTS, WIDTHS, Entrant
from records import Records, Setting, claimed
from search import search
from tasks.burgers import Burgers, Points, residual
from tasks.digits import Digits
from tasks.language import Language
from tasks.toys import TOYS
from torch import nn
from training import Run

from tests.test_examples_lm import is_png, rows_of

# --- the search ----------------------------------------------------------------------------------


def valley(lr: float, momentum: float) -> float:
    """Best at 0.04 and 0.9."""
    return abs(math.log2(lr / 0.04)) + 10 * abs(momentum - 0.9)


def test_the_search_finds_the_best_inside_its_budget() -> None:
    found = search(valley, 0.01, 0.95, (0.9,), budget=8)
    assert found.best == (0.04, 0.9)
    assert found.bracketed
    assert list(found.losses)[:3] == [(0.01, 0.95), (0.02, 0.95), (0.005, 0.95)]
    assert len(found.losses) <= 8


def test_the_search_stops_early_where_it_starts_at_the_best() -> None:
    found = search(valley, 0.04, 0.9, (0.95,), budget=8)
    assert found.best == (0.04, 0.9)
    assert len(found.losses) == 4


def test_the_search_says_that_it_ended_on_an_edge() -> None:
    found = search(lambda lr, momentum: -lr, 1.0, 0.9, (0.95,), budget=6)
    assert len(found.losses) == 6
    assert not found.bracketed


def test_runs_that_diverge_are_the_worst() -> None:
    found = search(lambda lr, m: math.inf if lr > 0.01 else -lr, 0.01, 0.9, (), budget=6)
    assert found.best == (0.01, 0.9)
    assert found.bracketed


# --- records -------------------------------------------------------------------------------------

SETTING = Setting("language", BASELINE, "", 0.1, 0.9, 0, 10)


def test_records_survive_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "runs.jsonl"
    records = Records(path)
    records.add(SETTING, Run("one", 0.1, 0, 10, [(0, 0.0, 2.0), (10, 1.0, 1.0)], 0.1))
    records.add(replace(SETTING, seed=1), Run("two", 0.1, 1, 10, [(0, 0.0, 3.0)], 0.1))
    records.add_times({BASELINE: [1.0, 2.0]})
    whole = path.read_text()
    again = Records(path)
    assert again.runs[SETTING].final_loss == 1.0
    assert len(again.runs) == 2
    assert again.times[0]["times"] == {BASELINE: [1.0, 2.0]}
    path.write_text(whole[: whole.index("two") + 1])
    cut = Records(path)
    assert list(cut.runs) == [SETTING]
    cut.add(replace(SETTING, seed=2), Run("three", 0.1, 2, 10, [(0, 0.0, 3.0)], 0.1))
    assert set(Records(path).runs) == {SETTING, replace(SETTING, seed=2)}


def test_other_settings_are_other_runs(tmp_path: Path) -> None:
    records = Records(tmp_path / "runs.jsonl")
    records.add(SETTING, Run("one", 0.1, 0, 10, [(0, 0.0, 2.0)], 0.1))
    with pytest.raises(scoreboard.MissingRunError):
        scoreboard.from_records(records, replace(SETTING, settings="weight_decay 1"))


def test_two_processes_do_not_do_the_same(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    with claimed(path, "a task") as ours, claimed(path, "a task") as theirs:
        assert ours
        assert not theirs
        with claimed(path, "another task") as other:
            assert other
    with claimed(path, "a task") as ours:
        assert ours


# --- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_toys_are_solved_at_their_solution_and_not_at_the_start(name: str) -> None:
    toy = TOYS[name]()
    torch.manual_seed(0)
    model = toy.model()
    assert toy.evaluate(model) > 3 * toy.target
    loss = toy.loss(model, next(toy.batches(0)))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    toy.solve(model)
    assert toy.evaluate(model) < 0.1 * toy.target


def test_the_residual_of_burgers_equation_is_zero_for_a_solution() -> None:
    class Shock(nn.Module):
        """The exact solution u = x / (t - 2), which viscosity does not change."""

        def forward(self, points: torch.Tensor) -> torch.Tensor:
            t, x = points.unbind(1)
            return (x / (t - 2)).unsqueeze(1)

    points = Points(0)
    for part in (points.start, points.sides):
        part.zero_()  # at x = 0, start and sides agree with it
    assert residual(Shock(), points).item() < 1e-10
    assert Burgers().evaluate(Shock()) > 0.1


def test_digits_are_moved_and_held_out() -> None:
    task = Digits()
    images, labels = next(task.batches(0))
    assert images.shape == (64, 1, 8, 8)
    assert labels.shape == (64,)
    other, _ = next(task.batches(1))
    assert not torch.equal(images, other)
    assert math.log(10) * 0.8 < task.evaluate(task.model()) < math.log(10) * 1.2


def test_names_tell_settings_apart() -> None:
    """One name for two settings would hide the runs of one of them."""
    for names in (ENTRANTS, VARIANTS, WIDTHS):
        assert all(KNOWN[name].settings == one.settings for name, one in names.items())


# --- races ---------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[Setting]:
    """A tiny language model for two entrants, and the settings that were run."""
    shape = Shape(layers=1, width=16, heads=2, context=16, batch=4)
    task = Language(shape, load_corpus(limit=200_000))
    monkeypatch.setattr(Language, "steps", 4)
    monkeypatch.setitem(scoreboard.TASKS, "language", lambda: task)
    for name in (BASELINE, "SOAP"):
        monkeypatch.setitem(ENTRANTS, name, replace(ENTRANTS[name], seeds=2))
    done: list[Setting] = []
    do = scoreboard.do

    def recorded(setting: Setting) -> Run:
        done.append(setting)
        return do(setting)

    monkeypatch.setattr(scoreboard, "do", recorded)
    return done


def test_a_race_does_each_run_once_and_resumes(tmp_path: Path, tiny: list[Setting]) -> None:
    path = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "language", "--entrants", BASELINE, "SOAP", "--out", str(path)]
    scoreboard.main(arguments)
    assert len(tiny) == len(set(tiny))
    assert {s.seed for s in tiny} == {0, 1, 2}
    lines = path.read_text().splitlines()
    assert len(lines) == len(tiny)
    run = json.loads(lines[0])["run"]
    assert run["curve"][-1][0] == 4
    path.write_text("\n".join(lines)[:-30])
    last = tiny[-1]
    tiny.clear()
    scoreboard.main(arguments)
    assert tiny == [last]


# heavyball compiles its steps, for minutes
@pytest.mark.parametrize("name", [n for n, one in ENTRANTS.items() if one.package != "heavyball"])
def test_every_entrant_makes_an_optimizer_with_its_momentum(name: str) -> None:
    entrant = ENTRANTS[name]
    if not entrant.available:
        assert entrant.package not in ("structprecond", "torch")
        return
    for momentum in (entrant.momentum, *entrant.momenta):
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
        optimizer = entrant.make(model, 0.01, momentum, 8)
        before = [p.detach().clone() for p in model.parameters()]
        for _ in range(3):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        parts: Any = [part for _, part in getattr(optimizer, "_parts", [])] or [optimizer]
        shown = {str(v) for part in parts for g in part.param_groups for v in g.values()}
        assert any(str(momentum) in value for value in shown)


def test_the_combined_torch_muon_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    optimizer: Any = ENTRANTS[RIVAL].make(model, 0.01, 0.9, 8)
    kinds = {type(part): group["params"] for group, part in optimizer._parts}
    assert [p.shape for p in kinds[torch.optim.Muon]] == [(6, 4), (6, 6)]
    assert len(kinds[torch.optim.AdamW]) == 4
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert {part.param_groups[0]["lr"] for _, part in optimizer._parts} == {0.5}


# --- the report ----------------------------------------------------------------------------------


def fill(records: Records, task: str, name: str, entrant: Entrant, ends: list[float]) -> None:
    """Add runs whose loss falls along a line from 4; the recommended settings are the best."""

    def get(setting: Setting) -> Run:
        if setting not in records.runs:
            off = abs(math.log2(setting.lr / entrant.lr)) + (setting.momentum != entrant.momentum)
            end = ends[setting.seed - 1] if setting.seed else 3.0 + off
            curve = [(0, 0.0, 4.0), (setting.steps, 10.0, end)]
            records.add(setting, Run(name, setting.lr, setting.seed, setting.steps, curve, 0.1))
        return records.runs[setting]

    scoreboard.campaign(get, task, name)


def test_the_page_shows_what_is_in_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (BASELINE, RIVAL, "SOAP")
    for name in names:
        monkeypatch.setitem(ENTRANTS, name, replace(ENTRANTS[name], seeds=3))
    monkeypatch.setitem(scoreboard.TASKS, "language", Burgers)
    records = Records(tmp_path / "runs.jsonl")
    ends = {BASELINE: [3.0, 3.1, 2.9], RIVAL: [2.0, 2.1, 2.2], "SOAP": [1.0, 1.1, 1.05]}
    for name in names:
        for task in ("language", "burgers"):
            fill(records, task, name, ENTRANTS[name], ends[name])
        fill(records, "saddle", name, ENTRANTS[name], [])
    records.add_times({BASELINE: [1.0, 2.0, 1.0], RIVAL: [1.1, 2.2, 1.1], "SOAP": [1.5, 3.0, 4.0]})
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("before\n\n<!-- scoreboard -->\nold\n<!-- /scoreboard -->\n\nafter\n")
    report.write(records, tmp_path)
    page = (tmp_path / "docs" / "scoreboard.md").read_text()
    tables = page.split("\n\n")
    rows = rows_of(
        next(part for part in tables if part.startswith("| optimizer") and " p " in part)
    )
    assert next(iter(rows)) == "SOAP"
    soap, base = rows["SOAP"], rows[BASELINE]
    assert base["validation loss"] == "3.000 ± 0.100"
    assert base["steps"] == "1.00"
    # along the line from 4 to `end`, the target 3 is reached at 1 / (4 - end) of the steps
    steps = [1 / (4 - end) for end in ends["SOAP"]]
    mean = statistics.fmean(steps)
    assert soap["steps"] == f"{mean:.3f} ± {statistics.stdev(steps):.3f}"
    assert soap["time of a step"] == "1.50"
    assert soap["seconds"] == f"{1.5 * mean:.2f}"
    assert soap["untouched"] == "3.000"
    rival = [1 / (4 - end) for end in ends[RIVAL]]
    assert float(soap["p"]) == pytest.approx(welch(steps, rival), rel=0.1)
    assert rows[RIVAL]["p"] == "-"
    for name in ("curves", "pareto", "toys"):
        assert is_png(tmp_path / "docs" / "images" / f"scoreboard_{name}.png")
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| SOAP" in text


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def welch(one: list[float], other: list[float]) -> float:
    """Return p by the formula of Welch, with the distribution of t integrated numerically."""
    a, b = statistics.variance(one) / len(one), statistics.variance(other) / len(other)
    t = (statistics.fmean(one) - statistics.fmean(other)) / math.sqrt(a + b)
    df = (a + b) ** 2 / (a**2 / (len(one) - 1) + b**2 / (len(other) - 1))
    norm = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
    width = 1e-3
    xs = [t - (i + 0.5) * width for i in range(400_000)]
    return sum(norm * (1 + x * x / df) ** (-(df + 1) / 2) for x in xs) * width


def test_losses_that_diverged_are_shown_as_such() -> None:
    assert report.mean_and_deviation([1.0, math.inf]) == "1 of 2 diverged"
    assert report.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    assert report.geometric_mean([1.0, math.inf]) == math.inf
