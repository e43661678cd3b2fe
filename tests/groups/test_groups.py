"""The built-in groupings, by their contract and on shapes worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    FlattenAndConcatenate,
    FlattenEmbedding,
    GroupError,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SplitHeads,
)
from structprecond.core.units import Unit, find_units
from structprecond.core.windows import find_windows
from structprecond.testing import PreconditionerGroupContract


def _mixed_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(5, 4), nn.Linear(4, 6), nn.Conv2d(1, 3, 2), nn.LayerNorm(1), nn.Linear(6, 1)
    )


def _units(model: nn.Module, *rules: PreconditionerGroup) -> list[Unit]:
    names = {p: name for name, p in model.named_parameters()}
    return find_units(model, list(names), rules, names)


def _claims(units: list[Unit]) -> dict[str, str]:
    return {unit.label: type(unit.rule).__name__ for unit in units}


class TestPerParameterContract(PreconditionerGroupContract):
    def make(self) -> tuple[PreconditionerGroup, nn.Module]:
        return PerParameter(), _mixed_model()


class TestLinearWeightBiasContract(PreconditionerGroupContract):
    def make(self) -> tuple[PreconditionerGroup, nn.Module]:
        return LinearWeightBias(), _mixed_model()


class TestFlattenEmbeddingContract(PreconditionerGroupContract):
    def make(self) -> tuple[PreconditionerGroup, nn.Module]:
        return FlattenEmbedding(), _mixed_model()


class TestSplitRowsContract(PreconditionerGroupContract):
    def make(self) -> tuple[PreconditionerGroup, nn.Module]:
        return SplitHeads("1.*", heads=3), _mixed_model()


class TestSplitColumnsContract(PreconditionerGroupContract):
    def make(self) -> tuple[PreconditionerGroup, nn.Module]:
        return SplitHeads("1.weight", heads=2, axis=1), _mixed_model()


@pytest.mark.parametrize(
    ("shape", "grouped"),
    [((), (1,)), ((1, 1), (1,)), ((4, 1, 3), (4, 3)), ((5,), (5,)), ((2, 3, 1, 4), (2, 3, 4))],
)
def test_per_parameter_drops_axes_of_size_one(
    shape: tuple[int, ...], grouped: tuple[int, ...]
) -> None:
    assert PerParameter().group([torch.zeros(shape)]).shape == grouped


def test_linear_weight_bias_appends_the_bias_as_last_column() -> None:
    weight, bias = torch.arange(6.0).view(2, 3), torch.tensor([10.0, 20.0])
    expected = torch.tensor([[0.0, 1.0, 2.0, 10.0], [3.0, 4.0, 5.0, 20.0]])
    assert torch.equal(LinearWeightBias().group([weight, bias]), expected)


def test_linear_weight_bias_with_one_output_is_a_vector() -> None:
    grouped = LinearWeightBias().group([torch.ones(1, 3), torch.zeros(1)])
    assert torch.equal(grouped, torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_split_heads_rows_are_the_heads() -> None:
    weight = torch.arange(24.0).view(6, 4)
    assert torch.equal(SplitHeads("w", heads=3).group([weight])[1], weight[2:4])
    assert torch.equal(SplitHeads("w", heads=2, axis=1).group([weight])[1], weight[:, 2:])


def test_split_heads_refuses_what_cannot_be_split() -> None:
    model = _mixed_model()
    with pytest.raises(GroupError, match=r"matches no parameter.*1\.weight"):
        SplitHeads("nothing", heads=2).identify(model)
    with pytest.raises(GroupError, match=r"axis 0 of 1\.weight .* into 4 equal pieces"):
        SplitHeads("1.weight", heads=4).identify(model)
    with pytest.raises(GroupError, match="heads must be an integer of at least 1"):
        SplitHeads("1.weight", heads=0)


def test_earlier_rules_win() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Embedding(4, 3))
    per_parameter_first = _units(model, PerParameter(), LinearWeightBias())
    assert set(_claims(per_parameter_first).values()) == {"PerParameter"}
    assert _claims(_units(model, LinearWeightBias(), FlattenEmbedding())) == {
        "0.weight + 0.bias": "LinearWeightBias",
        "1.weight": "FlattenEmbedding",
    }


def test_a_frozen_weight_leaves_its_bias_to_the_next_rule() -> None:
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    claims = _claims(_units(model, LinearWeightBias(), PerParameter()))
    assert claims == {"weight": "PerParameter", "bias": "PerParameter"}


def test_a_wholly_frozen_layer_is_one_unit() -> None:
    model = nn.Linear(3, 2).requires_grad_(False)
    assert _claims(_units(model, LinearWeightBias())) == {"weight + bias": "LinearWeightBias"}


def test_a_weight_outside_the_selection_leaves_its_bias_to_the_next_rule() -> None:
    model = nn.Linear(3, 2)
    names = {p: name for name, p in model.named_parameters()}
    units = find_units(model, [model.bias], (LinearWeightBias(), PerParameter()), names)
    assert _claims(units) == {"bias": "PerParameter"}


def test_tied_parameters_are_one() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    claims = _claims(_units(model, LinearWeightBias(), FlattenEmbedding(), PerParameter()))
    assert claims == {"0.weight + 1.bias": "LinearWeightBias"}
    claims = _claims(_units(model, FlattenEmbedding(), LinearWeightBias(), PerParameter()))
    assert claims == {"0.weight": "FlattenEmbedding", "1.bias": "PerParameter"}


def test_a_weight_shared_by_two_layers_goes_to_the_first() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    claims = _claims(_units(model, LinearWeightBias(), PerParameter()))
    assert claims == {"0.weight + 0.bias": "LinearWeightBias", "1.bias": "PerParameter"}


def test_unclaimed_parameters_are_named() -> None:
    with pytest.raises(GroupError, match=r"claims the parameters 1\.weight, 1\.bias"):
        _units(nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2)), FlattenEmbedding())


class _Padded(FlattenAndConcatenate):
    """Makes grouped tensors with entries that belong to no parameter."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [list(model.parameters())]

    def group(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([super().group(tensors), tensors[0].new_zeros(2)])

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[torch.Size]) -> list[Tensor]:
        return super().ungroup(grouped_tensor[:-2], tensor_shapes)


def test_windows_are_used_only_where_views_cover_everything() -> None:
    model = nn.Linear(4, 2)
    by_views, by_copies = LinearWeightBias(), SplitHeads("weight", heads=2, axis=1)
    assert find_windows(_units(model, by_views)[0]) is not None
    assert find_windows(_units(model, by_copies, PerParameter())[0]) is None
    assert find_windows(_units(model, _Padded())[0]) is None
