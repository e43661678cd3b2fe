"""Train the demo's language model on several ranks, and resume on another number of them.

    torchrun --nproc-per-node 2 examples/distributed/train.py --layout fsdp2 --save run
    torchrun --nproc-per-node 4 examples/distributed/train.py --layout ddp --resume run

Runs on GPUs (nccl) where there are any, else on CPUs (gloo). Every rank trains on its part of the
same batches, so the losses do not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from char_lm import CharLM, Shape, batches, load_corpus, loss_on
from demo import add_shape_arguments, shape_of
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from structprecond import RECOMMENDED, SOAP, KLShampoo, Muon, StructuredOptimizer, describe

OPTIMIZERS: dict[str, Any] = {"soap": SOAP, "klshampoo": KLShampoo, "muon": Muon}


def place(model: CharLM, layout: str, device: str) -> tuple[nn.Module, DeviceMesh | None]:
    """Place a model on all ranks.

    Returns:
        The model to train, and the ranks that own rows if they are not those of the shards.
    """
    world = dist.get_world_size()
    if layout == "ddp":
        # without mesh=, every rank would keep the whole state
        return DistributedDataParallel(model), init_device_mesh(device, (world,))
    mesh = init_device_mesh(device, (world,), mesh_dim_names=("shard",))
    if layout == "hsdp":
        # shards within pairs of ranks, copies across them
        names = ("replicate", "shard")
        mesh = init_device_mesh(device, (world // 2, 2), mesh_dim_names=names)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, None


def train(args: argparse.Namespace, shape: Shape, device: str) -> list[float]:
    """Train; return the loss of every step, over the whole batch."""
    torch.manual_seed(0)
    model, mesh = place(CharLM(shape).to(device), args.layout, device)
    settings = {**RECOMMENDED[OPTIMIZERS[args.optimizer].__name__], "mesh": mesh}
    optimizer: StructuredOptimizer = OPTIMIZERS[args.optimizer](model, **settings)
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0 and args.describe:
        print(describe(optimizer))

    if args.resume:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=args.resume)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=model_state,
            optim_state_dict=optimizer_state,
        )

    start, losses = optimizer.global_step, []
    drawn = islice(batches(load_corpus().train, shape, seed=0), start, start + args.steps)
    for step, whole in enumerate(drawn, start):
        inputs, targets = (part.chunk(world)[rank].to(device) for part in whole)
        optimizer.zero_grad()
        loss = loss_on(model, inputs, targets)
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
        if rank == 0 and (step % args.every == 0 or step == start + args.steps - 1):
            print(f"step {step:4d}  loss {losses[-1]:.4f}", flush=True)

    if args.save:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=args.save)
    return losses


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train on the ranks that `torchrun` has started."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--layout", choices=["ddp", "fsdp2", "hsdp"], default="fsdp2")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="soap")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="the steps between two lines")
    parser.add_argument("--save", help="a folder for the checkpoint at the end")
    parser.add_argument("--resume", help="the folder of a checkpoint, from any number of ranks")
    parser.add_argument("--describe", action="store_true", help="show who owns what")
    add_shape_arguments(parser)
    args = parser.parse_args(argv)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        shape = shape_of(args)
        return train(args, replace(shape, batch=_divisible(shape.batch)), device)
    finally:
        dist.destroy_process_group()


def _divisible(batch: int) -> int:
    """Return the batch size, if all ranks get equal parts of it."""
    world = dist.get_world_size()
    if batch % world:
        raise SystemExit(f"--batch {batch} is not divisible by {world} ranks. Choose a multiple.")
    return batch


if __name__ == "__main__":
    main()
