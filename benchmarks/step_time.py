"""Time `optimizer.step()`: interleaved in one run, medians, the same gradients.

Two tables: SIRF-Shampoo in every structure against the package `sirfshampoo`, and SOAP with
refreshes all at once and in turns.

Usage: python benchmarks/step_time.py [--workload transformer28] [--rounds 7] [--json out.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from workloads import WORKLOADS, fill_gradients

from structprecond import SOAP, SIRFShampoo

STRUCTURES = (
    "dense",
    "diagonal",
    "block30diagonal",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
)
BATCH_SIZE = 32
Build = Callable[[torch.nn.Module], torch.optim.Optimizer]


@dataclass(frozen=True)
class Result:
    """Step times of one configuration, in milliseconds.

    Args:
        workload: The name of the workload.
        name: What was timed.
        ours: The median of our step.
        peer: The median of the peer's step.
        ratio: The median over rounds of the peer's time over ours.
        error: The largest relative difference of the first update of a parameter.
    """

    workload: str
    name: str
    ours: float
    peer: float
    ratio: float
    error: float


def compare(workload: str, name: str, ours: Build, peer: Build, rounds: int) -> Result:
    """Step both optimizers in turn, `rounds` times, on copies of one model."""
    model = WORKLOADS[workload]()
    models = (model, copy.deepcopy(model))
    start_of = [p.detach().clone() for p in model.parameters()]
    optimizers = [build(m) for build, m in zip((ours, peer), models, strict=True)]
    times: tuple[list[float], list[float]] = ([], [])
    error = 0.0
    for step in range(rounds + 1):
        # who goes first takes turns, so that neither profits from the other's warm caches
        for i in (0, 1) if step % 2 else (1, 0):
            fill_gradients(models[i], seed=step)
            start = time.perf_counter()
            optimizers[i].step()
            times[i].append(time.perf_counter() - start)
        if step == 0:
            error = _distance(start_of, *models)
    mine, theirs = times[0][1:], times[1][1:]  # the first round warms up
    ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    median, peer_median = (1e3 * statistics.median(t) for t in (mine, theirs))
    return Result(workload, name, median, peer_median, ratio, error)


@torch.no_grad()
def _distance(start: list[torch.Tensor], ours: torch.nn.Module, peer: torch.nn.Module) -> float:
    triples = zip(start, ours.parameters(), peer.parameters(), strict=True)
    return max(float((p - q).norm() / (q - p0).norm()) for p0, p, q in triples)


def against_sirfshampoo(workload: str, structures: list[str], rounds: int) -> list[Result]:
    """Time SIRF-Shampoo in every structure against the package `sirfshampoo`."""
    if not structures:
        return []
    Peer = _sirfshampoo()  # noqa: N806 (a class)
    kwargs: dict[str, Any] = {"lr": 1e-3, "beta2": 0.01, "batch_size": BATCH_SIZE}
    results = []
    for structure in structures:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peer's structures warn about their own slowness
            results.append(
                compare(
                    workload,
                    structure,
                    partial(SIRFShampoo, structures=structure, **kwargs),
                    partial(Peer, structures=structure, **kwargs),
                    rounds,
                )
            )
        print(_row(results[-1]), flush=True)
    return results


@dataclass(frozen=True)
class Cycle:
    """Step times of SOAP over one refresh cycle, in milliseconds.

    Args:
        workload: The name of the workload.
        name: How refreshes are scheduled.
        mean: The mean over the cycle.
        worst: The slowest step of the cycle.
    """

    workload: str
    name: str
    mean: float
    worst: float


def refresh_cycles(workload: str, cycles: int, frequency: int = 10) -> list[Cycle]:
    """Time SOAP step by step, with synchronous and with staggered refreshes, in turns.

    Each of the `frequency` steps of a cycle is represented by its median over all cycles.
    """
    model = WORKLOADS[workload]()
    schedules = ("synchronous", "staggered")
    models = (model, copy.deepcopy(model))
    optimizers = [
        SOAP(m, precondition_frequency=frequency, refresh=refresh)  # type: ignore[arg-type]
        for m, refresh in zip(models, schedules, strict=True)
    ]
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(1 + frequency * (cycles + 1)):
        for i in (0, 1):
            fill_gradients(models[i], seed=step)
            start = time.perf_counter()
            optimizers[i].step()
            times[i].append(1e3 * (time.perf_counter() - start))
    results = []
    for name, measured in zip(schedules, times, strict=True):
        settled = measured[1 + frequency :]  # the first step initializes, the first cycle warms up
        steps = [statistics.median(settled[i::frequency]) for i in range(frequency)]
        results.append(Cycle(workload, name, statistics.fmean(steps), max(steps)))
    return results


def _sirfshampoo() -> Any:
    """Return the package's optimizer with the structures that the package `singd` provides.

    The release on the index enables dense factors alone; its class attribute takes the others.
    """
    from singd.structures.blockdiagonal import Block30DiagonalMatrix
    from singd.structures.diagonal import DiagonalMatrix
    from singd.structures.hierarchical import Hierarchical15_15Matrix
    from singd.structures.triltoeplitz import TrilToeplitzMatrix
    from singd.structures.triutoeplitz import TriuToeplitzMatrix
    from sirfshampoo.optimizer import SIRFShampoo as Published

    class WithStructures(Published):  # type: ignore[misc]
        SUPPORTED_STRUCTURES = Published.SUPPORTED_STRUCTURES | {
            "diagonal": DiagonalMatrix,
            "block30diagonal": Block30DiagonalMatrix,
            "hierarchical15_15": Hierarchical15_15Matrix,
            "triltoeplitz": TrilToeplitzMatrix,
            "triutoeplitz": TriuToeplitzMatrix,
        }

    return WithStructures


def _row(r: Result) -> str:
    times = f"{r.ours:.1f} | {r.peer:.1f} | {r.ratio:.1f} ×"
    return f"| {r.workload} | {r.name} | {times} | {r.error:.0e} |"


def main(argv: list[str] | None = None) -> list[Result | Cycle]:
    """Run the benchmarks and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, default="transformer28")
    parser.add_argument("--structures", nargs="*", default=list(STRUCTURES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cycles", type=int, default=5, help="refresh cycles of SOAP")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = f"{platform.processor() or platform.machine()}, {args.threads} threads, float32"
    print(f"{date.today()}, {machine}, torch {torch.__version__}\n")
    print("| workload | structure | ours (ms) | sirfshampoo (ms) | speed-up | difference |")
    print("|---|---|---|---|---|---|", flush=True)
    results: list[Result | Cycle] = []
    results += against_sirfshampoo(args.workload, args.structures, args.rounds)
    print("\n| workload | SOAP, refreshes | mean step (ms) | worst step (ms) | worst / mean |")
    print("|---|---|---|---|---|", flush=True)
    for cycle in refresh_cycles(args.workload, args.cycles) if args.cycles else []:
        results.append(cycle)
        times = f"{cycle.mean:.0f} | {cycle.worst:.0f} | {cycle.worst / cycle.mean:.2f}"
        print(f"| {cycle.workload} | {cycle.name} | {times} |")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    return results


if __name__ == "__main__":
    main()
