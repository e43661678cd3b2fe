"""The contract of groupings."""

from __future__ import annotations

import copy
import pickle
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from structprecond.core.units import find_units
from structprecond.core.windows import find_windows
from structprecond.groups import PerParameter, PreconditionerGroup


class PreconditionerGroupContract:
    """Tests of a `PreconditionerGroup` on a model of your choice.

    Example:
        >>> class TestFlattenEmbedding(PreconditionerGroupContract):
        ...     def make(self):
        ...         return FlattenEmbedding(), nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    """

    @abstractmethod
    def make(self) -> tuple[PreconditionerGroup, nn.Module]:
        """Return the grouping, and a model in which it finds at least one unit."""
        raise NotImplementedError

    def _units(self) -> list[tuple[PreconditionerGroup, list[Tensor]]]:
        rule, model = self.make()
        return [(rule, [torch.randn_like(p) for p in unit]) for unit in rule.identify(model)]

    def test_finds_parameters_of_the_model(self) -> None:
        """`identify` names parameters of the model, each at most once per unit."""
        rule, model = self.make()
        units = rule.identify(model)
        assert units
        known = {id(p) for p in model.parameters()}
        for unit in units:
            assert {id(p) for p in unit} <= known
            assert len({id(p) for p in unit}) == len(unit) > 0

    def test_group_and_ungroup_are_inverse(self) -> None:
        """`ungroup` returns every entry, and `group` of these the grouped tensor."""
        for rule, tensors in self._units():
            shapes = [t.shape for t in tensors]
            grouped = rule.group(tensors)
            assert grouped.numel() == sum(t.numel() for t in tensors)
            back = rule.ungroup(grouped, shapes)
            assert all(torch.equal(b, t) for b, t in zip(back, tensors, strict=True))
            assert torch.equal(rule.group(back), grouped)

    def test_group_and_ungroup_are_linear(self) -> None:
        """Grouping a sum gives the sum of the groups: entries move, but do not change."""
        for rule, tensors in self._units():
            others = [torch.randn_like(t) for t in tensors]
            total = rule.group([t + o for t, o in zip(tensors, others, strict=True)])
            assert torch.equal(total, rule.group(tensors) + rule.group(others))

    def test_stacked_rules_keep_problems_apart(self) -> None:
        """A stacked grouping makes at least two dimensions, the first one for rows."""
        rule, _ = self.make()
        for _, tensors in self._units():
            assert rule.group(tensors).ndim >= (2 if rule.stacked else 1)

    def test_views_agree_with_group(self) -> None:
        """The views that the optimizer reads and writes match `group`."""
        rule, model = self.make()
        names = {p: name for name, p in model.named_parameters()}
        for unit in find_units(model, list(names), (rule, PerParameter()), names):
            windows = find_windows(unit)
            if windows is None or unit.rule is not rule:
                continue
            tensors = [torch.randn_like(p) for p in unit.params]
            stack = torch.full((unit.rows, *unit.shape), torch.nan)
            for window, tensor in zip(windows, tensors, strict=True):
                window.of(stack).copy_(tensor)
            grouped = rule.group(tensors)
            assert torch.equal(stack.view(grouped.shape), grouped)

    def test_is_equal_to_its_copy(self) -> None:
        """Copies and pickles of the grouping are equal to it, so that equal units are stacked."""
        rule: Any = self.make()[0]
        assert copy.deepcopy(rule) == rule
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert hash(copy.deepcopy(rule)) == hash(rule)
