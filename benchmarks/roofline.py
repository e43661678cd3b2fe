"""How close steps come to the machine's limits: measured time over the floor.

The floor of a strategy on a workload is the time of its necessary matrix products and
decompositions, each timed alone on stacks of the same shapes in allocated memory, plus the time to
read and write the necessary bytes at the rate of a large copy. Symmetric products count in full,
although from 768 rows on steps compute only half of them.

The machine's rates and refresh cycles of steps are measured alternately, since others may use the
machine. Floor and measured time are medians over these rounds, separately for each step of a cycle.

    python benchmarks/roofline.py --workloads W1 W2 W4
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from contestants import OURS, RACES, Build
from step_time import CYCLE, Contestant, wait
from torch import nn
from workloads import WORKLOADS

from structprecond import estimate, infer_roles
from structprecond.linalg import fast_float32
from structprecond.linalg.polar import _gram_saves, _segments
from structprecond.linalg.qr import orthogonal_factor

Product = tuple[int, int, int, int]
"""A stack of b products (m, k) @ (k, n), as (b, m, k, n)."""
FLOAT = 4


@dataclass
class Floor:
    """The least cost of a step, averaged over a refresh cycle.

    Args:
        products: The number of times per step that each stack of products is needed.
        decompositions: The number of QR decompositions of each stack `(b, n, n)` per step.
        bytes: The number of bytes moved per step.
    """

    products: Counter[Product]
    decompositions: Counter[tuple[int, int]]
    bytes: float

    def milliseconds(self, rates: Rates) -> float:
        """Return the total time."""
        products = sum(share * rates.product(key) for key, share in self.products.items())
        qr = sum(share * rates.qr(key) for key, share in self.decompositions.items())
        return products + qr + 1e3 * self.bytes / rates.bandwidth

    def flops(self) -> float:
        """Return the number of operations of the products."""
        return sum(share * 2 * b * m * k * n for (b, m, k, n), share in self.products.items())


@dataclass
class Total:
    """The least cost of a step from two numbers, at the rates of large products and copies.

    Args:
        operations: The operations of the products of a step, with its share of refreshes.
        bytes: The number of bytes moved per step.
    """

    operations: float
    bytes: float

    def milliseconds(self, rates: Rates) -> float:
        """Return the total time."""
        return 1e3 * (self.operations / rates.speed + self.bytes / rates.bandwidth)


class Rates:
    """The rates of a device, measured on demand.

    Args:
        device: The device.
        dtype: The type of the matrices; float32 products follow torch's settings.
    """

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = device, dtype
        self.known: dict[object, float] = {}
        # on a GPU, larger than the caches
        source, target = torch.ones(2, 2**24 if device == "cpu" else 2**28, device=device)
        # a copy reads and writes
        self.bandwidth: float = 2e3 * source.nbytes / self._time(lambda: target.copy_(source))

    @property
    def speed(self) -> float:
        """The operations per second of a large product."""
        n = 1024 if self.device == "cpu" else 8192
        return float(2e3 * n**3 / self.product((1, n, n, n)))

    def product(self, key: Product) -> float:
        """Return the milliseconds of a stack of products."""
        b, m, k, n = key
        if key not in self.known:
            kind: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            left, right = torch.randn(b, m, k, **kind), torch.randn(b, k, n, **kind)
            out = torch.empty(b, m, n, **kind)
            self.known[key] = self._time(lambda: torch.bmm(left, right, out=out))
        return self.known[key]

    def qr(self, key: tuple[int, int]) -> float:
        """Return the milliseconds of a stack of QR decompositions."""
        b, n = key
        if key not in self.known:
            matrix = torch.randn(b, n, n, device=self.device)
            self.known[key] = self._time(lambda: orthogonal_factor(matrix))
        return self.known[key]

    @fast_float32()
    def _time(self, call: Callable[[], object]) -> float:
        call()
        times = []
        for _ in range(3):
            wait(self.device)
            start = time.perf_counter()
            call()
            wait(self.device)
            times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)


def estimated_floor(model: nn.Module, build: Build) -> Total:
    """Return the floor of any of our optimizers, from what `estimate` tells.

    A step reads gradients, and reads and writes parameters and state. Decompositions count as if
    they ran at the rate of products.
    """
    costs = estimate(model, build)  # type: ignore[arg-type]
    parameters = sum(p.nbytes for p in model.parameters())
    return Total(costs.mean_flops, 3 * parameters + 2 * costs.state_bytes)


def stacks(model: nn.Module) -> Iterator[tuple[int, torch.Size]]:
    """Yield the number of parameters of each shape."""
    yield from (
        (count, shape) for shape, count in Counter(p.shape for p in model.parameters()).items()
    )


def soap_floor(model: nn.Module) -> Floor:
    """Return the floor of SOAP: six products a step, and a refresh every ten.

    Each axis k of a gradient takes a projection, a projection back and an outer product. A refresh
    takes one product and one QR per factor, and rotates the first moment twice. A step reads
    gradients, and reads and writes parameters, two moments and factors.
    """
    floor = Floor(Counter(), Counter(), 0.0)
    for count, shape in stacks(model):
        numel = count * shape.numel()
        floor.bytes += FLOAT * 7 * numel
        if len(shape) < 2:
            continue
        # the axes of a convolution's kernel are multiplied together
        for n in (*shape[:2], *([shape[2:].numel()] if len(shape) > 2 else [])):
            rest = shape.numel() // n
            floor.products[count, n, n, rest] += 2 + 2 / CYCLE  # type: ignore[assignment]
            floor.products[count, n, rest, n] += 1
        for n in shape:
            floor.products[count, n, n, n] += 1 / CYCLE  # type: ignore[assignment]
            floor.decompositions[count, n] += 1 / CYCLE  # type: ignore[assignment]
            floor.bytes += FLOAT * 3 * count * n * n
    return floor


def muon_floor(model: nn.Module, steps: int = 5) -> Floor:
    """Return the floor of Muon: the cheaper form of the iteration for each shape.

    A step reads gradients, and reads and writes parameters and momentum; AdamW has one more moment.
    """
    floor = Floor(Counter(), Counter(), 0.0)
    roles = infer_roles(model)
    kinds = Counter(
        (p.shape, p.ndim >= 2 and roles[name].role != "embedding")
        for name, p in model.named_parameters()
    )
    for (shape, treated), count in kinds.items():
        floor.bytes += FLOAT * (5 if treated else 7) * count * shape.numel()
        if not treated:
            continue
        n, m = sorted((shape[0], shape.numel() // shape[0]))
        long, square = (count, n, m, n), (count, n, n, n)
        if _gram_saves(n, m, steps):
            segments = _segments(steps)
            floor.products[long] += len(segments)
            floor.products[count, n, n, m] += len(segments)
            floor.products[square] += sum(4 * k - 3 for k in segments)
        else:
            floor.products[long] += steps
            floor.products[count, n, n, m] += steps
            floor.products[square] += steps
    return floor


FLOORS: dict[str, Callable[[nn.Module], Floor]] = {
    "soap": soap_floor,
    "muon, float32": muon_floor,
}


def compare(
    floor: Floor | Total,
    build: Build,
    model: nn.Module,
    cycles: int,
    rates: Callable[[], Rates] = Rates,
) -> tuple[float, float]:
    """Return the floor and the mean time of a step over a refresh cycle, in milliseconds."""
    gc.collect()
    contestant = Contestant(OURS, build, model)
    # SOAP initializes at its first step, and one cycle warms up
    for seed in range(1 + CYCLE):
        contestant.step(seed)
    least = []
    for round_ in range(cycles):
        least.append(floor.milliseconds(rates()))
        for seed in range(CYCLE):
            contestant.step(CYCLE * round_ + seed)
    return statistics.median(least), statistics.fmean(contestant.cycle(1 + CYCLE))


def main(argv: Sequence[str] | None = None) -> list[tuple[str, str, float, float]]:
    """Print a table; return race, workload, floor and measured time of every row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=["W1", "W2", "W4"])
    parser.add_argument("--races", nargs="+", choices=FLOORS, default=list(FLOORS))
    parser.add_argument("--cycles", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("| race | workload | GFLOP | floor (ms) | measured (ms) | measured / floor |")
    print("|---|---|---:|---:|---:|---:|", flush=True)
    rows = []
    for workload in args.workloads:
        for name in args.races:
            model = WORKLOADS[workload]()
            floor = FLOORS[name](model)
            least, measured = compare(floor, RACES[name][OURS], model, args.cycles)
            rows.append((name, workload, least, measured))
            print(
                f"| {name} | {workload} | {floor.flops() / 1e9:.1f} | {least:.1f} | "
                f"{measured:.1f} | {measured / least:.2f} |",
                flush=True,
            )
    machine = f"{platform.machine()}, {args.threads} threads, float32, torch {torch.__version__}"
    print(f"\n{date.today()}, {machine}, copies at {Rates().bandwidth / 1e9:.0f} GB/s")
    return rows


if __name__ == "__main__":
    main()
