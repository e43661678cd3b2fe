"""Chooses an optimizer for a model: `recommend`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from structprecond.checks import check_choice, is_count
from structprecond.core.estimate import Estimate, estimate
from structprecond.core.optimizer import StructuredOptimizer
from structprecond.errors import StructPrecondError
from structprecond.roles import NOT_MATRICES, infer_roles
from structprecond.strategies.adamw import AdamW
from structprecond.strategies.muon import Muon
from structprecond.strategies.recommended import RECOMMENDED
from structprecond.strategies.soap_muon import SOAPMuon
from structprecond.tables import human

Goal = Literal["seconds", "steps"]

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class _Candidate:
    """An optimizer, settings beside the recommended ones, and what speaks for it."""

    optimizer: type[StructuredOptimizer]
    settings: Mapping[str, Any]
    reason: str


# the order of docs/scoreboard.md, language task; a test compares it with the table
_MUON = _Candidate(
    Muon, {}, "it takes the fewest seconds to AdamW's loss on the scoreboard's language task"
)
_SOAP_MUON = _Candidate(
    SOAPMuon,
    {"whitening": "kl"},
    "it takes the fewest steps to AdamW's loss on the scoreboard's language task",
)
_BLOCKED = _Candidate(
    SOAPMuon,
    {"whitening": "kl", "structures": "block128diagonal"},
    "blocks of 128 keep most of what its dense factors gain",
)
_CANDIDATES: Mapping[Goal, tuple[_Candidate, ...]] = {
    "seconds": (_MUON,),
    "steps": (_SOAP_MUON, _BLOCKED, _MUON),
}
_ADAMW = _Candidate(
    AdamW, {}, "the model has no hidden weight matrices, for which the others are made"
)


@dataclass(frozen=True)
class Recommendation:
    """An optimizer for a model, and why; print it, or call it with the model.

    Args:
        optimizer: The optimizer's class.
        settings: Its keywords.
        costs: What it will keep and compute for the model.
        reasons: Why it was chosen, and what was not.
    """

    optimizer: type[StructuredOptimizer]
    settings: Mapping[str, Any]
    costs: Estimate
    reasons: tuple[str, ...]

    def __call__(self, model: nn.Module) -> StructuredOptimizer:
        """Return the optimizer of a model."""
        return self.optimizer(model, **self.settings)

    def __str__(self) -> str:
        """Return the call that makes the optimizer, and the reasons."""
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        call = f"{self.optimizer.__name__}(model{settings})"
        return "\n".join([call, *(f"- {reason}" for reason in self.reasons)])


def recommend(
    model: nn.Module, *, memory: int | str | None = None, goal: Goal = "seconds"
) -> Recommendation:
    """Choose an optimizer and its settings for a model; allocates no state.

    The order comes from the scoreboard (docs/scoreboard.md): Muon takes the fewest seconds to a
    loss there, SOAP-Muon the fewest steps. Steps count where forward and backward pass take far
    longer than the optimizer: on large batches. A model without hidden matrices gets AdamW.

    Args:
        model: The model, on any device, also on "meta".
        memory: The most bytes of state: a number, or a text such as "2GiB" or "500 MB". Default:
            None, no limit.
        goal: What to save: "seconds" or "steps". Default: "seconds".

    Returns:
        The choice. Its learning rate suits small models; start a large one from the learning rate
        of a tuned AdamW, times the factor in docs/scoreboard.md.

    Raises:
        StructPrecondError: If `memory` or `goal` is not understood, or if no optimizer fits.

    Example:
        >>> model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
        >>> choice = recommend(model, goal="steps", memory="16MiB")
        >>> choice.optimizer.__name__, choice.settings["structures"]
        ('SOAPMuon', 'block128diagonal')
        >>> optimizer = choice(model)
    """
    if not isinstance(model, nn.Module):
        raise StructPrecondError(
            f"recommend needs the model, an nn.Module, got a {type(model).__name__}."
        )
    check_choice("goal", goal, Goal)
    limit = None if memory is None else _bytes(memory)
    reasons: list[str] = []
    for candidate in _candidates(model, goal):
        settings = {**RECOMMENDED[candidate.optimizer.__name__], **candidate.settings}
        costs = estimate(model, candidate.optimizer, **settings)
        if limit is None or costs.state_bytes <= limit:
            fits = "" if limit is None else f" of the {human(limit)} allowed"
            why = (candidate.reason, f"its state takes {human(costs.state_bytes)}{fits}")
            return Recommendation(candidate.optimizer, settings, costs, (*why, *reasons))
        reasons.append(
            f"{_name(candidate)} would take {human(costs.state_bytes)}, more than {human(limit)}"
        )
    raise StructPrecondError(
        f"No optimizer fits: {'; '.join(reasons)}. Raise `memory`, or shard the model over several "
        "devices, so that each keeps a part of the state."
    )


def _candidates(model: nn.Module, goal: Goal) -> Iterator[_Candidate]:
    roles = infer_roles(model)
    hidden = (
        p.ndim > 1 and roles[name].role not in NOT_MATRICES for name, p in model.named_parameters()
    )
    yield from _CANDIDATES[goal] if any(hidden) else (_ADAMW,)


def _name(candidate: _Candidate) -> str:
    structure = candidate.settings.get("structures")
    return candidate.optimizer.__name__ + (f" with {structure}" if structure else "")


def _bytes(memory: int | str) -> int:
    """Return a number of bytes from a number or a text.

    Example:
        >>> _bytes("1.5 KiB"), _bytes(7)
        (1536, 7)
    """
    if is_count(memory):
        return int(memory)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*", str(memory))
    if found is None:
        raise StructPrecondError(
            f"memory is a positive number of bytes, or a text such as '2GiB' or '500 MB', got "
            f"{memory!r}."
        )
    return int(float(found[1]) * _UNITS[found[2]])
