"""A checkpoint that one rank cannot save or load is saved or loaded on none."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from structprecond import SOAP, CheckpointError
from structprecond.errors import DistributedError
from tests.distributed import layouts, pool, resuming
from tests.helpers import same_bits

Damage = Callable[[dict[str, Any]], Any]


def drop(saved: dict[str, Any]) -> Any:
    del saved["state"][0]["exp_avg"]
    return saved


def reshape(saved: dict[str, Any]) -> Any:
    saved["state"][2]["step"] = torch.zeros(3, dtype=torch.int64)
    return saved


def transpose(saved: dict[str, Any]) -> Any:
    saved["state"][4]["exp_avg"] = torch.zeros(32, 16, dtype=torch.float64)
    return saved


def empty(saved: dict[str, Any]) -> Any:
    return {}


def rename(saved: dict[str, Any]) -> Any:
    saved["param_groups"][0]["strategy"] = "Another()"
    return saved


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing tensor": (drop, "0.weight: missing exp_avg"),
    "wrong counter": (reshape, r"2.weight: step is \(3,\), expected \(\)"),
    "wrong shape": (transpose, r"4.weight: exp_avg is \(32, 16\), expected \(16, 32\)"),
    "nothing": (empty, "This is not a checkpoint of a structured optimizer"),
    "other strategy": (rename, "strategy is 'Another"),
}


def load_damaged(rank: int, kind: str, damaged: int) -> tuple[str, str, bool]:
    """Load a checkpoint that is damaged on one rank; return the error, and what has stayed."""
    make = resuming.OPTIMIZERS["SOAP staggered"]
    model, optimizer = resuming.build("fsdp", make)
    resuming.train(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    new_model, new = resuming.build("fsdp", make)
    new.param_groups[0]["lr"] = 0.5
    resuming.train(new_model, new, 3, 4)
    before = everything(new)
    try:
        new.load_state_dict(DAMAGES[kind][0](saved) if rank == damaged else saved)
    except ValueError as error:
        text, name = str(error), type(error).__name__
    return name, text, same_bits(everything(new), before)


def everything(optimizer: Any) -> Any:
    """Return a whole checkpoint."""
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry |= {name: layouts.full(tensor) for name, tensor in entry.items()}
    return [saved["state"], str(saved["param_groups"]), optimizer.global_step]


@pytest.mark.parametrize("damaged", [0, 1])
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_checkpoint_that_does_not_fit_on_one_rank_changes_none(kind: str, damaged: int) -> None:
    results = pool.run(2, load_damaged, kind, damaged)
    assert [unchanged for *_, unchanged in results] == [True, True]
    name, text, _ = results[damaged]
    assert name == "CheckpointError"
    assert re.search(DAMAGES[kind][1], text), text
    name, text, _ = results[1 - damaged]
    assert name == "DistributedError"
    expected = f"Rank {damaged} cannot load the checkpoint, so no rank does: CheckpointError: "
    assert text.startswith(expected), text


def load_frozen(rank: int) -> tuple[list[str], list[str], bool]:
    """Load a checkpoint that is damaged on one rank while a layer is frozen; return what was."""
    model, optimizer = resuming.build("fsdp", SOAP)
    resuming.train(model, optimizer, 0, 2)
    saved = optimizer.state_dict()
    frozen = layouts.fsdp(layouts.mlp())
    frozen.get_submodule("2").requires_grad_(False)
    new = SOAP(frozen)
    before = everything(new)
    with pytest.raises((CheckpointError, DistributedError)):
        new.load_state_dict(transpose(copy.deepcopy(saved)) if rank else saved)
    refused = [routed.unit.label for routed in new.frozen_units]
    unchanged = same_bits(everything(new), before)
    new.load_state_dict(saved)
    return refused, [routed.unit.label for routed in new.frozen_units], unchanged


def test_a_refused_checkpoint_thaws_nothing_on_any_rank() -> None:
    assert pool.run(2, load_frozen) == [(["2.weight", "2.bias"], [], True)] * 2


def load_different(rank: int) -> tuple[str, bool]:
    """Load whole tensors on one rank, and the parts of each rank on the other."""
    _, optimizer = resuming.build("fsdp", SOAP)
    saved, before = optimizer.state_dict(), everything(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    entry = saved["state"][2]
    whole = layouts.full(entry["exp_avg"])
    if rank == 1:
        entry["exp_avg"] = whole
    with pytest.raises(DistributedError) as caught:
        optimizer.load_state_dict(saved)
    unchanged = optimizer.param_groups[0]["lr"] == 0.5
    optimizer.param_groups[0]["lr"] = saved["param_groups"][0]["lr"]
    return str(caught.value), unchanged and same_bits(everything(optimizer), before)


def test_whole_tensors_on_some_ranks_and_parts_on_others_are_refused() -> None:
    for text, unchanged in pool.run(2, load_different):
        assert "differ in the checkpoint, so no rank loads the checkpoint" in text
        assert "rank 0 has 2, exp_avg: '(Shard(dim=0),)', rank 1 has 2, exp_avg: 'whole'" in text
        assert unchanged


# --- parts without the others --------------------------------------------------------------------


def save_file(rank: int, folder: str) -> None:
    _, optimizer = resuming.build("fsdp", SOAP)
    torch.save(optimizer.state_dict(), Path(folder) / f"{rank}.pt")


def load_file(rank: int, file: str) -> str:
    saved: Any = torch.load(file)
    _, optimizer = resuming.build("fsdp", SOAP)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        return str(error)
    return ""


PART = r"0.weight: exp_avg is only the part that one rank had of DTensor.*full_state_dict=True"


def test_the_file_of_another_rank_is_refused(tmp_path: Path) -> None:
    pool.run(2, save_file, str(tmp_path))
    texts = pool.run(2, load_file, str(tmp_path / "0.pt"))
    assert "Rank 1 cannot load the checkpoint" in texts[0]
    assert re.search(PART, texts[1], re.DOTALL)


@pytest.mark.parametrize("world", [1, 4])
def test_the_file_of_a_rank_is_refused_by_another_number_of_ranks(
    world: int, tmp_path: Path
) -> None:
    pool.run(2, save_file, str(tmp_path))
    for text in pool.run(world, load_file, str(tmp_path / "0.pt")):
        assert re.search(PART, text, re.DOTALL)


def test_one_process_says_what_to_load_instead_of_the_file_of_a_rank(tmp_path: Path) -> None:
    pool.run(2, save_file, str(tmp_path))
    saved: Any = torch.load(tmp_path / "1.pt")
    optimizer = SOAP(layouts.mlp())
    with pytest.raises(CheckpointError, match=re.compile(PART, re.DOTALL)):
        optimizer.load_state_dict(saved)


# --- saving --------------------------------------------------------------------------------------


def save_after_a_hook_fails(rank: int) -> str:
    def fail(optimizer: Any) -> None:
        if rank == 1:
            raise RuntimeError("no space left")

    _, optimizer = resuming.build("fsdp", SOAP)
    optimizer.register_state_dict_pre_hook(fail)
    try:
        optimizer.state_dict()
    except (RuntimeError, DistributedError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_hook_that_fails_on_one_rank_lets_no_rank_save() -> None:
    assert pool.run(2, save_after_a_hook_fails) == [
        "DistributedError: Rank 1 cannot save the checkpoint, so no rank does: RuntimeError: no "
        "space left",
        "RuntimeError: no space left",
    ]


def save_after_different_steps(rank: int) -> str:
    _, optimizer = resuming.build("fsdp", SOAP)
    optimizer._global_step += rank
    with pytest.raises(DistributedError) as caught:
        optimizer.state_dict()
    return str(caught.value)


def test_ranks_save_the_same_step() -> None:
    expected = (
        "The ranks differ in the number of steps, so no rank saves the checkpoint: rank 0 has 0, "
        "rank 1 has 1."
    )
    assert pool.run(2, save_after_different_steps) == [expected] * 2


# --- parts in the same job -----------------------------------------------------------------------


def load_into_replicas(rank: int) -> bool:
    make = resuming.OPTIMIZERS["SOAP joint"]
    model, optimizer = resuming.build("replicated", make)
    resuming.train(model, optimizer, 0, 3)
    _, new = resuming.build("alone", make)
    new.load_state_dict(optimizer.state_dict())
    return same_bits(everything(new)[0], everything(optimizer)[0])


def test_an_optimizer_without_owners_loads_parts_of_ranks_in_its_job() -> None:
    assert all(pool.run(2, load_into_replicas))
