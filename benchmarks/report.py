"""The page of the scoreboard, and the table of the README, from finished runs alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from demo import table
from entrants import BASELINE, ENTRANTS, RIVAL, VARIANTS, WIDTHS
from matplotlib import pyplot as plt
from records import Records
from scipy import stats
from scoreboard import (
    FACTORS,
    TASKS,
    TUNED,
    MissingRunError,
    as_recommended,
    from_records,
    on_toy,
    on_width,
    repeats,
    setting_of,
    tuned,
)
from search import BUDGET, Found
from tasks.toys import TOYS
from training import Run

_MARKS = "<!-- scoreboard -->", "<!-- /scoreboard -->"
_PAGE = """# Scoreboard

Every optimizer gets the same weights, batches, number of steps and schedule (a linear warm-up over
a tenth of the steps, then a linear decay to zero), and the same budget to find its learning rate
and its momentum: {budget} runs with one seed, from its recommended settings on
(`structprecond.RECOMMENDED`; for other packages, what they recommend). The best settings then run
with other seeds. All figures come from `benchmarks/results/scoreboard.jsonl`, one JSON object a
line:

```bash
make scoreboard                            # does the missing runs
python benchmarks/scoreboard.py --time     # times the steps
python benchmarks/scoreboard.py --report   # writes this page
```

{machine}

## Language

A character-level transformer with 0.6 million parameters on the source text of Python's standard
library, 400 steps. The target is the mean final loss of {baseline}, {target:.3f}. "Steps" and
"seconds" are what an optimizer takes to the target, as a part of what {baseline} takes to the end;
seconds are steps times the time of a step, measured close to the start of training. "Untouched"
is the loss at the recommended settings with the seed of the search. p is that of a one-sided Welch
test that the optimizer takes fewer steps than {rival}. A learning rate has a star where the budget
ran out before half and twice of it were found to be worse.

{language}

![Validation loss over steps and seconds](images/scoreboard_curves.png)

![Seconds of a step and final loss](images/scoreboard_pareto.png)

## Burgers' equation and digits

A physics-informed network for Burgers' equation (1,000 steps, mean squared residual on points of
its own), and a convolutional classifier of handwritten digits with augmentation (300 steps,
held-out cross-entropy). Means over seeds, geometric ones for Burgers' equation.

{others}

## Learning rates

The best learning rate of each optimizer as a multiple of that of {baseline}:

{transfer}

## What structure buys

The language task at the recommended settings of SOAP, KL-Shampoo and SIRF-Shampoo with other
structures and refresh intervals, two seeds each, one thread; the last column is the time of a step
as a multiple of that of {baseline}.

{variants}

## Learning rates and width

The language task with models of three widths, 200 steps, one seed. The best of five learning rates,
a factor of 2 apart, and the losses of all five.

{widths}

## Toy problems

Solved at recommended settings and a learning rate of {factors} times the recommended one, with one
seed: how many of the four learning rates solve each problem.

{toys}
"""


@dataclass(frozen=True)
class Result:
    """The runs of an entrant on a task.

    Args:
        name: The entrant.
        found: What the search found.
        runs: The runs of the best settings.
        untouched: The loss at the recommended settings, with the seed of the search.
    """

    name: str
    found: Found
    runs: Sequence[Run]
    untouched: float

    @property
    def losses(self) -> list[float]:
        """The final losses."""
        return [run.final_loss for run in self.runs]

    def steps_to(self, target: float) -> list[float] | None:
        """Return the part of the steps that each run takes to a loss; None if one fails."""
        reached = [run.time_to(target) for run in self.runs]
        found = [r[0] / run.steps for r, run in zip(reached, self.runs, strict=True) if r]
        return found if len(found) == len(self.runs) else None

    @property
    def lr(self) -> str:
        """The best learning rate, with a star unless the search bracketed it."""
        return f"{self.found.best[0]:g}" + "*" * (not self.found.bracketed)


def results_of(records: Records, task: str) -> list[Result]:
    """Return the results of all entrants whose runs are finished, the baseline first."""
    get = partial(from_records, records)
    results = []
    for name, entrant in ENTRANTS.items():
        try:
            found = tuned(get, task, name)
            first = get(setting_of(task, name, entrant.lr, entrant.momentum, 0))
            results.append(Result(name, found, repeats(get, task, name, found), first.final_loss))
        except MissingRunError:
            continue
    return results


def mean_and_deviation(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean and the standard deviation as text."""
    if math.inf in values:
        return f"{values.count(math.inf)} of {len(values)} diverged"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def fewer_steps(one: Sequence[float], other: Sequence[float]) -> float:
    """Return p of Welch's one-sided test that the first values are smaller."""
    return float(stats.ttest_ind(one, other, equal_var=False, alternative="less").pvalue)


