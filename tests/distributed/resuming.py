"""Jobs that stop, save, load and go on, and the ways to save and to load."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from structprecond import (
    SOAP,
    KLShampoo,
    LinearWeightBias,
    Muon,
    PerParameter,
    SIRFShampoo,
    SplitHeads,
    StructuredOptimizer,
)
from tests.distributed import layouts

Make = Callable[..., StructuredOptimizer]
Way = Callable[[nn.Module, StructuredOptimizer, nn.Module, StructuredOptimizer, Path], None]

JOINT = (SplitHeads("2.weight", heads=4), LinearWeightBias(), PerParameter())
OPTIMIZERS: dict[str, Make] = {
    "SOAP staggered": lambda m, **more: SOAP(
        m, lr=0.01, precondition_frequency=3, refresh="staggered", **more
    ),
    "SOAP joint": lambda m, **more: SOAP(
        m, lr=torch.tensor(0.01), precondition_frequency=2, combine_params=JOINT, **more
    ),
    "KLShampoo": lambda m, **more: KLShampoo(m, lr=0.01, precondition_frequency=3, **more),
    "SIRFShampoo": lambda m, **more: SIRFShampoo(m, lr=0.01, T=2, batch_size=8, **more),
    "Muon": lambda m, **more: Muon(m, lr=0.01, adamw_lr=0.003, **more),
}
"""Optimizers by name; "SOAP joint" has units of two parameters, and one of four rows."""

STEPS, STOP = 9, 5
"""The number of steps of a whole run, and after which it is interrupted."""


def build(layout: str, make: Make) -> tuple[nn.Module, StructuredOptimizer]:
    """Return a model in a layout, and its optimizer; in "alone", one process holds everything."""
    place = layouts.replicated if layout == "alone" else layouts.LAYOUTS[layout]
    model = place(layouts.mlp())
    return model, make(model, **({"mesh": dist.group.WORLD} if layout == "replicated" else {}))


def train(model: nn.Module, optimizer: StructuredOptimizer, first: int, last: int) -> None:
    """Make some steps, the same on all ranks and in all layouts."""
    for step in range(first, last):
        layouts.set_grads(model, step)
        optimizer.step()


def set_params(model: nn.Module, values: list[Tensor]) -> None:
    """Set the parameters of a model to whole tensors."""
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(layouts.like(p, value))


def uninterrupted(layout: str, make: Make) -> list[Tensor]:
    """Return the parameters after all steps without a stop."""
    model, optimizer = build(layout, make)
    train(model, optimizer, 0, STEPS)
    return layouts.full_params(model)


# --- ways ----------------------------------------------------------------------------------------


def by_file(
    model: nn.Module,
    optimizer: StructuredOptimizer,
    new_model: nn.Module,
    new: StructuredOptimizer,
    folder: Path,
) -> None:
    """Save the own state dict of each rank, and load it."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file))


def by_torch(get: StateDictOptions, set_: StateDictOptions | None = None) -> Way:
    """Return a way through torch's functions."""

    def way(
        model: nn.Module,
        optimizer: StructuredOptimizer,
        new_model: nn.Module,
        new: StructuredOptimizer,
        folder: Path,
    ) -> None:
        saved = get_optimizer_state_dict(model, optimizer, options=get)
        if set_ is not None and dist.get_rank() > 0:
            saved = {}
        set_optimizer_state_dict(new_model, new, saved, options=set_ or get)

    return way


def through_folder(asynchronous: bool, flat: bool = False) -> Way:
    """Return a way through `torch.distributed.checkpoint`."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)

    def way(
        model: nn.Module,
        optimizer: StructuredOptimizer,
        new_model: nn.Module,
        new: StructuredOptimizer,
        folder: Path,
    ) -> None:
        saved: Any = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        writer = FileSystemWriter(folder, sync_files=False)
        if asynchronous:
            # its own group: the thread that saves would mix up the collectives of steps
            group = dist.new_group()
            done: Any = async_save(saved, storage_writer=writer, process_group=group)
            # what happens meanwhile is not saved
            kept = layouts.full_params(model)
            train(model, optimizer, 0, 1)
            done.result()
            set_params(model, kept)
        else:
            save(saved, storage_writer=writer)
        load_folder(new_model, new, folder, options)

    return way


def save_folder(model: nn.Module, optimizer: StructuredOptimizer, folder: Path) -> None:
    """Save parameters and optimizer."""
    saved: Any = {
        "params": dict(model.named_parameters()),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    save(saved, storage_writer=FileSystemWriter(folder, sync_files=False))


def load_folder(
    model: nn.Module,
    optimizer: StructuredOptimizer,
    folder: Path,
    options: StateDictOptions | None = None,
    params: bool = False,
) -> None:
    """Load an optimizer, and parameters as well if asked for."""
    saved: Any = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    if params:
        saved["params"] = {name: p.detach() for name, p in model.named_parameters()}
    load(saved, storage_reader=FileSystemReader(folder))
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=options)


FULL = StateDictOptions(full_state_dict=True)
WAYS: dict[str, Way] = {
    "a file per rank": by_file,
    "sharded": by_torch(StateDictOptions()),
    "flat": by_torch(StateDictOptions(flatten_optimizer_state_dict=True)),
    "full": by_torch(FULL),
    "from rank 0": by_torch(
        StateDictOptions(full_state_dict=True, cpu_offload=True),
        StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
    ),
    "folder": through_folder(asynchronous=False),
    "folder, flat": through_folder(asynchronous=False, flat=True),
    "folder, asynchronously": through_folder(asynchronous=True),
}


def resume(rank: int, layout: str, names: Sequence[str], way: str, folder: str) -> list[str]:
    """Return the optimizers with which resumed runs lead to other parameters."""
    wrong = []
    for name in names:
        make = OPTIMIZERS[name]
        model, optimizer = build(layout, make)
        train(model, optimizer, 0, STOP)
        new_model, new = build(layout, make)
        set_params(new_model, layouts.full_params(model))
        WAYS[way](model, optimizer, new_model, new, Path(folder) / name)
        train(new_model, new, STOP, STEPS)
        results = layouts.full_params(new_model)
        if not all(map(torch.equal, results, uninterrupted(layout, make))):
            wrong.append(name)
    return wrong
