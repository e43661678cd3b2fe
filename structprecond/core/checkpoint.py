"""Saves and loads tensors and plain values; checks a whole checkpoint before copying any of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from structprecond.core.agreement import Facts
from structprecond.core.boxes import copy_into, is_dtensor
from structprecond.core.misfits import (
    COMPARED,
    check_numbers,
    compare_entries,
    compare_groups,
    compare_shared,
    other_default,
    tensor_like,
    with_tuples,
)
from structprecond.core.plain import plain_value
from structprecond.core.state import ByParameter
from structprecond.core.team import Alone
from structprecond.errors import CheckpointError

FORMAT = 2
"""The version of the layout, saved as `format` in every param group."""

_FORMATS = {1, FORMAT}
_RENAMED_IN_2 = {"begun": "initialized", "lost": "compensation"}
_NEW_IN_2 = {"phase_offset", "seed"}

_MOST_PROBLEMS = 20
_SHARED = {"global_step", "batch_size"}
_NOT_LOADED = {*COMPARED, "preconditioner_dtypes", "params", "param_names", "format"}

Groups: TypeAlias = Sequence[dict[str, Any]]
_Changes: TypeAlias = tuple[list[tuple[Tensor, Tensor]], list[dict[str, Any]]]


def save(param_groups: Groups, state: ByParameter) -> dict[str, Any]:
    """Return param groups and state in torch's layout, as copies."""
    index: dict[Tensor, int] = {}
    groups = []
    for group in param_groups:
        for p in group["params"]:
            index.setdefault(p, len(index))
        plain = {key: plain_value(value) for key, value in group.items() if key != "params"}
        plain |= {"format": FORMAT, "params": [index[p] for p in group["params"]]}
        groups.append(plain)
    # cloned row by row: a view would save its whole stack
    saved = {
        i: {name: tensor.clone() for name, tensor in state[p].items()}
        for p, i in index.items()
        if p in state
    }
    return {"state": saved, "param_groups": groups}


def load(
    team: Alone,
    param_groups: Groups,
    used: Groups,
    state: ByParameter,
    names: Mapping[nn.Parameter, str],
    checkpoint: Mapping[str, Any],
) -> None:
    """Load a checkpoint as a whole or not at all.

    Tensors are copied into those of `state`, which keep their dtypes and devices. Numbers in the
    param groups are loaded; callables, strategies, groupings and structures stay the live ones.

    Args:
        team: The ranks that train together.
        param_groups: The live param groups.
        used: The same groups, with the configuration and the names that the optimizer uses.
        state: The live state of each parameter by name.
        names: The names of the parameters, for messages.
        checkpoint: The return value of `save`.

    Raises:
        CheckpointError: If the checkpoint does not fit; the message lists the differences.
        DistributedError: If it does not fit on another rank, or differs between ranks.
    """
    whole = team.gather(state)

    def plan() -> tuple[_Changes, Facts]:
        return _checked_plan(used, whole, names, checkpoint), _layouts(checkpoint)

    copies, changes = team.decide(plan, "load")
    with torch.no_grad():
        for target, source in copies:
            copy_into(target, source)
        team.scatter(whole, state)
    for group, values in zip(param_groups, changes, strict=True):
        group.update(values)


def _layouts(checkpoint: Mapping[str, Any]) -> Facts:
    """Return how each tensor of the state is placed, which has to be the same on all ranks."""
    placements = {
        f"{key}, {name}": str(tensor.placements) if is_dtensor(tensor) else "whole"
        for key, entry in checkpoint["state"].items()
        for name, tensor in entry.items()
    }
    return {"the checkpoint": placements}


def _checked_plan(
    used: Groups,
    state: ByParameter,
    names: Mapping[nn.Parameter, str],
    checkpoint: Mapping[str, Any],
) -> _Changes:
    """Return the changes that loading makes; anything that goes wrong is a `CheckpointError`."""
    try:
        return _plan(used, state, names, checkpoint)
    except CheckpointError:
        raise
    # a damaged or foreign file may hold anything
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint is damaged or was not written by state_dict(): {error!r}. Nothing was "
            "loaded; use an older checkpoint."
        ) from error