def slowdowns(records: Records) -> dict[str, float]:
    """Return the time of a step as a multiple of the baseline's: the median over rounds."""
    ratios: dict[str, list[float]] = {}
    for record in records.times:
        base = record["times"].get(BASELINE, [])
        for name, seconds in record["times"].items():
            pairs = zip(seconds, base, strict=True)
            ratios.setdefault(name, []).extend(own / first for own, first in pairs)
    return {name: statistics.median(found) for name, found in ratios.items() if found}


def language_rows(results: Sequence[Result], slower: dict[str, float]) -> list[tuple[str, ...]]:
    """Return the rows of the table of the language task, the fastest first."""
    by_name = {result.name: result for result in results}
    target = statistics.fmean(by_name[BASELINE].losses)
    rival = by_name[RIVAL].steps_to(target) if RIVAL in by_name else None
    ranked: list[tuple[float, float, tuple[str, ...]]] = []
    for result in results:
        steps = result.steps_to(target) if result.name != BASELINE else [1.0]
        p = "-"
        if steps and rival and result.name not in (BASELINE, RIVAL) and len(steps) > 1:
            p = f"{fewer_steps(steps, rival):.1g}"
        mean = statistics.fmean(steps) if steps else math.inf
        slow = slower.get(result.name)
        row = (
            result.name,
            mean_and_deviation(result.losses),
            f"{result.untouched:.3f}" if math.isfinite(result.untouched) else "diverged",
            mean_and_deviation(steps) if steps and len(steps) > 1 else f"{mean:.2f}",
            f"{mean * slow:.2f}" if slow and steps else "-",
            f"{slow:.2f}" if slow else "-",
            p,
            result.lr,
            f"{result.found.best[1]:g}",
        )
        ranked.append((mean, statistics.fmean(result.losses), row))
    return [tuple("-" if cell == "inf" else cell for cell in row) for *_, row in sorted(ranked)]


_LANGUAGE = (
    "optimizer",
    "validation loss",
    "untouched",
    "steps",
    "seconds",
    "time of a step",
    "p",
    "lr",
    "momentum",
)


def geometric_mean(values: Sequence[float]) -> float:
    """Return the geometric mean; infinite if a value is."""
    return math.inf if math.inf in values else statistics.geometric_mean(values)


def other_rows(by_task: dict[str, list[Result]]) -> list[tuple[str, ...]]:
    """Return the rows of the table of the other two tasks."""
    tasks = [task for task in TUNED if task != "language"]
    rows: list[tuple[str, ...]] = []
    for name in ENTRANTS:
        cells = [name]
        for task in tasks:
            mean = geometric_mean if task == "burgers" else statistics.fmean
            found = [r for r in by_task[task] if r.name == name]
            for result in found:
                cells += [_loss(task, mean(result.losses)), _loss(task, result.untouched)]
                cells += [result.lr]
            if not found:
                cells += ["-"] * 3
        if set(cells[1:]) != {"-"}:
            rows.append(tuple(cells))
    return rows


def _loss(task: str, loss: float) -> str:
    if not math.isfinite(loss):
        return "diverged"
    return f"{loss:.2e}" if task == "burgers" else f"{loss:.4f}"


def transfer_rows(by_task: dict[str, list[Result]]) -> list[tuple[str, ...]]:
    """Return the learning rates of all entrants as multiples of the baseline's."""
    base = {t: r.found.best[0] for t, rs in by_task.items() for r in rs if r.name == BASELINE}
    rows: list[tuple[str, ...]] = []
    for name in ENTRANTS:
        cells = [name]
        for task in TUNED:
            own = [r for r in by_task[task] if r.name == name and task in base]
            cells += [f"{r.found.best[0] / base[task]:g}" for r in own] or ["-"]
        if set(cells[1:]) != {"-"}:
            rows.append(tuple(cells))
    return rows


def solved(records: Records, name: str) -> dict[str, int]:
    """Return how many learning rates solve each toy problem, as far as its runs are finished."""
    counts = {}
    for task in TASKS:
        if task not in TOYS:
            continue
        try:
            runs = on_toy(partial(from_records, records), task, name)
        except MissingRunError:
            continue
        target = TASKS[task]().target
        counts[task] = sum(min(loss for *_, loss in run.curve) <= target for run in runs)
    return counts


def variant_rows(records: Records, slower: dict[str, float]) -> list[tuple[str, ...]]:
    """Return the rows of structures and refresh intervals whose runs are finished."""
    rows: list[tuple[str, ...]] = []
    for name in VARIANTS:
        losses = variant_losses(records, name)
        if losses:
            slow = f"{slower[name]:.2f}" if name in slower else "-"
            rows.append((name, mean_and_deviation(losses), slow))
    return rows


