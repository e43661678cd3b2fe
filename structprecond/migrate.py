"""Takes over the state of torch's AdamW: `load_adamw`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from structprecond.core.optimizer import StructuredOptimizer
from structprecond.errors import CheckpointError
from structprecond.strategies.adamw import AdamWStrategy


def load_adamw(optimizer: StructuredOptimizer, state_dict: Mapping[str, Any]) -> list[str]:
    """Load the moments of a `torch.optim.AdamW` into the AdamW part of an optimizer.

    All parameters of `AdamW(model)`, and those that a routed optimizer such as `Muon(model)` sends
    to AdamW, continue from the moments and the step numbers of torch's. The others start anew.
    Settings such as the learning rate stay those of the optimizer.

    Parameters are matched by name if torch's optimizer was built with `model.named_parameters()`,
    else by their order, which is that of `model.parameters()` for both.

    Args:
        optimizer: The optimizer, on one process.
        state_dict: The state dict of torch's AdamW or Adam.

    Returns:
        The names of the parameters whose state was loaded.

    Raises:
        CheckpointError: If the state dict is not AdamW's, or does not fit; then nothing is loaded.

    Example:
        >>> from torch import nn
        >>> from structprecond import AdamW
        >>> model = nn.Linear(3, 2)
        >>> before = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> model(torch.ones(4, 3)).sum().backward()
        >>> before.step()
        >>> load_adamw(AdamW(model, lr=0.1), before.state_dict())
        ['weight', 'bias']
    """
    given = _by_name(state_dict)
    own = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    index = {p: i for i, p in enumerate(dict.fromkeys(params))}
    names = {p: optimizer.name_of(p) for p in index}
    found = _match([names[p] for p in index], given)
    loaded = []
    for bucket in optimizer.buckets:
        if not isinstance(bucket.strategy, AdamWStrategy):
            continue
        for unit in bucket.units:
            p = unit.params[0]
            theirs = found.get(names[p])
            if theirs is None:  # torch keeps nothing for parameters without a gradient so far
                continue
            ours = own["state"][index[p]]
            _check(names[p], theirs, ours, len(unit.params))
            ours |= {key: theirs[key] for key in ("exp_avg", "exp_avg_sq")}
            ours["step"] = torch.full_like(ours["step"], int(theirs["step"]))
            ours["initialized"] = torch.ones_like(ours["initialized"])
            loaded.append(names[p])
    if not loaded:
        raise CheckpointError(
            f"{type(optimizer).__name__} has no parameter with AdamW state in the checkpoint. Its "
            "AdamW part is shown by print(describe(optimizer))."
        )
    optimizer.load_state_dict(own)
    order = list(names.values())
    return sorted(loaded, key=order.index)


def _by_name(state_dict: Mapping[str, Any]) -> dict[str | int, Mapping[str, Any]]:
    """Return the state of each parameter by its name, or by its number without names."""
    try:
        groups, state = state_dict["param_groups"], state_dict["state"]
        numbers = [i for group in groups for i in group["params"]]
        named = all("param_names" in group for group in groups)
        names = [n for group in groups for n in group["param_names"]] if named else numbers
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            "Expected the state dict of torch.optim.AdamW, with `state` and `param_groups`, got "
            f"{type(state_dict).__name__}."
        ) from error
    return {name: state.get(i, {}) for name, i in zip(names, numbers, strict=True)}


def _match(
    names: Sequence[str], given: Mapping[str | int, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Return what is given for each name, without parameters that have no state."""
    if any(isinstance(name, int) for name in given):
        if len(given) != len(names):
            raise CheckpointError(
                f"The checkpoint has {len(given)} parameters without names, the optimizer "
                f"{len(names)}. Build both with the same parameters, or torch's AdamW with "
                "model.named_parameters()."
            )
        return {name: s for name, s in zip(names, given.values(), strict=True) if s}
    if missing := [name for name in names if name not in given]:
        raise CheckpointError(f"The checkpoint has no parameter called {', '.join(missing[:5])}.")
    return {name: given[name] for name in names if given[name]}


def _check(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Tensor], params: int) -> None:
    if params > 1:
        raise CheckpointError(
            f"{name} forms one unit with other parameters, which AdamW of torch does not know. "
            "Leave out combine_params."
        )
    if not {"step", "exp_avg", "exp_avg_sq"} <= theirs.keys():
        raise CheckpointError(f"{name} has {', '.join(theirs)}, which is not the state of AdamW.")
    if "max_exp_avg_sq" in theirs:
        raise CheckpointError(f"{name} was trained with amsgrad=True, which this AdamW lacks.")
    for key in ("exp_avg", "exp_avg_sq"):
        if theirs[key].shape != ours[key].shape:
            raise CheckpointError(
                f"{key} of {name} has shape {tuple(theirs[key].shape)} in the checkpoint, "
                f"{tuple(ours[key].shape)} in the optimizer."
            )