def with_state(param_groups: Groups, checkpoint: Any) -> set[Tensor]:
    """Return the parameters that a checkpoint holds state of their own for.

    Others were frozen, or belong to the unit of another parameter.
    """
    try:
        groups, state = _parts(checkpoint)
        pairs = [
            (i, p)
            for saved, live in zip(_in_live_order(groups, param_groups), param_groups, strict=True)
            for i, p in zip(_match(saved, live), live["params"], strict=True)
        ]
        return {p for i, p in pairs if set(state.get(i, {})) - _SHARED}
    except (CheckpointError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return set()  # loading says what is wrong with it


def _plan(
    live_groups: Groups,
    state: ByParameter,
    names: Mapping[nn.Parameter, str],
    checkpoint: Mapping[str, Any],
) -> _Changes:
    """Check a checkpoint and return the changes that loading makes, none of which can fail.

    Returns:
        Pairs (target, source) of tensors to copy, and the new values of each group.
    """
    saved_groups, saved_state = _parts(checkpoint)
    saved_groups = _in_live_order(saved_groups, live_groups)
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in live_groups]:
        raise CheckpointError(
            f"The checkpoint's param groups have {[len(g['params']) for g in saved_groups]} "
            f"parameters, the optimizer's have {[len(g['params']) for g in live_groups]}. "
            "Build the optimizer as it was when the checkpoint was written."
        )
    problems: list[str] = []
    copies: list[tuple[Tensor, Tensor]] = []
    changes: list[dict[str, Any]] = []
    for number, (saved, live) in enumerate(zip(saved_groups, live_groups, strict=True)):
        problems += compare_groups(number, saved, live)
        problems += check_numbers(number, saved, live)
        misfits: list[str] = []
        for i, p in zip(_match(saved, live), live["params"], strict=True):
            mine, theirs = dict(state.get(p, {})), saved_state.get(i, {})
            if not theirs and not p.requires_grad:
                continue  # torch's distributed checkpoints omit frozen parameters
            if not set(theirs) - _SHARED and _is_fresh(mine):
                mine = {name: mine[name] for name in theirs}  # it was frozen when it was saved
            theirs = _up_to_date(theirs, mine)
            misfits += compare_entries(names[p], theirs, mine)
            copies += [(target, theirs[name]) for name, target in mine.items() if name in theirs]
        problems += (other_default(number, saved, live) if misfits else []) + misfits
    known = {i for group in saved_groups for i in group["params"]}
    problems += [f"state of a parameter {i!r} in no group" for i in saved_state if i not in known]
    if not problems:  # otherwise values may have wrong types
        problems += compare_shared(copies)
        for saved, live in zip(saved_groups, live_groups, strict=True):
            more, values = _numbers(saved, live)
            copies += more
            changes.append(values)
    if problems:
        rest = len(problems) - _MOST_PROBLEMS
        tail = [f"... and {rest} more"] if rest > 0 else []
        raise CheckpointError(
            "The checkpoint does not fit the optimizer; nothing was loaded.\n  "
            + "\n  ".join(problems[:_MOST_PROBLEMS] + tail)
        )
    return copies, changes


def _parts(checkpoint: Any) -> tuple[Sequence[Mapping[str, Any]], Mapping[Any, Any]]:
    """Return param groups and state if they have the layout that `save` writes."""
    try:
        groups, state = checkpoint["param_groups"], checkpoint["state"]
        # torch's distributed checkpoints keep only the keys of the live groups
        formats = {group.get("format", FORMAT) for group in groups}
        complete = all(isinstance(g["params"], list) and "strategy" in g for g in groups)
        complete = complete and isinstance(state, Mapping)
        complete = complete and all(isinstance(entry, Mapping) for entry in state.values())
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError):
        complete = False
    if not complete:
        raise CheckpointError(
            "This is not a checkpoint of a structured optimizer: expected a dict with 'state' and "
            "'param_groups' that name their 'strategy'. Pass what state_dict() returned."
        )
    if formats - _FORMATS:
        raise CheckpointError(
            f"The checkpoint has format {sorted(formats)}, but this version reads the formats "
            f"{sorted(_FORMATS)}. Use the version of the library that wrote it."
        )
    return groups, state


def _is_fresh(mine: Mapping[str, Tensor]) -> bool:
    """Return whether a unit has state, but no gradient has come so far."""
    return "initialized" in mine and not bool(mine["initialized"].any())


def _up_to_date(theirs: Mapping[str, Any], mine: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Return a unit's saved state under today's names; values that format 1 lacks stay live."""
    if "begun" not in theirs:  # torch's distributed checkpoints drop the format number
        return theirs
    kept = {name: mine[name] for name in _NEW_IN_2 if name in mine}
    return kept | {_RENAMED_IN_2.get(name, name): value for name, value in theirs.items()}


def _names_in(group: Mapping[str, Any]) -> Sequence[str] | None:
    """Return the name of each parameter of a group; None if it has none."""
    # torch.distributed.checkpoint puts names into params in the live order; param_names are saved
    if group["params"] and all(isinstance(p, str) for p in group["params"]):
        return list(group["params"])
    return group.get("param_names") or None


def _in_live_order(
    saved_groups: Sequence[Mapping[str, Any]], live_groups: Groups
) -> Sequence[Mapping[str, Any]]:
    """Return saved groups in the order of the live groups with the same names, if all have one."""
    if len(saved_groups) != len(live_groups):
        return saved_groups
    waiting: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for group in saved_groups:
        waiting.setdefault(tuple(sorted(_names_in(group) or ())), []).append(group)
    found = []
    for group in live_groups:
        same = waiting.get(tuple(sorted(_names_in(group) or ())))
        if not same:
            return saved_groups
        found.append(same.pop(0))
    return found


def _match(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Iterable[Any]:
    """Return the saved index of every live parameter: by name if both sides have names.

    Parameters of the same name are matched by order.
    """
    theirs, mine = _names_in(saved), _names_in(live)
    if theirs is None or mine is None or sorted(theirs) != sorted(mine):
        return list(saved["params"])
    by_name: dict[str, list[Any]] = {}
    for name, i in zip(theirs, saved["params"], strict=True):
        by_name.setdefault(name, []).append(i)
    return [by_name[name].pop(0) for name in mine]


def _numbers(
    saved: Mapping[str, Any], live: Mapping[str, Any]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Any]]:
    """Return the tensors of a group to copy, as pairs (target, source), and its new values."""
    copies, values = [], {}
    for key in sorted(saved.keys() - _NOT_LOADED):  # in the same order on all ranks
        value, current = saved[key], live.get(key)
        if isinstance(current, Tensor):
            copies.append((current, tensor_like(current, value)))
        elif callable(current) or (isinstance(value, str) and not isinstance(current, str)):
            continue  # callables stay live; the checkpoint describes them in strings
        else:
            # a copy: the caller keeps the dict and its contents
            value = value.item() if isinstance(value, Tensor) else deepcopy(value)
            values[key] = with_tuples(value) if isinstance(current, tuple) else value
    return copies, values
