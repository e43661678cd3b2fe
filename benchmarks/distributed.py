"""Time steps of an optimizer whose rows have owners, against one process that computes everything.

Every rank uses one thread. Gradients are random and the same on all ranks. The processes take
turns: all ranks make some steps together, then one makes the same steps alone, while the others
wait.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --ranks 2 --layout fsdp2 --workload W1 --optimizer soap
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.append(str(Path(__file__).resolve().parent))

from workloads import WORKLOADS, fill_gradients

from structprecond import RECOMMENDED, SOAP, KLShampoo, Muon, SIRFShampoo, StructuredOptimizer
from structprecond.core.owners import Owners

OPTIMIZERS: dict[str, Callable[..., StructuredOptimizer]] = {
    "soap": SOAP,
    "klshampoo": KLShampoo,
    "sirf": lambda model, **options: SIRFShampoo(model, batch_size=64, **options),
    "muon": lambda model, **options: Muon(model, **RECOMMENDED["Muon"] | options),
}


@dataclass(frozen=True)
class Timing:
    """Step times of one set-up, in milliseconds: means over a refresh interval, medians of those.

    Attributes:
        ranks: The number of ranks.
        layout: "ddp" (owners asked for by mesh=) or "fsdp2".
        workload: The name of the workload.
        optimizer: The name of the optimizer.
        together: With owners on all ranks.
        alone: In one process, which computes everything on one thread.
        sent: The bytes that rank 0 sends to others in a step, over the bytes of the parameters.
        in_turn: As `together`, but each exchange is waited for before the next computation.
    """

    ranks: int
    layout: str
    workload: str
    optimizer: str
    together: float
    alone: float
    sent: float
    in_turn: float

    @property
    def ratio(self) -> float:
        """The time together over the time alone."""
        return self.together / self.alone


def build(
    name: str, layout: str, args: argparse.Namespace
) -> tuple[nn.Module, StructuredOptimizer]:
    """Return a model with its optimizer; the layout "alone" has no owners."""
    torch.manual_seed(0)
    model = WORKLOADS[args.workload]()
    mesh = None
    if layout == "ddp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if layout == "fsdp2":
        for layer in model.children():
            fully_shard(layer)
    return model, OPTIMIZERS[name](model, mesh=mesh)


def set_gradients(model: nn.Module, whole: nn.Module) -> None:
    """Give a model the gradients of another one, placed like its parameters."""
    for p, other in zip(model.parameters(), whole.parameters(), strict=True):
        grad = other.grad
        assert grad is not None
        p.grad = place(p, grad)


def place(p: Tensor, whole: Tensor) -> Tensor:
    """Return a tensor placed like a parameter."""
    if not isinstance(p, DTensor):
        return whole.clone()
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def steps(optimizer: StructuredOptimizer, model: nn.Module, source: nn.Module, start: int) -> float:
    """Make the steps of a refresh interval; return their mean in milliseconds."""
    seconds = 0.0
    for i in range(10):
        fill_gradients(source, start + i)
        set_gradients(model, source)
        if isinstance(optimizer.team, Owners):
            dist.barrier()
        begin = time.perf_counter()
        optimizer.step()
        if isinstance(optimizer.team, Owners):
            dist.barrier()
        seconds += time.perf_counter() - begin
    return 1e2 * seconds


def work(rank: int, args: argparse.Namespace, name: str, layout: str, folder: str) -> None:
    """Time one set-up on a rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/{name}-{layout}", args.ranks)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=rank, world_size=args.ranks, store=store)
    model, optimizer = build(name, layout, args)
    alone, reference = build(name, "alone", args)
    source = WORKLOADS[args.workload]()
    times: dict[str, list[float]] = {"together": [], "in_turn": [], "alone": []}
    for cycle in range(args.cycles + 1):
        times["together"].append(steps(optimizer, model, source, 30 * cycle))
        with exchanges_in_turn():
            times["in_turn"].append(steps(optimizer, model, source, 30 * cycle + 10))
        if rank == 0:
            times["alone"].append(steps(reference, alone, source, 30 * cycle + 20))
        dist.barrier()
    if rank == 0:
        assert isinstance(optimizer.team, Owners)
        sent = sum(
            (exchange.inward.sent[rank] + exchange.outward.sent[rank]) * exchange.entry_bytes
            for exchange in optimizer.team.exchanges
        )
        size = sum(p.numel() * p.element_size() for p in alone.parameters())
        # the first cycle makes the first bases
        medians = {key: statistics.median(values[1:]) for key, values in times.items()}
        timing = Timing(args.ranks, layout, args.workload, name, sent=sent / size, **medians)
        Path(folder, f"{name}-{layout}.json").write_text(json.dumps(asdict(timing)))
    dist.destroy_process_group()


def exchanges_in_turn() -> Any:
    """Return a context in which every transfer is waited for at once."""
    real = dist.all_to_all_single

    def blocking(*args: Any, **options: Any) -> Any:
        handle: Any = real(*args, **options)
        handle.wait()
        return handle

    return patch.object(dist, "all_to_all_single", blocking)


def main(argv: Sequence[str] | None = None) -> list[Timing]:
    """Time all set-ups and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layout", nargs="+", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2"])
    parser.add_argument("--workload", default="W1", choices=WORKLOADS)
    parser.add_argument("--optimizer", nargs="+", default=["soap", "muon"], choices=OPTIMIZERS)
    parser.add_argument("--cycles", type=int, default=4, help="refresh intervals of 10 steps")
    args = parser.parse_args(argv)
    timings = []
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{args.ranks} ranks of one thread each, {args.workload}, {platform.machine()}")
    print("| optimizer | layout | ms together | ms alone | ratio | ms without overlap | sent / P |")
    print("|---|---|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.optimizer:
            for layout in args.layout:
                mp.spawn(work, (args, name, layout, folder), nprocs=args.ranks)  # type: ignore[attr-defined,no-untyped-call]
                t = Timing(**json.loads(Path(folder, f"{name}-{layout}.json").read_text()))
                timings.append(t)
                print(
                    f"| {name} | {layout} | {t.together:.1f} | {t.alone:.1f} | {t.ratio:.2f} "
                    f"| {t.in_turn:.1f} | {t.sent:.2f} |",
                    flush=True,
                )
    return timings


if __name__ == "__main__":
    main()
