"""Forms units from groupings: which parameters form one tensor, of which shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Size, Tensor, nn

from structprecond.core.naming import BareParameters
from structprecond.errors import GroupError
from structprecond.groups import PreconditionerGroup

# by grouping, shapes of the parameters, and device of the check
GroupedShapes: TypeAlias = dict[tuple[int, tuple[Size, ...], torch.device], Size]


@dataclass(frozen=True, eq=False)
class Unit:
    """Parameters that are grouped into one tensor.

    Args:
        rule: The grouping.
        params: The parameters; the first one holds the unit's state.
        names: Their names.
        shape: The shape of one row `(*dims)`.
        rows: The number of independent rows, 1 unless the grouping is stacked.
        copies: What is updated in place of the parameters if this rank holds only a part of them:
            a copy of each, or of the rows `row_numbers`, as one tensor. Default: None.
        row_numbers: Which rows of a stacked grouping these are. Default: None, all of them.
    """

    rule: PreconditionerGroup
    params: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    shape: Size
    rows: int
    copies: tuple[nn.Parameter, ...] | None = None
    row_numbers: tuple[int, ...] | None = None

    @property
    def tensors(self) -> tuple[nn.Parameter, ...]:
        """What is updated: the parameters, or copies of them."""
        return self.params if self.copies is None else self.copies

    @property
    def label(self) -> str:
        """The names of the parameters, for messages."""
        return " + ".join(self.names)

    @property
    def shapes(self) -> list[Size]:
        """The shapes of what is updated."""
        return [t.shape for t in self.tensors]

    def join(self, tensors: list[Tensor]) -> Tensor:
        """Group tensors of these shapes."""
        return self.rule.group(tensors) if self.row_numbers is None else tensors[0]

    def split(self, grouped: Tensor) -> list[Tensor]:
        """Undo `join`."""
        if self.row_numbers is None:
            return self.rule.ungroup(grouped, self.shapes)
        return [grouped]

    def renewed(self, params: Mapping[nn.Parameter, nn.Parameter]) -> Unit:
        """Return the unit with other parameters of the same shapes."""
        return replace(self, params=tuple(params[p] for p in self.params))


def find_units(
    model: nn.Module | None,
    params: Sequence[nn.Parameter],
    rules: Sequence[PreconditionerGroup],
    names: Mapping[nn.Parameter, str],
) -> list[Unit]:
    """Let each grouping in turn claim parameters.

    A unit is claimed as a whole or not at all. If one of its parameters is claimed already, is not
    in `params`, or is frozen while another is not, the next groupings may claim them.

    Args:
        model: The model; None if only parameters are known.
        params: The parameters to group.
        rules: The groupings, most important first.
        names: A name for every parameter, for messages.

    Returns:
        The units, in the order of their first parameters in `params`.

    Raises:
        GroupError: If a grouping is not a `PreconditionerGroup`, needs a model where there is none,
            names a tensor that is not a parameter of the model, mixes dtypes or devices, or does
            not invert its own `group`; or if no grouping claims a parameter.
    """
    # groupings without `requires_modules` also work on a plain list of parameters
    seen = BareParameters(names) if model is None else model
    known = {id(p) for p in seen.parameters()}
    open_params = {id(p) for p in params}
    units = []
    grouped_shapes: GroupedShapes = {}
    for rule in rules:
        if not isinstance(rule, PreconditionerGroup):
            raise GroupError(
                f"combine_params takes instances of PreconditionerGroup, got {rule!r}. "
                "Did you pass the class instead of an instance?"
            )
        if rule.requires_modules and model is None:
            raise GroupError(
                f"{rule} needs the modules of the model, but the optimizer was given only "
                "parameters. Pass the model as the first argument."
            )
        for members in rule.identify(seen):
            if foreign := [p for p in members if id(p) not in known]:
                raise GroupError(
                    f"{rule}.identify named a tensor of shape {tuple(foreign[0].shape)} that is "
                    "not a parameter of the model. Return only the model's parameters."
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
            f"No grouping in combine_params={tuple(rules)} claims the parameters "
            f"{', '.join(lost)}. Append PerParameter(), or leave them out of params."
        )
    position = {id(p): i for i, p in enumerate(params)}
    return sorted(units, key=lambda unit: position[id(unit.params[0])])


def _unit(
    rule: PreconditionerGroup,
    members: Sequence[nn.Parameter],
    names: Mapping[nn.Parameter, str],
    grouped_shapes: GroupedShapes,
) -> Unit:
    label = " + ".join(f"{names[p]} {tuple(p.shape)}" for p in members)
    if len({(p.dtype, p.device) for p in members}) > 1:
        kinds = ", ".join(f"{names[p]}: {p.dtype} on {p.device}" for p in members)
        raise GroupError(
            f"{rule} groups {label}, but they differ in dtype or device ({kinds}). Convert them, "
            "or leave them to PerParameter()."
        )
    shapes = [p.shape for p in members]
    # check equal shapes only once
    device = torch.device("meta" if members[0].is_meta else "cpu")
    key = (id(rule), tuple(shapes), device)
    if key not in grouped_shapes:
        grouped_shapes[key] = _check_inverse(rule, shapes, label, device)
    grouped = grouped_shapes[key]
    rows = grouped[0] if rule.stacked else 1
    shape = grouped[1:] if rule.stacked else grouped
    if not shape:
        raise GroupError(
            f"{rule}.group returns a tensor of shape {tuple(grouped)} for {label}, which leaves no "
            "axis to precondition. Return at least one axis per row."
        )
    return Unit(rule, tuple(members), tuple(names[p] for p in members), shape, rows)


def _check_inverse(
    rule: PreconditionerGroup, shapes: list[Size], label: str, device: torch.device
) -> Size:
    """Return the shape of the grouped tensor, after checking that `ungroup` inverts `group`.

    Parameters on the meta device have no values, and a check of values would take their memory.
    """
    numbers = torch.arange(sum(s.numel() for s in shapes), dtype=torch.int32, device=device)
    tensors = [
        piece.view(shape)
        for piece, shape in zip(numbers.split([s.numel() for s in shapes]), shapes, strict=True)
    ]
    grouped = rule.group([t.clone() for t in tensors])
    back = rule.ungroup(grouped, shapes)
    if [t.shape for t in back] != shapes:
        raise GroupError(
            f"{rule}.ungroup does not invert {rule}.group: for {label} it returns tensors of "
            f"shapes {[tuple(t.shape) for t in back]}. Return one in the shape of each parameter."
        )
    known = device.type != "meta"
    if known and not all(torch.equal(b, t) for b, t in zip(back, tensors, strict=True)):
        raise GroupError(
            f"{rule}.ungroup does not invert {rule}.group: for {label} it returns entries in other "
            "places. Let both only move entries, and undo each other."
        )
    return grouped.shape
