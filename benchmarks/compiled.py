"""What compiled kernels would gain: eager steps against steps with compiled strategy methods.

`torch.compile` compiles the methods with a strategy's elementwise operations. Eager and compiled
optimizers step alternately on the same gradients. Only steps without refreshes count, since
refreshes are decompositions and products.

    python benchmarks/compiled.py --workloads W1 W2
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import torch
from step_time import CYCLE, Contestant
from workloads import WORKLOADS

from structprecond import KLShampoo, Muon
from structprecond.strategies.kl import KLShampooStrategy
from structprecond.strategies.orthogonalized import OrthogonalizedMomentumStrategy

# SOAP and AdamW are missing: besides products, they mainly run torch's fused kernel
CASES: dict[str, tuple[Callable[..., torch.optim.Optimizer], type, Sequence[str]]] = {
    "KLShampoo": (KLShampoo, KLShampooStrategy, ["_direction", "_accumulate"]),
    "Muon": (Muon, OrthogonalizedMomentumStrategy, ["update"]),
}
"""The class of each optimizer, its strategy's class, and the methods to compile."""


class Compiled(Contestant):
    """An optimizer that steps with compiled methods."""

    def __init__(self, name: str, build: Any, model: Any, owner: type, methods: Any) -> None:
        super().__init__(name, build, model)
        self.owner = owner
        self.eager = {method: owner.__dict__[method] for method in methods}
        self.compiled = {method: _compile(function) for method, function in self.eager.items()}

    def step(self, seed: int) -> None:
        for method, function in self.compiled.items():
            setattr(self.owner, method, function)
        try:
            super().step(seed)
        finally:
            for method, function in self.eager.items():
                setattr(self.owner, method, function)


def _compile(function: Any) -> Any:
    if isinstance(function, staticmethod):
        return staticmethod(torch.compile(function.__func__))
    return torch.compile(function)


def ordinary_step(contestant: Contestant) -> float:
    """Return the mean over a cycle without its slowest step, the refresh."""
    return statistics.fmean(sorted(contestant.cycle(1 + CYCLE))[:-1])


def main(argv: Sequence[str] | None = None) -> list[tuple[str, str, float]]:
    """Print a table; return workload, optimizer and eager time over compiled time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["W1", "W2"])
    parser.add_argument("--optimizers", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| workload | optimizer | eager (ms) | compiled (ms) | eager / compiled | compile (s) |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    rows = []
    for workload in args.workloads:
        for name in args.optimizers:
            torch.compiler.reset()  # the compiler keeps a limited number of versions per function
            build, owner, methods = CASES[name]
            model = WORKLOADS[workload]()
            eager = Contestant(name, build, model)
            compiled = Compiled(name, build, model, owner, methods)
            for step in range(1 + CYCLE):
                compiled.step(step)
                eager.step(step)
            took = (sum(compiled.times) - sum(eager.times)) / 1e3
            for step in range(CYCLE * args.cycles):
                compiled.step(step)
                eager.step(step)
            times = [ordinary_step(contestant) for contestant in (eager, compiled)]
            rows.append((workload, name, times[0] / times[1]))
            print(
                f"| {workload} | {name} | {times[0]:.1f} | {times[1]:.1f} | "
                f"{times[0] / times[1]:.2f} | {took:.0f} |",
                flush=True,
            )
    where = f"{platform.machine()}, {args.threads} threads, float32, torch {torch.__version__}"
    print(f"\n{date.today()}, {where}")
    return rows


if __name__ == "__main__":
    main()