def variant_losses(records: Records, name: str) -> list[float]:
    """Return the final losses of a variant; none if runs are missing."""
    with suppress(MissingRunError):
        get = partial(from_records, records)
        return [run.final_loss for run in as_recommended(get, "language", name)]
    return []


def width_rows(records: Records) -> list[tuple[str, ...]]:
    """Return the best learning rate of each optimizer and width whose runs are finished."""
    rows: list[tuple[str, ...]] = []
    for name in WIDTHS:
        for task in TASKS:
            if not task.startswith("width"):
                continue
            with suppress(MissingRunError):
                runs = on_width(partial(from_records, records), task, name)
                best = min(runs, key=lambda run: run.final_loss)
                losses = " ".join(f"{run.final_loss:.3f}" for run in runs)
                rows.append((name, task.split()[1], f"{best.lr:g}", losses))
    return rows


def toy_rows(counts: dict[str, dict[str, int]]) -> list[tuple[str, ...]]:
    """Return how many toy problems and runs each entrant solves."""
    return [
        (name, f"{sum(map(bool, own.values()))} of {len(own)}", str(sum(own.values())))
        for name, own in counts.items()
        if own
    ]


# --- pictures ------------------------------------------------------------------------------------


def plot_curves(results: Sequence[Result], slower: dict[str, float], path: Path) -> None:
    """Plot mean validation losses with bands of a standard deviation."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
    shown = sorted(results, key=lambda r: statistics.fmean(r.losses))[:6]
    shown += [r for r in results if r.name in (BASELINE, RIVAL) and r not in shown]
    for i, result in enumerate(shown):
        runs = [run for run in result.runs if not run.diverged]
        if not runs:
            continue
        steps = [step for step, *_ in runs[0].curve][1:]
        losses = [[loss for *_, loss in run.curve][1:] for run in runs]
        mean = [statistics.fmean(at) for at in zip(*losses, strict=True)]
        spread = [statistics.pstdev(at) for at in zip(*losses, strict=True)]
        low = [m - s for m, s in zip(mean, spread, strict=True)]
        high = [m + s for m, s in zip(mean, spread, strict=True)]
        factor = slower.get(result.name)
        for panel, scale in zip(panels, (1.0, factor), strict=True):
            if scale is not None:
                axis = [step * scale for step in steps]
                panel.plot(axis, mean, color=f"C{i}", label=result.name)
                panel.fill_between(axis, low, high, color=f"C{i}", alpha=0.2)
    panels[0].set(xlabel="step", ylabel="validation loss (nats per character)", ylim=(None, 3))
    panels[1].set_xlabel(f"time, in steps of {BASELINE}")
    panels[0].legend()
    _save(figure, panels, path)


def plot_pareto(results: Sequence[Result], slower: dict[str, float], path: Path) -> None:
    """Plot the final loss against the time of a step."""
    figure, panel = plt.subplots(figsize=(8, 5), layout="constrained")
    for result in results:
        slow, loss = slower.get(result.name), statistics.fmean(result.losses)
        if slow is not None and math.isfinite(loss):
            panel.plot(slow, loss, "o", color="C1" if "(" in result.name else "C0")
            panel.annotate(result.name, (slow, loss), (4, 3), textcoords="offset points", size=8)
    panel.set(xlabel=f"time of a step / {BASELINE}", ylabel="final validation loss")
    panel.margins(x=0.2)  # for the names
    _save(figure, [panel], path)


def plot_variants(
    records: Records, results: Sequence[Result], slower: dict[str, float], path: Path
) -> None:
    """Plot the final loss of structures and refresh intervals against the time of a step."""
    figure, panel = plt.subplots(figsize=(9, 6), layout="constrained")
    points = {
        name: (slower[name], statistics.fmean(losses))
        for name in VARIANTS
        if name in slower and (losses := variant_losses(records, name))
    }
    groups: dict[str, list[str]] = {}
    for name in points:
        groups.setdefault(name.partition(",")[0], []).append(name)
    for i, (group, names) in enumerate(groups.items()):
        pairs = [points[name] for name in names]
        panel.plot(*zip(*pairs, strict=True), "o", color=f"C{i}", label=group)
        for name in names:
            text = name.partition(", ")[2]
            panel.annotate(text, points[name], (4, 3), textcoords="offset points", size=7)
    for result in results:
        if result.name in (BASELINE, RIVAL) and result.name in slower:
            place = slower[result.name], statistics.fmean(result.losses)
            panel.plot(*place, "kx")
            panel.annotate(result.name, place, (4, 3), textcoords="offset points", size=8)
    if groups:
        panel.legend()
    panel.set(xlabel=f"time of a step / {BASELINE}", ylabel="final validation loss")
    panel.margins(x=0.2)  # for the names
    _save(figure, [panel], path)


def plot_toys(counts: dict[str, dict[str, int]], path: Path) -> None:
    """Plot which optimizer solves which toy problem."""
    names = [name for name, own in counts.items() if own]
    toys = list(TOYS)
    cells = [[counts[name].get(toy, math.nan) for toy in toys] for name in names]
    size = (0.6 * len(toys) + 4, 0.32 * len(names) + 2)
    figure, panel = plt.subplots(figsize=size, layout="constrained")
    panel.imshow(cells, cmap="viridis", vmin=0, vmax=len(FACTORS), aspect="auto")
    for i, row in enumerate(cells):
        for j, count in enumerate(row):
            color = "white" if count < 3 else "black"
            panel.text(j, i, f"{count:g}", ha="center", va="center", color=color, size=8)
    panel.set_xticks(range(len(toys)), toys, rotation=45, ha="right")
    panel.set_yticks(range(len(names)), names)
    panel.set_title(f"how many of {len(FACTORS)} learning rates solve it")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _save(figure: Any, panels: Iterable[Any], path: Path) -> None:
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- pages ---------------------------------------------------------------------------------------


def section(header: Sequence[str], rows: Sequence[Sequence[str]], picture: str = "") -> str:
    """Return a table and its picture, or that there is nothing yet."""
    return f"{table(header, rows)}\n\n{picture}".rstrip() if rows else "Not measured yet."


def described(records: Records) -> str:
    """Return which machines the runs and the times come from."""
    seen = [*records.machines.values()]
    cpus = sorted({m["cpu"] for m in seen})
    versions = sorted({f"torch {m['torch']}, Python {m['python']}" for m in seen})
    dates = sorted({m["date"] for m in seen})
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    text = (
        f"Losses: {', '.join(cpus)}, {', '.join(versions)}, one thread a run, {days}; they do not "
        "depend on the load of the machine."
    )
    if records.times:
        timed = [record["machine"] for record in records.times]
        last = timed[-1]
        text += (
            f" Times of steps: {last['cpu']}, {last['threads']} threads, {last['date']}, all "
            "optimizers in turn, as a median over rounds of ten steps."
        )
    return text


def write(records: Records, root: Path) -> None:
    """Write the page, its pictures, and the table of the README.

    Args:
        records: The runs.
        root: The repository.
    """
    by_task = {task: results_of(records, task) for task in TUNED}
    if BASELINE not in [result.name for result in by_task["language"]]:
        raise SystemExit(f"Runs of {BASELINE} on the language task are missing.")
    slower = slowdowns(records)
    images = root / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    plot_curves(by_task["language"], slower, images / "scoreboard_curves.png")
    plot_pareto(by_task["language"], slower, images / "scoreboard_pareto.png")
    timed = any(name in slower and variant_losses(records, name) for name in VARIANTS)
    if timed:
        plot_variants(records, by_task["language"], slower, images / "scoreboard_structures.png")
    counts = {name: solved(records, name) for name in ENTRANTS}
    if toy_rows(counts):
        plot_toys(counts, images / "scoreboard_toys.png")
    rows = language_rows(by_task["language"], slower)
    base = next(r for r in by_task["language"] if r.name == BASELINE)
    page = _PAGE.format(
        budget=BUDGET,
        machine=described(records),
        baseline=BASELINE,
        rival=RIVAL,
        target=statistics.fmean(base.losses),
        language=table(_LANGUAGE, rows),
        others=section(
            ("optimizer", "Burgers", "untouched", "lr", "digits", "untouched", "lr"),
            other_rows(by_task),
        ),
        transfer=section(("optimizer", *TUNED), transfer_rows(by_task)),
        variants=section(
            ("setting", "validation loss", "time of a step"),
            variant_rows(records, slower),
            "![Time of a step and final loss of each setting](images/scoreboard_structures.png)"
            if timed
            else "The times of these steps are not measured yet.",
        ),
        widths=section(("optimizer", "width", "best lr", "losses"), width_rows(records)),
        factors=", ".join(f"{factor:g}" for factor in FACTORS),
        toys=section(
            ("optimizer", "solved by any", "solved runs"),
            toy_rows(counts),
            "![Solved toy problems](images/scoreboard_toys.png)",
        ),
    )
    (root / "docs" / "scoreboard.md").write_text(page, encoding="utf-8")
    _write_between(root / "README.md", table(_LANGUAGE[:6], [row[:6] for row in rows]))


def _write_between(path: Path, text: str) -> None:
    """Replace what is between the marks of a file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(_MARKS[0])
    _, _, after = rest.partition(_MARKS[1])
    path.write_text(f"{before}{_MARKS[0]}\n\n{text}\n\n{_MARKS[1]}{after}", encoding="utf-8")
