"""A rank of a training job that saves every few steps and resumes; `test_kill.py` kills it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from tests.distributed import layouts, resuming

EVERY = 2
"""The number of steps between two checkpoints."""


def die(*args: Any) -> Any:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


class Writer(FileSystemWriter):
    """Writes files; its process dies when it has written its part, but before the others know."""

    def write_data(self, *args: Any) -> Any:
        """Write this rank's files, and die."""
        super().write_data(*args).wait()
        die()


def last_complete(folder: Path) -> int:
    """Return the step of the last checkpoint that is complete, which has metadata."""
    return max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)


def main(
    rank: int, folder: Path, steps: int, dies_at: int | None, moment: str, results: Connection
) -> None:
    """Train in a job of two ranks, from the last complete checkpoint if there is one.

    Args:
        rank: The rank.
        folder: Where checkpoints are.
        steps: The step to train up to.
        dies_at: The step whose checkpoint it dies in.
        moment: When it dies: "gather", before it takes part in `state_dict`, or "write".
        results: Receives the parameters as lists, or the name of the error.
    """
    torch.set_num_threads(1)
    start = last_complete(folder)
    dist.init_process_group(
        "gloo",
        rank=rank,
        world_size=2,
        store=dist.FileStore(str(folder / f"store {start}"), 2),  # type: ignore[attr-defined]
        timeout=timedelta(seconds=20),
    )
    make: Callable[..., Any] = resuming.OPTIMIZERS["SOAP staggered"]
    model, optimizer = resuming.build("fsdp", make)
    if start:
        resuming.load_folder(model, optimizer, folder / str(start), params=True)
    try:
        for step in range(start, steps):
            resuming.train(model, optimizer, step, step + 1)
            if (step + 1) % EVERY:
                continue
            writer: type[FileSystemWriter] = FileSystemWriter
            if step + 1 == dies_at and moment == "gather":
                optimizer.register_state_dict_pre_hook(die)
            elif step + 1 == dies_at:
                writer = Writer
            saved: Any = {
                "params": dict(model.named_parameters()),
                "optimizer": get_optimizer_state_dict(model, optimizer),
            }
            save(saved, storage_writer=writer(folder / str(step + 1), sync_files=False))
        results.send([p.tolist() for p in layouts.full_params(model)])
    except Exception as error:
        results.send(type(error).__name__)
    os._exit(0)  # threads of a group that has lost a rank may not end
