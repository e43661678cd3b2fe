"""Time `optimizer.step()`: all contestants of a race interleaved in one run, on the same gradients.

Prints a table per race. Each step of a refresh cycle (ten steps; one for SIRF-Shampoo) counts with
its median over all cycles. The columns are the mean over the cycle, its slowest step, the state,
and the extra memory of a step.

    python benchmarks/step_time.py --workloads W1 --races soap "muon, float32" --json times.json
    python benchmarks/step_time.py --report times.json

Contestants that fail to import or fail at their first step are skipped with a message.
`--peer-path NAME=DIR` adds a package from a local checkout; the names are in `contestants.py`.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from contestants import OURS, RACES, Build, with_peers
from matplotlib import pyplot as plt
from torch import nn
from workloads import LARGE, WORKLOADS, fill_gradients

from structprecond import StructPrecondError, StructuredOptimizer

CYCLE = 10


@dataclass(frozen=True)
class Result:
    """The times of one contestant, in milliseconds, and its memory.

    Args:
        workload: The name of the workload.
        race: The name of the race.
        name: The contestant.
        mean: The mean over a refresh cycle.
        worst: The slowest step of the cycle.
        state: The bytes of state per parameter.
        peak: The bytes per parameter that a step needs besides state and gradients; None if
            unknown.
    """

    workload: str
    race: str
    name: str
    mean: float
    worst: float
    state: float
    peak: float | None


def wait(device: torch.device | str) -> None:
    """Wait until a GPU is done; the CPU always is."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Contestant:
    """An optimizer with its own copy of the model, and the times of its steps."""

    def __init__(self, name: str, build: Build, model: nn.Module) -> None:
        self.name, self.model = name, copy.deepcopy(model)
        self.optimizer = build(self.model)
        self.times: list[float] = []

    def step(self, seed: int) -> None:
        """Make one timed step; making gradients is not timed."""
        fill_gradients(self.model, seed)
        device = next(self.model.parameters()).device
        wait(device)
        start = time.perf_counter()
        self.optimizer.step()
        wait(device)
        self.times.append(1e3 * (time.perf_counter() - start))

    def cycle(self, settled: int, length: int = CYCLE) -> list[float]:
        """Return the median time of each step of a cycle, from step `settled` on."""
        return [statistics.median(self.times[settled + i :: length]) for i in range(length)]

    def result(self, workload: str, race: str, settled: int, cycle: int) -> Result:
        """Summarize the steps from `settled` on, and measure memory with one more cycle."""
        numel = sum(p.numel() for p in self.model.parameters())
        steps = self.cycle(settled, cycle)
        state = state_bytes(self.optimizer) / numel
        peak = peak_bytes(self, cycle)
        peak_per_param = None if peak is None else peak / numel
        return Result(
            workload, race, self.name, statistics.fmean(steps), max(steps), state, peak_per_param
        )


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all state, counting shared memory once."""
    found: dict[tuple[int, int], int] = {}
    seen: dict[int, Any] = {}  # objects of other packages may refer to each other in circles
    params = {p.data_ptr() for group in optimizer.param_groups for p in group["params"]}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.data_ptr() in params:
                return
            found[value.data_ptr(), value.numel()] = value.numel() * value.element_size()
        elif isinstance(value, Mapping):
            for entry in value.values():
                add(entry)
        elif isinstance(value, list | tuple):
            for entry in value:
                add(entry)
        elif hasattr(value, "named_tensors"):
            add(dict(value.named_tensors()))
        elif id(value) in seen or isinstance(value, type | ModuleType):
            return
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module):
            seen[id(value)] = value
            add(vars(value))

    # other packages keep some state in attributes
    add(optimizer.state)
    if not isinstance(optimizer, StructuredOptimizer):
        add({k: v for k, v in vars(optimizer).items() if k not in ("param_groups", "defaults")})
    return sum(found.values())


def peak_bytes(contestant: Contestant, cycle: int) -> int | None:
    """Return the peak memory during a cycle, above the memory before each step."""
    device = next(contestant.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for seed in range(cycle):
            contestant.step(seed)
        return torch.cuda.max_memory_allocated(device) - before
    most = 0
    gc.collect()
    for seed in range(cycle):
        fill_gradients(contestant.model, seed)
        try:
            # return freed memory, and reset the kernel's peak
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = _resident("VmRSS")
        contestant.optimizer.step()
        most = max(most, _resident("VmHWM") - before)
    return most


def _resident(field: str) -> int:
    """Return a memory statistic of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def race(
    workload: str,
    name: str,
    builds: Mapping[str, Build],
    cycles: int,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> list[Result]:
    """Step all contestants alternately, for a warm-up cycle and `cycles` that count."""
    model = (WORKLOADS | LARGE)[workload]().to(device, dtype)
    contestants = []
    for who, build in builds.items():
        try:
            contestants.append(Contestant(who, build, model))
        except ImportError as error:
            print(f"{who} is left out: {error}", file=sys.stderr)
    contestants = [contestant for contestant in contestants if _can_step(contestant)]
    cycle = 1 if name.startswith("sirf") else CYCLE
    # SOAP initializes at its first step, so cycles start after it
    settled = 1 + cycle
    for step in range(1, settled + cycle * cycles):
        # rotate the order, so that nobody always profits from another's warm caches
        turn = step % len(contestants)
        for contestant in contestants[turn:] + contestants[:turn]:
            contestant.step(step)
    results = [contestant.result(workload, name, settled, cycle) for contestant in contestants]
    contestants.clear()
    gc.collect()
    return results


def _can_step(contestant: Contestant) -> bool:
    """Make the first step; return False if another package fails."""
    try:
        contestant.step(0)
    except Exception as error:
        if contestant.name.startswith(OURS):
            raise
        print(f"{contestant.name} is left out: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    return True


def report(results: Sequence[Result]) -> str:
    """Return Markdown tables, one per race; ratios are relative to our optimizer."""
    lines = []
    for race_name in dict.fromkeys(r.race for r in results):
        lines += [
            f"**{race_name}**",
            "",
            "| workload | contestant | mean (ms) | worst (ms) | worst / mean | peer / ours | "
            "state (B) | peak (B) |",
            "|---|---|---:|---:|---:|---:|---:|---:|",
        ]
        for workload in dict.fromkeys(r.workload for r in results if r.race == race_name):
            rows = [r for r in results if (r.race, r.workload) == (race_name, workload)]
            ours = next(r for r in rows if r.name == OURS)
            for row in rows:
                ratio = "" if row.name.startswith(OURS) else f"{row.mean / ours.mean:.2f}"
                peak = "" if row.peak is None else f"{row.peak:.0f}"
                lines.append(
                    f"| {workload} | {row.name} | {row.mean:.1f} | {row.worst:.1f} | "
                    f"{row.worst / row.mean:.2f} | {ratio} | {row.state:.1f} | {peak} |"
                )
        lines.append("")
    return "\n".join(lines)


def plot(results: Sequence[Result], path: Path) -> None:
    """Plot the time of each contestant relative to ours, race by race."""
    races = list(dict.fromkeys((r.race, r.workload) for r in results))
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.32 * len(results)), layout="constrained")
    labels: list[str] = []
    for race_name, workload in races:
        rows = [r for r in results if (r.race, r.workload) == (race_name, workload)]
        ours = next(r for r in rows if r.name == OURS)
        for row in rows:
            mine = row.name.startswith(OURS)
            axes.barh(len(labels), row.mean / ours.mean, color="C0" if mine else "C7")
            labels.append(f"{race_name}, {workload}: {row.name}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="mean time of a step / ours (log scale)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the races, or report on those in a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["W1", "W2"])
    parser.add_argument("--races", nargs="+", choices=RACES, default=list(RACES))
    parser.add_argument("--cycles", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--onednn",
        action="store_true",
        help="use oneDNN products for all contestants, as ours on AMD (see docs/performance.md)",
    )
    parser.add_argument("--peer-path", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--json", type=Path, help="write the results here, and a plot next to it")
    parser.add_argument("--report", type=Path, help="print the tables of such a file")
    args = parser.parse_args(argv)
    if args.report:
        saved = json.loads(args.report.read_text())
        results = [Result(**entry) for entry in saved["results"]]
        print(f"{saved['machine']}\n\n{report(results)}")
        return results
    try:
        races = with_peers(args.peer_path)
    except StructPrecondError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    where = f"{args.threads} threads" if args.device == "cpu" else torch.cuda.get_device_name()
    where += ", oneDNN for all" if args.onednn else ""
    machine = f"{date.today()}, {platform.machine()}, {where}, float32, torch {torch.__version__}"
    results = []
    for workload in args.workloads:
        for name in args.races:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # some packages warn about their own slowness
                results += race(workload, name, races[name], args.cycles, args.device)
            print(report(results[-len(races[name]) :]), flush=True)
            if args.json:
                saved = {"machine": machine, "results": [asdict(r) for r in results]}
                args.json.write_text(json.dumps(saved, indent=1))
                plot(results, args.json.with_suffix(".png"))
    print(machine)
    return results


if __name__ == "__main__":
    main()
