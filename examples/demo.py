"""Train a small language model with AdamW and with a structured preconditioner.

Both get the same weights, batches, schedule and number of steps. The learning rates come from
`optimizers.py`, where `benchmarks/scoreboard.py` found them; they are not tuned here.

    python examples/demo.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from char_lm import CharTask, Shape, load_corpus
from matplotlib import pyplot as plt
from optimizers import OPTIMIZERS
from training import Run, train


def add_shape_arguments(parser: argparse.ArgumentParser) -> None:
    """Add command-line arguments for the sizes of the job."""
    for size in fields(Shape):
        parser.add_argument(f"--{size.name}", type=int, default=size.default)


def shape_of(args: argparse.Namespace) -> Shape:
    """Return the sizes from the command line."""
    return Shape(**{size.name: getattr(args, size.name) for size in fields(Shape)})


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with a left-aligned first column; the others are right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in (header, rule, *rows)
    )


def summary(runs: Sequence[Run]) -> str:
    """Compare finished runs with the first one."""
    first = runs[0]
    rows = []
    for run in runs:
        reached = run.time_to(first.final_loss)
        step, seconds = (
            ("-", "-") if reached is None else (f"{reached[0]:.0f}", f"{reached[1]:.1f}")
        )
        loss = "diverged" if run.diverged else f"{run.final_loss:.4f}"
        milliseconds = f"{1e3 * run.step_seconds:.0f}"
        rows.append((run.name, f"{run.lr:g}", str(run.steps), loss, step, seconds, milliseconds))
    target = f"{first.name}'s loss"
    header = ("optimizer", "lr", "steps", "validation loss", f"steps to {target}")
    return table((*header, f"seconds to {target}", "ms per step"), rows)


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plot the validation loss over steps and over time."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for column, (panel, unit) in enumerate(zip(panels, ("step", "training seconds"), strict=True)):
        for run in runs:
            # Without the untrained model's loss, which would flatten the curves.
            curve = run.curve[1:]
            axis, losses = [point[column] for point in curve], [point[2] for point in curve]
            panel.plot(axis, losses, label=f"{run.name}, lr {run.lr:g}")
        label = f"{runs[0].name}'s final loss"
        panel.axhline(runs[0].final_loss, color="gray", linestyle=":", label=label)
        panel.set(xlabel=unit, xlim=(0, None))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per character)")
    panels[0].legend()
    figure.suptitle("A character-level transformer on the source text of the standard library")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Run the demo and return the runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "soap"], choices=OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture")
    add_shape_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    corpus, shape = load_corpus(), shape_of(args)
    print(
        f"{len(corpus.train) / 1e6:.1f} million characters of Python {sys.version_info[0]}."
        f"{sys.version_info[1]} source to train on, {shape}"
    )
    task = CharTask(shape, corpus)
    runs = [
        train(Run(name, OPTIMIZERS[name].lr, args.seed, args.steps), OPTIMIZERS[name].make, task)
        for name in args.optimizers
    ]
    plot(runs, args.out)
    print(f"\n{summary(runs)}\n\nLearning rates are fixed, not tuned here. Curves: {args.out}")
    return runs


if __name__ == "__main__":
    main()
