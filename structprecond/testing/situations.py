"""Courses of training: layers whose gradients come late, freeze, pause, or are added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from structprecond.testing.models import TinyModel

STEPS = 22
"""The length of a run."""

SAVED_AT = 7
"""The step at which a run is saved or copied, amid the events of the situations."""

Steps = tuple[range, ...]


@dataclass(frozen=True)
class Situation:
    """A course of training of a `TinyModel`.

    Layers are named by their attribute.

    Args:
        name: Its name.
        absent: The steps in which a layer gets no gradient, by layer.
        frozen: The steps in which a layer is frozen with a stale gradient, by layer.
        added: The step at which a layer is added as a param group, by layer.
        micro_batches: The number of backward passes before every step. Default: 1.
        tied: Whether head and embedding share their weight. Default: False.
        odd: Whether there are empty and scalar parameters. Default: False.
    """

    name: str
    absent: Mapping[str, Steps] = field(default_factory=dict)
    frozen: Mapping[str, Steps] = field(default_factory=dict)
    added: Mapping[str, int] = field(default_factory=dict)
    micro_batches: int = 1
    tied: bool = False
    odd: bool = False

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def model(self) -> TinyModel:
        """Return the model before training, with random weights."""
        model = TinyModel(self.tied, self.odd)
        self.freeze(model, 0)
        return model

    def freeze(self, model: nn.Module, step: int) -> None:
        """Freeze and thaw layers for a step."""
        for layer, frozen in self.frozen.items():
            model.get_submodule(layer).requires_grad_(not _in(step, frozen))

    def lacks_gradient(self, parameter: str, step: int) -> bool:
        """Return whether a parameter gets no gradient in a step."""
        return _in(step, self.absent.get(parameter.split(".")[0], ()))


def _in(step: int, ranges: Steps) -> bool:
    return any(step in steps for steps in ranges)


# Layers pause around the save and at refreshes, while layers of the same shape continue.
SITUATIONS = (
    Situation("plain"),
    Situation("late gradient", absent={"second": (range(10),), "conv": (range(3),)}),
    Situation(
        "missing gradients",
        absent={
            "first": (range(5, 9),),
            "conv": (range(2, 4), range(6, 8)),
            "norm": (range(0, STEPS, 2),),
            "embedding": (range(12, 20),),
        },
    ),
    Situation(
        "frozen, then thawed",
        frozen={"second": (range(10),), "embedding": (range(4, 9),), "conv": (range(3, 5),)},
    ),
    Situation("gradient accumulation", micro_batches=3),
    Situation("group added later", added={"second": 4, "head": 12}),
    Situation("empty and scalar parameters", odd=True),
    Situation("tied parameters", tied=True),
)
