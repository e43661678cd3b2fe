"""Compare optimizers on the training job of the examples.

For each optimizer, one seed searches a grid of learning rates; the best one then runs with other
seeds. Every finished run is a line in a file, so an interrupted comparison resumes with the first
missing run. The file does not record the other settings in `optimizers.py`: start a new file after
changing them.

    python benchmarks/compare.py                # do the missing runs
    python benchmarks/compare.py --report       # print a table, and plot next to the file
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

import torch
from char_lm import Run, load_corpus, train
from demo import add_shape_arguments, shape_of, table
from matplotlib import pyplot as plt
from optimizers import DEFAULTS, OPTIMIZERS

TUNING_SEED = 0


class Results:
    """The finished runs of one job, kept in a file.

    Args:
        path: The file, one JSON object per line. It may also hold runs of other jobs.
        job: The settings that all runs share.
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self.path = path
        self.job = job
        self.runs: dict[tuple[str, float, int], Run] = {}
        text = path.read_text() if path.exists() else ""
        self.cut_off = not text.endswith("\n") and text != ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # a killed process left half a line: the run counts as missing
            if record["job"] == job:
                run = Run(**record["run"])
                self.runs[run.name, run.lr, run.seed] = run

    def add(self, run: Run) -> None:
        """Append a finished run to the file."""
        self.runs[run.name, run.lr, run.seed] = run
        line = json.dumps({"job": self.job, "run": asdict(run)})
        with self.path.open("a") as file:
            file.write("\n" * self.cut_off + line + "\n")
        self.cut_off = False

    def get(self, name: str, lr: float, seed: int) -> Run:
        """Return a finished run."""
        return self.runs[name, lr, seed]


@dataclass(frozen=True)
class Outcome:
    """The runs of one optimizer.

    Attributes:
        tuning: One run per learning rate of the grid.
        repeats: Runs of the best learning rate with other seeds.
    """

    tuning: list[Run]
    repeats: list[Run]

    @property
    def name(self) -> str:
        """The optimizer's name."""
        return self.repeats[0].name

    @property
    def lr(self) -> float:
        """The best learning rate."""
        return self.repeats[0].lr

    @property
    def losses(self) -> list[float]:
        """The final validation losses of the repeats."""
        return [run.final_loss for run in self.repeats]

    @property
    def step_seconds(self) -> float:
        """The time of a step: a median of medians, robust to a busy machine."""
        return statistics.median(run.step_seconds for run in self.repeats)

    def steps_to(self, baseline: Outcome) -> float | None:
        """The mean over seeds of the steps to the baseline's final loss; None if a run fails."""
        reached = [
            run.time_to(loss) for run, loss in zip(self.repeats, baseline.losses, strict=True)
        ]
        return None if None in reached else statistics.fmean(r[0] for r in reached if r)


def outcome(name: str, get: Callable[[str, float, int], Run], grid: int, seeds: int) -> Outcome:
    """Collect the runs of one optimizer.

    Args:
        name: The optimizer.
        get: Returns the run for a name, a learning rate and a seed.
        grid: The number of learning rates, each twice the one before.
        seeds: The number of runs with the best learning rate.
    """
    middle = OPTIMIZERS[name].middle
    tuning = [get(name, middle * 2.0 ** (i - grid // 2), TUNING_SEED) for i in range(grid)]
    best = min(tuning, key=lambda run: run.final_loss)
    repeats = [get(name, best.lr, TUNING_SEED + 1 + i) for i in range(seeds)]
    return Outcome(tuning, repeats)


def report(outcomes: Sequence[Outcome]) -> str:
    """Compare optimizers with the first one."""
    baseline = outcomes[0]
    rows = []
    for this in outcomes:
        lrs = [run.lr for run in this.tuning]
        spread = f" ± {statistics.stdev(this.losses):.4f}" if len(this.losses) > 1 else ""
        steps = this.steps_to(baseline)
        fraction = None if steps is None else steps / this.repeats[0].steps
        slowdown = this.step_seconds / baseline.step_seconds
        rows.append(
            (
                this.name,
                f"{this.lr:g}" + " (edge)" * (this.lr in (lrs[0], lrs[-1])),
                f"{lrs[0]:g} to {lrs[-1]:g}",
                "diverged"
                if math.inf in this.losses
                else f"{statistics.fmean(this.losses):.4f}{spread}",
                "-" if fraction is None else f"{fraction:.2f}",
                "-" if fraction is None else f"{fraction * slowdown:.2f}",
                f"{1e3 * this.step_seconds:.0f}",
            )
        )
    relative = (f"steps / {baseline.name}'s", f"time / {baseline.name}'s")
    header = ("optimizer", "lr", "grid", "validation loss", *relative, "ms per step")
    return table(header, rows)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Plot loss over steps, loss over time, and final loss over learning rates."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    by_step, by_time, by_lr = panels
    by_time.sharey(by_step)
    for color, this in enumerate(outcomes):
        style: dict[str, Any] = {"color": f"C{color}", "label": f"{this.name}, lr {this.lr:g}"}
        for run in this.repeats:
            # Without the untrained model's loss, which would flatten the curves.
            steps = [step for step, _, _ in run.curve[1:]]
            losses = [loss for _, _, loss in run.curve[1:]]
            by_step.plot(steps, losses, **style)
            by_time.plot([step * this.step_seconds for step in steps], losses, **style)
            style["label"] = None
        by_lr.plot(
            [run.lr / this.lr for run in this.tuning],
            [run.final_loss for run in this.tuning],
            "o-",
            color=style["color"],
        )
    by_step.set(xlabel="step", ylabel="validation loss (nats per character)")
    by_step.legend()
    by_time.set_xlabel("training time (s)")
    by_lr.set(xlabel="learning rate / best learning rate", ylabel="final validation loss")
    by_lr.set_xscale("log", base=2)
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Do the missing runs, or report on the finished ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=list(DEFAULTS), choices=OPTIMIZERS)
    parser.add_argument("--out", type=Path, default=Path("compare.jsonl"), help="the runs")
    parser.add_argument("--report", action="store_true", help="report on the finished runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--grid", type=int, default=5, help="learning rates per optimizer")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best learning rate")
    parser.add_argument("--threads", type=int, default=2)
    add_shape_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    shape = shape_of(args)
    # The text is the interpreter's standard library, so its version is part of the job.
    job = {"steps": args.steps, **asdict(shape), "python": platform.python_version()}
    results = Results(args.out, job)
    if args.report:
        outcomes = []
        for name in args.optimizers:
            try:
                outcomes.append(outcome(name, results.get, args.grid, args.seeds))
            except KeyError:
                print(f"{name}: runs are missing", file=sys.stderr)
        if outcomes:
            plot(outcomes, args.out.with_suffix(".png"))
            print(report(outcomes))
        return

    corpus = load_corpus()

    def get_or_train(name: str, lr: float, seed: int) -> Run:
        if (name, lr, seed) not in results.runs:
            run = Run(name, lr, seed, args.steps)
            results.add(train(run, OPTIMIZERS[name].make, shape, corpus, quiet=None))
            print(f"{name} lr {lr:g} seed {seed}: loss {run.final_loss:.4f}", file=sys.stderr)
        return results.get(name, lr, seed)

    for name in args.optimizers:
        outcome(name, get_or_train, args.grid, args.seeds)


if __name__ == "__main__":
    main()
