"""How cost grows: start-up and construction, and steps by number and width of layers.

Exponents are slopes of lines through logarithms: 1 means linear growth, matrix products have 3.

    python benchmarks/scaling.py
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Sequence
from datetime import date

import torch
from contestants import OURS, RACES, Build
from torch import nn
from workloads import fill_gradients, small_matrices

CYCLE = 10
_IMPORT = """
import time, torch
start = time.perf_counter()
import structprecond
print(time.perf_counter() - start)
"""


def import_seconds(repeats: int = 5) -> float:
    """Return the time of the import on top of torch's, in fresh processes."""
    command = [sys.executable, "-c", _IMPORT]
    runs = (subprocess.run(command, check=True, capture_output=True) for _ in range(repeats))
    return statistics.median(float(run.stdout) for run in runs)


def construction_seconds(build: Build, count: int, repeats: int = 5) -> float:
    """Return the time to construct an optimizer of `count` parameters.

    timeit turns off Python's garbage collector: a pass over all objects would take as long as
    constructing thousands of parameters.
    """
    model = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(count))
    build(model)  # the first optimizer in a process imports torch's compiler
    return statistics.median(timeit.repeat(lambda: build(model), number=1, repeat=repeats))


def step_seconds(build: Build, models: Sequence[nn.Module], cycles: int) -> list[float]:
    """Return the mean step over a refresh cycle of each model, interleaved."""
    optimizers = [build(model) for model in models]
    times: list[list[float]] = [[] for _ in models]
    for step in range(1 + CYCLE * (cycles + 1)):
        for model, optimizer, measured in zip(models, optimizers, times, strict=True):
            fill_gradients(model, step)
            start = time.perf_counter()
            optimizer.step()
            measured.append(time.perf_counter() - start)
    settled = [measured[1 + CYCLE :] for measured in times]
    return [
        statistics.fmean(statistics.median(steps[i::CYCLE]) for i in range(CYCLE))
        for steps in settled
    ]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the slope of the line through the logarithms, by least squares."""
    slope, _ = statistics.linear_regression(
        [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    )
    return slope


def _row(what: str, sizes: Sequence[int], costs: Sequence[float]) -> str:
    shown = " | ".join(f"{size}: {1e3 * cost:.1f}" for size, cost in zip(sizes, costs, strict=True))
    return f"| {what} | {shown} | {exponent(sizes, costs):.2f} |"


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Print tables; return the exponents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--params", type=int, nargs="+", default=[500, 1000, 2000, 4000])
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"import structprecond: {import_seconds():.3f} s on top of torch\n")
    races = ("soap", "muon, float32", "adamw", "sirf-shampoo dense")
    found: dict[str, float] = {}

    def report(kind: str, sizes: Sequence[int], measure: Callable[[Build], list[float]]) -> None:
        print(f"| {kind} (ms) |" + " |" * len(sizes) + " exponent |")
        print("|---|" + "---:|" * (len(sizes) + 1))
        for race in races:
            costs = measure(RACES[race][OURS])
            found[f"{race}, {kind}"] = exponent(sizes, costs)
            print(_row(race, sizes, costs), flush=True)
        print()

    report(
        "construction by parameters",
        args.params,
        lambda build: [construction_seconds(build, count) for count in args.params],
    )
    report(
        "step by layers 64x64",
        args.counts,
        lambda build: step_seconds(build, [small_matrices(c) for c in args.counts], args.cycles),
    )
    report(
        "step by width, 4 layers",
        args.widths,
        lambda build: step_seconds(build, [small_matrices(4, w) for w in args.widths], args.cycles),
    )
    machine = f"{platform.machine()}, {args.threads} threads, float32, torch {torch.__version__}"
    print(f"{date.today()}, {machine}")
    return found


if __name__ == "__main__":
    main()
