"""From grouping rules to units: which parameters are one tensor, and of which shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Size, nn

from structprecond.core.naming import BareParameters
from structprecond.errors import GroupError
from structprecond.groups import PreconditionerGroup


@dataclass(frozen=True, eq=False)
class Unit:
    """The parameters that one rule treats jointly.

    Args:
        rule: The rule.
        params: The parameters; the first one carries the unit's state.
        names: Their names.
        shape: The shape of one problem `(*dims)`.
        rows: The number of independent problems, 1 unless the rule is stacked.
    """

    rule: PreconditionerGroup
    params: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    shape: Size
    rows: int

    @property
    def label(self) -> str:
        """The names of the parameters, for messages."""
        return " + ".join(self.names)

    @property
    def shapes(self) -> list[Size]:
        """The shapes of the parameters."""
        return [p.shape for p in self.params]


def find_units(
    model: nn.Module | None,
    params: Sequence[nn.Parameter],
    rules: Sequence[PreconditionerGroup],
    names: Mapping[nn.Parameter, str],
) -> list[Unit]:
    """Let each rule in turn claim parameters.

    A unit is claimed whole or not at all: if one of its parameters has been claimed before, is not
    among `params`, or is frozen while another is not, its parameters are left to the next rules.

    Args:
        model: The model that the rules look at; None if only parameters are known.
        params: The parameters to distribute.
        rules: The rules, most important first.
        names: A name for every parameter, for messages.

    Returns:
        The units, in the order in which `params` names their first parameters.

    Raises:
        GroupError: If a rule is no rule, needs a model where there is none, names something that is
            not a parameter of the model, mixes dtypes or devices, does not invert its own `group`,
            or if a parameter is not claimed by any rule.
    """
    # rules that look at parameters alone see those of a plain list as a model
    seen = BareParameters(names) if model is None else model
    known = {id(p) for p in seen.parameters()}
    open_params = {id(p) for p in params}
    units = []
    grouped_shapes: dict[tuple[int, tuple[Size, ...]], Size] = {}
    for rule in rules:
        if not isinstance(rule, PreconditionerGroup):
            raise GroupError(
                f"combine_params takes instances of PreconditionerGroup, got {rule!r}. "
                "Did you pass the class instead of an instance?"
            )
        if rule.requires_modules and model is None:
            raise GroupError(
                f"{rule} looks at the modules of the model, but the optimizer was given parameters "
                "only. Pass the model as the first argument."
            )
        for members in rule.identify(seen):
            if foreign := [p for p in members if id(p) not in known]:
                raise GroupError(
                    f"{rule}.identify named something of shape {tuple(foreign[0].shape)} that is "
                    "not a parameter of the model. Rules may only name the model's parameters."
                )
            if len({id(p) for p in members}) < len(members):
                label = " + ".join(names.get(p, "?") for p in members)
                raise GroupError(
                    f"{rule}.identify names a parameter twice in one unit: {label}. "
                    "Are these tied? Name each once."
                )
            whole = members and all(id(p) in open_params for p in members)
            if whole and len({p.requires_grad for p in members}) == 1:
                units.append(_unit(rule, members, names, grouped_shapes))
                open_params -= {id(p) for p in members}
    if lost := [names[p] for p in params if id(p) in open_params]:
        raise GroupError(
            f"No rule of combine_params={tuple(rules)} claims the parameters {', '.join(lost)}. "
            "Append PerParameter(), or leave them out of params."
        )
    position = {id(p): i for i, p in enumerate(params)}
    return sorted(units, key=lambda unit: position[id(unit.params[0])])


def _unit(
    rule: PreconditionerGroup,
    members: Sequence[nn.Parameter],
    names: Mapping[nn.Parameter, str],
    grouped_shapes: dict[tuple[int, tuple[Size, ...]], Size],
) -> Unit:
    label = " + ".join(f"{names[p]} {tuple(p.shape)}" for p in members)
    if len({(p.dtype, p.device) for p in members}) > 1:
        kinds = ", ".join(f"{names[p]}: {p.dtype} on {p.device}" for p in members)
        raise GroupError(
            f"{rule} treats {label} jointly, but they differ in dtype or device ({kinds}). "
            "Convert them, or leave them to PerParameter()."
        )
    shapes = [p.shape for p in members]
    # equal shapes are checked once: models repeat themselves
    key = (id(rule), tuple(shapes))
    if key not in grouped_shapes:
        grouped_shapes[key] = _check_inverse(rule, shapes, label)
    grouped = grouped_shapes[key]
    rows = grouped[0] if rule.stacked else 1
    shape = grouped[1:] if rule.stacked else grouped
    if not shape:
        raise GroupError(
            f"{rule}.group makes a tensor of shape {tuple(grouped)} of {label}, which leaves no "
            "axis to precondition. Return at least one axis per problem."
        )
    return Unit(rule, tuple(members), tuple(names[p] for p in members), shape, rows)


def _check_inverse(rule: PreconditionerGroup, shapes: list[Size], label: str) -> Size:
    """Return the shape that `group` makes, after checking that `ungroup` inverts it."""
    numbers = torch.arange(sum(s.numel() for s in shapes), dtype=torch.int32, device="cpu")
    tensors = [
        piece.view(shape)
        for piece, shape in zip(numbers.split([s.numel() for s in shapes]), shapes, strict=True)
    ]
    grouped = rule.group([t.clone() for t in tensors])
    back = rule.ungroup(grouped, shapes)
    if [t.shape for t in back] != shapes:
        raise GroupError(
            f"{rule}.ungroup does not invert {rule}.group: of {label} it makes tensors of shapes "
            f"{[tuple(t.shape) for t in back]}. Return one tensor per parameter, in its shape."
        )
    if not all(torch.equal(b, t) for b, t in zip(back, tensors, strict=True)):
        raise GroupError(
            f"{rule}.ungroup does not invert {rule}.group: of {label} it puts entries in other "
            "places. Both may only move entries."
        )
    return grouped.shape
