"""Saving and loading: tensors and plain values only, checked as a whole before it is copied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from numbers import Number
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from structprecond.core.routing import Routing, as_routing
from structprecond.errors import CheckpointError, StructPrecondError
from structprecond.groups import PreconditionerGroup
from structprecond.strategies.base import Hyperparameter, Strategy
from structprecond.structures import StructuredMatrix

if TYPE_CHECKING:
    from structprecond.core.optimizer import StructuredOptimizer

FORMAT = 1
"""Version of the layout, saved as `format` in every param group."""

_MOST_PROBLEMS = 20
_LATER_ROLES = ("depthwise", "router")
_COMPARED = ("strategy", "structures", "combine_params")
_NOT_LOADED = {*_COMPARED, "preconditioner_dtypes", "params", "param_names", "format"}


def save(optimizer: StructuredOptimizer) -> dict[str, Any]:
    """Return the optimizer's state as torch lays it out, in tensors of their own."""
    index: dict[Tensor, int] = {}
    groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            index.setdefault(p, len(index))
        plain = {key: _plain(value) for key, value in group.items() if key != "params"}
        plain |= {"format": FORMAT, "params": [index[p] for p in group["params"]]}
        groups.append(plain)
    # cloned row by row: a view of a stack would drag the whole stack into the file
    state = {
        index[p]: {name: tensor.clone() for name, tensor in entry.items()}
        for p, entry in optimizer.state.items()
    }
    return {"state": state, "param_groups": groups}


