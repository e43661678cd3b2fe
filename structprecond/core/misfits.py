"""Finds what does not fit between a checkpoint and an optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from structprecond.core.boxes import lacks_parts
from structprecond.core.plain import plain_value
from structprecond.core.routing import Routing, as_routing
from structprecond.core.strategy import Hyperparameter
from structprecond.errors import StructPrecondError
from structprecond.structures.spec import AUTO

_LATER_ROLES = ("depthwise", "router")
COMPARED = ("strategy", "structures", "combine_params", "no_decay", "policies")


def compare_groups(number: int, saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return what differs in the names and the configuration of a param group."""
    theirs, mine = saved.get("param_names"), live.get("param_names")
    problems = []
    if theirs and mine:
        problems += [f"{n}: not in the checkpoint" for n in (Counter(mine) - Counter(theirs))]
        problems += [f"{n}: not in the optimizer" for n in (Counter(theirs) - Counter(mine))]
    for key in COMPARED:
        theirs, mine = with_tuples(saved.get(key)), plain_value(live.get(key))
        if key == "combine_params":  # None means the strategy's default groupings
            usual = plain_value(as_routing(live["strategy"]).main.combine_params)
            theirs, mine = theirs or usual, mine or usual
        if key == "policies":  # None means the strategy's; older checkpoints have none
            usual = plain_value(as_routing(live["strategy"]).main.policies)
            mine = usual if live[key] is None else mine
            theirs = mine if key not in saved else usual if saved[key] is None else theirs
        if key == "no_decay":  # older checkpoints have none
            theirs = tuple(theirs or ())
        if key == "structures":
            theirs, mine = _named(theirs), _named(mine)
        if key in live and theirs not in (mine, plain_value(_older(live[key]))):
            problems.append(
                f"param group {number}: {key} is {theirs!r} in the checkpoint, {mine!r} in the "
                "optimizer"
            )
    return problems


def with_tuples(value: Any) -> Any:
    """Return a value with tuples for lists: torch.distributed.checkpoint makes lists of tuples."""
    return tuple(map(with_tuples, value)) if isinstance(value, list | tuple) else value


def _named(structures: Any) -> Any:
    """Return a description of structures with "dense" for "auto".

    Most units get the same from both, and older checkpoints know only "dense". Where it matters,
    the names of the saved tensors differ.
    """
    if not isinstance(structures, str):
        return structures
    return "dense" if structures == AUTO else structures.replace(repr(AUTO), repr("dense"))


def other_default(number: int, saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return the problem that one side has "auto" where the other one has "dense"."""
    theirs, mine = saved.get("structures"), plain_value(live.get("structures"))
    if theirs == mine or _named(theirs) != _named(mine):
        return []
    return [
        f"param group {number}: structures is {theirs!r} in the checkpoint, {mine!r} in the "
        "optimizer, and they differ for some parameters; build the optimizer with "
        f"structures={theirs!r}"
    ]


def _older(value: Any) -> Any:
    """Return a routing without the roles that older checkpoints did not know.

    Where it matters, since parameters with such a role went elsewhere, their state does not fit.
    """
    if not isinstance(value, Routing):
        return value
    known = {role: s for role, s in value.roles.items() if role not in _LATER_ROLES}
    return replace(value, roles=known)


def compare_entries(label: str, theirs: Mapping[str, Any], mine: Mapping[str, Tensor]) -> list[str]:
    """Return the problems of a unit's saved state."""
    problems = [f"{label}: missing {name}" for name in mine if name not in theirs]
    problems += [f"{label}: unexpected {name}" for name in theirs if name not in mine]
    for name, target in mine.items():
        source = theirs.get(name, target)
        if not isinstance(source, Tensor) or source.shape != target.shape:
            got = tuple(source.shape) if isinstance(source, Tensor) else repr(source)
            problems.append(f"{label}: {name} is {got}, expected {tuple(target.shape)}")
        elif lacks_parts(source, target):
            problems.append(
                f"{label}: {name} is only the part that one rank had of {source}; load what "
                "torch.distributed.checkpoint saved, or what get_optimizer_state_dict returned "
                "with full_state_dict=True"
            )
        elif not _can_copy(source, target):
            problems.append(
                f"{label}: {name} is {source.dtype}, {source.layout}, on {source.device}, which "
                f"cannot be copied into {target.dtype}, {target.layout}, on {target.device}"
            )
    return problems


def compare_shared(copies: Sequence[tuple[Tensor, Tensor]]) -> list[str]:
    """Check that all parameters save the same values of the optimizer's shared tensors."""
    first: dict[int, Tensor] = {}
    for target, source in copies:
        known = first.setdefault(id(target), source)
        if known is not source and not known.equal(source):
            return ["global_step or batch_size: parameters have different ones in the checkpoint"]
    return []


def _can_copy(source: Tensor, target: Tensor) -> bool:
    """Return whether copying keeps the values, up to rounding."""
    if source.is_meta or source.layout != target.layout:
        return False
    return torch.can_cast(source.dtype, target.dtype)


def check_numbers(number: int, saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return the problems of the saved hyperparameters."""
    problems = []
    for name, hyperparameter in as_routing(live["strategy"]).hyperparameters.items():
        value = saved.get(name)
        if name not in saved:
            problems.append(f"param group {number}: {name} is missing")
            continue
        if isinstance(value, str) and _may_be_callable(hyperparameter):
            continue
        try:
            hyperparameter.validate(name, value)
            if isinstance(live[name], Tensor):
                tensor_like(live[name], value)
        except (StructPrecondError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"param group {number}: {error}")
    return problems


def _may_be_callable(hyperparameter: Hyperparameter) -> bool:
    """Return whether a string in the checkpoint may describe a callable."""
    try:
        hyperparameter.validate("", _may_be_callable)
    except StructPrecondError:
        return False
    return True


def tensor_like(current: Tensor, value: Any) -> Tensor:
    """Return a saved value in the shape of a live tensor, and numbers with all their digits."""
    dtype = None if isinstance(value, Tensor) else torch.float64
    return torch.as_tensor(value, dtype=dtype).reshape(current.shape)