def _plain(value: Any) -> Any:
    """Return what `torch.load` reads without trust; a description of what it does not."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(v) for v in value)
    if isinstance(value, Number) and hasattr(value, "item"):
        return value.item()  # numpy's numbers are Python's in disguise
    return describe_object(value)


def describe_object(value: Any) -> str:
    """Describe a callable, strategy, rule or structure by what makes two of them equal.

    Descriptions are compared with those of older versions, so fields that have their defaults are
    left out: a field that is new then does not matter. Nor do addresses, which differ every time.
    """
    if isinstance(value, Mapping):
        entries = sorted((repr(k), describe_object(v)) for k, v in value.items())
        return "{" + ", ".join(f"{k}: {v}" for k, v in entries) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(describe_object(v) for v in value) + ")"
    if isinstance(value, str):
        return repr(value)
    if isinstance(value, type) and issubclass(value, StructuredMatrix):
        return repr(value.name)
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Strategy | Routing | PreconditionerGroup) and is_dataclass(value):
        values = {
            f.name: getattr(value, f.name) for f in fields(value) if not _is_default(value, f)
        }
        given = (f"{name}={describe_object(v)}" for name, v in values.items())
        return f"{type(value).__qualname__}({', '.join(given)})"
    if getattr(type(value), "__repr__") is object.__repr__:  # noqa: B009
        return type(value).__qualname__
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _is_default(value: Any, field: Field[Any]) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return default is not MISSING and bool(getattr(value, field.name) == default)


def load(optimizer: StructuredOptimizer, checkpoint: Mapping[str, Any]) -> None:
    """Load a checkpoint whole or not at all.

    Tensors are copied into the optimizer's own: dtypes and devices stay. Numbers of the param
    groups are taken over; callables, strategies, rules and structures stay the live ones.

    Raises:
        CheckpointError: If the checkpoint does not fit; the message lists what differs.
    """
    try:
        copies, changes = _plan(optimizer, checkpoint)
    except CheckpointError:
        raise
    # in a damaged or foreign file, anything may stand anywhere
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint is damaged or was not written by state_dict(): {error!r}. Nothing was "
            "loaded; take an older checkpoint."
        ) from error
    with torch.no_grad():
        for target, source in copies:
            target.copy_(source)
    for group, values in zip(optimizer.param_groups, changes, strict=True):
        group.update(values)


def _plan(
    optimizer: StructuredOptimizer, checkpoint: Mapping[str, Any]
) -> tuple[list[tuple[Tensor, Tensor]], list[dict[str, Any]]]:
    """Return all that loading has to do, none of which can fail, and do nothing yet.

    Returns:
        Pairs of tensors, the second to be copied into the first, and new values for each group.
    """
    saved_groups, saved_state = _parts(checkpoint)
    live_groups = optimizer.param_groups
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in live_groups]:
        raise CheckpointError(
            f"The checkpoint has param groups of {[len(g['params']) for g in saved_groups]} "
            f"parameters, the optimizer of {[len(g['params']) for g in live_groups]}. "
            "Build the optimizer as it was when the checkpoint was written."
        )
    problems: list[str] = []
    copies: list[tuple[Tensor, Tensor]] = []
    changes: list[dict[str, Any]] = []
    for number, (saved, live) in enumerate(zip(saved_groups, live_groups, strict=True)):
        problems += _compare_groups(number, saved, live)
        problems += _check_numbers(number, saved, live)
        for i, p in zip(_match(saved, live), live["params"], strict=True):
            mine, theirs = dict(optimizer.state.get(p, {})), saved_state.get(i, {})
            if not theirs and not p.requires_grad:
                continue  # torch's tools for distributed checkpoints leave out what is frozen
            problems += _compare_entries(optimizer.name_of(p), theirs, mine)
            copies += [(target, theirs[name]) for name, target in mine.items() if name in theirs]
    known = {i for group in saved_groups for i in group["params"]}
    problems += [f"state of a parameter {i!r} in no group" for i in saved_state if i not in known]
    if not problems:  # else tensors may be no tensors, and numbers no numbers
        problems += _compare_shared(copies)
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
    """Return param groups and state, if they look like what `save` writes."""
    try:
        groups, state = checkpoint["param_groups"], checkpoint["state"]
        # torch's tools for distributed checkpoints keep only the keys that live groups have
        formats = {group.get("format", FORMAT) for group in groups}
        complete = all(isinstance(g["params"], list) and "strategy" in g for g in groups)
        complete = complete and isinstance(state, Mapping)
        complete = complete and all(isinstance(entry, Mapping) for entry in state.values())
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError):
        complete = False
    if not complete:
        raise CheckpointError(
            "This is no checkpoint of a structured optimizer: expected what its state_dict() "
            "returned, a dict with 'state' and 'param_groups' that name their 'strategy'."
        )
    if formats - {FORMAT}:
        raise CheckpointError(
            f"The checkpoint has format {sorted(formats)}, this version reads format {FORMAT}."
        )
    return groups, state


def _match(saved: Mapping[str, Any], live: Mapping[str, Any]) -> Iterable[Any]:
    """Return the saved index of every live parameter: by name if both sides know names."""
    theirs, mine = saved.get("param_names"), live.get("param_names")
    if theirs and mine and set(theirs) == set(mine):
        by_name = dict(zip(theirs, saved["params"], strict=True))
        return [by_name[name] for name in mine]
    return list(saved["params"])


def _compare_groups(number: int, saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    problems = []
    theirs, mine = saved.get("param_names"), live.get("param_names")
    if theirs and mine and set(theirs) != set(mine):
        problems += [f"{n}: not in the checkpoint" for n in mine if n not in set(theirs)]
        problems += [f"{n}: not in the optimizer" for n in theirs if n not in set(mine)]
    for key in _COMPARED:
        if key in live and saved.get(key) not in (_plain(live[key]), _plain(_older(live[key]))):
            problems.append(
                f"param group {number}: {key} is {saved.get(key)!r} in the checkpoint, "
                f"{_plain(live[key])!r} in the optimizer"
            )
    return problems


def _older(value: Any) -> Any:
    """Return a routing without the roles that older checkpoints did not know.

    Where it matters, since parameters with such a role went elsewhere, their state does not fit.
    """
    if not isinstance(value, Routing):
        return value
    known = {role: s for role, s in value.roles.items() if role not in _LATER_ROLES}
    return replace(value, roles=known)


def _compare_entries(
    label: str, theirs: Mapping[str, Any], mine: Mapping[str, Tensor]
) -> list[str]:
    """Return what is wrong with the saved state of a unit."""
    problems = [f"{label}: missing {name}" for name in mine if name not in theirs]
    problems += [f"{label}: unexpected {name}" for name in theirs if name not in mine]
    for name, target in mine.items():
        source = theirs.get(name, target)
        if not isinstance(source, Tensor) or source.shape != target.shape:
            got = tuple(source.shape) if isinstance(source, Tensor) else repr(source)
            problems.append(f"{label}: {name} is {got}, expected {tuple(target.shape)}")
        elif not _can_copy(source, target):
            problems.append(
                f"{label}: {name} is {source.dtype}, {source.layout}, on {source.device}, which "
                f"cannot be copied into {target.dtype}, {target.layout}, on {target.device}"
            )
    return problems


def _compare_shared(copies: Sequence[tuple[Tensor, Tensor]]) -> list[str]:
    """Return whether all parameters tell the same about what the optimizer has once."""
    first: dict[int, Tensor] = {}
    for target, source in copies:
        known = first.setdefault(id(target), source)
        if known is not source and not known.equal(source):
            return ["global_step or batch_size: parameters have different ones in the checkpoint"]
    return []


def _can_copy(source: Tensor, target: Tensor) -> bool:
    """Whether values would survive, up to rounding."""
    if source.is_meta or source.layout != target.layout:
        return False
    return torch.can_cast(source.dtype, target.dtype)


def _check_numbers(number: int, saved: Mapping[str, Any], live: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the saved hyperparameters."""
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
                torch.as_tensor(value).reshape(live[name].shape)
        except (StructPrecondError, RuntimeError, TypeError, ValueError) as error:
            problems.append(f"param group {number}: {error}")
    return problems


def _may_be_callable(hyperparameter: Hyperparameter) -> bool:
    """Whether a text in the checkpoint may stand for a callable."""
    try:
        hyperparameter.validate("", _may_be_callable)
    except StructPrecondError:
        return False
    return True


def _numbers(
    saved: Mapping[str, Any], live: Mapping[str, Any]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Any]]:
    """Return which tensors of a group to copy into which, and which values it gets."""
    copies, values = [], {}
    for key in saved.keys() - _NOT_LOADED:
        value, current = saved[key], live.get(key)
        if isinstance(current, Tensor):
            copies.append((current, torch.as_tensor(value).reshape(current.shape)))
        elif callable(current) or (isinstance(value, str) and not isinstance(current, str)):
            continue  # callables stay the live ones; a text stands for one in the checkpoint
        else:
            # a copy: the dict and what is in it stay the caller's
            values[key] = value.item() if isinstance(value, Tensor) else deepcopy(value)
    return copies, values
