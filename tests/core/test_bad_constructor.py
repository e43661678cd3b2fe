"""The constructor refuses wrong models, groupings and structures, and leaves the model alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Size, Tensor, nn

from structprecond import (
    DiagonalMatrix,
    FlattenAndConcatenate,
    GroupError,
    HyperparameterError,
    LinearWeightBias,
    MuonStrategy,
    PerParameter,
    SIRFShampoo,
    SplitHeads,
    StructPrecondError,
    StructureError,
)
from tests.helpers import net, same_bits, values

FOREIGN = nn.Parameter(torch.ones(5, 7))


@dataclass(frozen=True)
class Foreign(FlattenAndConcatenate):
    """Claims a parameter that is not in the model."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [[*model.parameters(), FOREIGN]]


@dataclass(frozen=True)
class OneWeightOnly(PerParameter):
    """Leaves all but one weight to the next grouping."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [[p] for name, p in model.named_parameters() if name == "0.weight"]


@dataclass(frozen=True)
class OneShort(FlattenAndConcatenate):
    """Returns fewer tensors than it was given."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [list(model.parameters())]

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        return super().ungroup(grouped_tensor[: -tensor_shapes[-1].numel()], tensor_shapes[:-1])


@dataclass(frozen=True)
class Flat(PerParameter):
    """Returns vectors."""

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        return [grouped_tensor.flatten()]


@dataclass(frozen=True)
class Transposing(PerParameter):
    """Groups the transpose, and returns the right shape with the wrong entries."""

    def group(self, tensors: list[Tensor]) -> Tensor:
        return super().group([tensors[0].mT.contiguous() if tensors[0].ndim == 2 else tensors[0]])


@dataclass(frozen=True)
class Halving(PerParameter):
    """Groups half of the entries, and returns the right shape."""

    def group(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].flatten()[: tensors[0].numel() // 2]

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        twice = torch.cat([grouped_tensor, grouped_tensor, grouped_tensor])
        return [twice[: tensor_shapes[0].numel()].view(tensor_shapes[0])]


@dataclass(frozen=True)
class Twice(FlattenAndConcatenate):
    """Names one parameter twice."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        first = next(model.parameters())
        return [[first, first]]


@dataclass(frozen=True)
class NoAxes(PerParameter):
    """Groups a stack of numbers."""

    stacked = True

    def group(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].flatten()


def _mixed() -> nn.Module:
    model = net()
    model[0].bias = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    return model


def _with_parameter(dtype: torch.dtype) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = nn.Module()
        model.odd = nn.Parameter(torch.ones(3).to(dtype), requires_grad=dtype.is_complex)
        return model

    return make


def _groups(**changes: Any) -> Callable[[nn.Module], Any]:
    return lambda model: [{"params": list(model.parameters()), **changes}]


Case = tuple[dict[str, Any], type[StructPrecondError], str]
CONSTRUCTORS: dict[str, Case] = {
    "unknown structure": ({"structures": "dence"}, StructureError, "'dence'.*triltoeplitz"),
    "structure without its size": (
        {"structures": "block<k>diagonal"},
        StructureError,
        "block<k>diagonal",
    ),
    "block of size zero": ({"structures": "block0diagonal"}, StructureError, "block0diagonal"),
    "structure that is no structure": ({"structures": 3}, StructureError, "got 3"),
    "unknown structure in a tuple": (
        {"structures": {1: "dense", 2: ("dense", "tril"), 3: "dense"}},
        StructureError,
        "'tril'",
    ),
    "tuple of another length": (
        {"structures": {1: "dense", 2: ("dense",) * 3, 3: "dense"}},
        StructureError,
        r"3 values.*2 axes.*0\.weight",
    ),
    "missing order": (
        {"structures": {1: "dense", 2: "dense"}},
        StructureError,
        r"3 axes.*1\.weight.*\(2, 4, 3\).*Add 3",
    ),
    "order of the parameter instead of the grouped tensor": (
        {"structures": {2: "dense", 3: "dense"}},
        StructureError,
        r"1 axes.*0\.bias",
    ),
    "dtype that is none": ({"preconditioner_dtypes": "float32"}, StructPrecondError, "'float32'"),
    "integer dtype": ({"preconditioner_dtypes": torch.int32}, StructPrecondError, r"torch\.int32"),
    "float16 factors": (
        {"preconditioner_dtypes": torch.float16},
        StructPrecondError,
        r"torch\.float16 for 0\.weight.*Use torch\.bfloat16",
    ),
    "float16 factor of one axis": (
        {"preconditioner_dtypes": {1: None, 2: (torch.bfloat16, torch.float16), 3: None}},
        StructPrecondError,
        r"torch\.float16 for 0\.weight",
    ),
    "float8 factors": (
        {"preconditioner_dtypes": torch.float8_e5m2},
        StructPrecondError,
        r"torch\.float8_e5m2 for",
    ),
    "dtypes without an order": (
        {"preconditioner_dtypes": {1: torch.float32}},
        StructPrecondError,
        r"preconditioner_dtypes.*0\.weight",
    ),
    "negative lr": ({"lr": -0.1}, HyperparameterError, r"lr must be.*got -0\.1"),
    "NaN lr": ({"lr": float("nan")}, HyperparameterError, "lr must be.*got nan"),
    "infinite lr": ({"lr": float("inf")}, HyperparameterError, "lr must be.*got inf"),
    "text lr": ({"lr": "0.1"}, HyperparameterError, r"lr must be.*got '0\.1'"),
    "two lrs": ({"lr": torch.ones(2)}, HyperparameterError, "lr must be"),
    "negative beta2": ({"beta2": -0.1}, HyperparameterError, "beta2 must be"),
    "negative damping": ({"lam": -1e-3}, HyperparameterError, r"lam must be.*got -0\.001"),
    "negative decay": ({"kappa": -1.0}, HyperparameterError, "kappa must be"),
    "alpha1 of one": ({"alpha1": 1.0}, HyperparameterError, "alpha1 must be.*got 1.0"),
    "alpha2 of one": ({"alpha2": 1}, HyperparameterError, "alpha2 must be.*got 1"),
    "negative alpha1": ({"alpha1": -0.5}, HyperparameterError, "alpha1 must be"),
    "NaN alpha2": ({"alpha2": float("nan")}, HyperparameterError, "alpha2 must be"),
    "T of zero": ({"T": 0}, HyperparameterError, "T must be.*got 0"),
    "T that is True": ({"T": True}, HyperparameterError, "T must be.*got True"),
    "fractional T": ({"T": 1.5}, HyperparameterError, r"T must be.*got 1\.5"),
    "batch size of zero": ({"batch_size": 0}, HyperparameterError, "batch_size must be.*got 0"),
    "fractional batch size": ({"batch_size": 2.5}, HyperparameterError, "batch_size must be"),
    "wrong nonfinite": ({"nonfinite": "drop"}, StructPrecondError, "'skip'.*'drop'"),
    "bad value in a group": ({"params": _groups(lam=-1.0)}, HyperparameterError, "lam must be"),
    "foreign parameter in a group": (
        {"params": lambda model: [{"params": [FOREIGN]}]},
        GroupError,
        r"\(5, 7\).*model",
    ),
    "foreign parameter": ({"params": lambda model: [FOREIGN]}, GroupError, r"\(5, 7\).*model"),
    "rule that claims a foreign parameter": (
        {"combine_params": (Foreign(), PerParameter())},
        GroupError,
        r"Foreign\(\).*\(5, 7\)",
    ),
    "class instead of an instance": (
        {"combine_params": (LinearWeightBias, PerParameter())},
        GroupError,
        "LinearWeightBias.*class instead of an instance",
    ),
    "rule that is not in a tuple": (
        {"combine_params": PerParameter()},
        GroupError,
        "combine_params",
    ),
    "no rule claims": (
        {"combine_params": (OneWeightOnly(),)},
        GroupError,
        r"0\.bias, 1\.weight, 1\.bias, 2\.weight, 2\.bias",
    ),
    "no rules": ({"combine_params": ()}, GroupError, r"0\.weight, 0\.bias"),
    "mixed dtypes in one unit": (
        {"model": _mixed, "combine_params": (LinearWeightBias(), PerParameter())},
        GroupError,
        r"0\.weight: torch\.float32.*0\.bias: torch\.bfloat16",
    ),
    "inverse with fewer tensors": ({"combine_params": (OneShort(),)}, GroupError, "does not inv"),
    "inverse of another shape": (
        {"combine_params": (Flat(),)},
        GroupError,
        r"does not invert.*0\.weight.*\(12,\)",
    ),
    # only the shapes are right
    "inverse with other entries": (
        {"combine_params": (Transposing(),)},
        GroupError,
        r"does not invert.*0\.weight",
    ),
    "inverse of a part": (
        {"combine_params": (Halving(),)},
        GroupError,
        r"does not invert.*0\.weight",
    ),
    "group without an axis": ({"combine_params": (NoAxes(),)}, GroupError, r"NoAxes.*0\.weight"),
    "pattern that fits nothing": (
        {"combine_params": (SplitHeads("qkv", 2), PerParameter())},
        GroupError,
        r"'qkv'.*0\.weight",
    ),
    "heads that do not divide": (
        {"combine_params": (SplitHeads("0.weight", 3), PerParameter())},
        GroupError,
        r"0\.weight \(4, 3\).*3 equal",
    ),
    "integer parameter": (
        {"model": _with_parameter(torch.int64)},
        GroupError,
        r"odd.*torch\.int64",
    ),
    "complex parameter": (
        {"model": _with_parameter(torch.complex64)},
        GroupError,
        r"odd.*torch\.complex64",
    ),
    "bool parameter": ({"model": _with_parameter(torch.bool)}, GroupError, r"odd.*torch\.bool"),
    "no structure at all": ({"structures": None}, StructureError, "names and subclasses.*got None"),
    "list of structures": (
        {"structures": ["dense", "dense"]},
        StructureError,
        r"got \['dense', 'dense'\]",
    ),
    "order in quotes": (
        {"structures": {"1": "dense"}},
        StructureError,
        r"has the keys \['1'\]; keys must be numbers of axes",
    ),
    "instance of a structure": (
        {"structures": DiagonalMatrix(torch.ones(1, 3))},
        StructureError,
        "subclasses of StructuredMatrix, got DiagonalMatrix",
    ),
    "class that is no structure": ({"structures": nn.Linear}, StructureError, "got <class"),
    "unknown structure in a group": (
        {"params": _groups(structures="dence")},
        StructureError,
        "'dence'",
    ),
    "wrong dtype in a group": (
        {"params": _groups(preconditioner_dtypes="bf16")},
        StructPrecondError,
        "floating-point dtypes and None, got 'bf16'",
    ),
    "wrong refresh": ({"refresh": "stagered"}, StructPrecondError, "'staggered', got 'stagered'"),
    "list for refresh": ({"refresh": []}, StructPrecondError, r"'staggered', got \[\]"),
    "list for nonfinite": ({"nonfinite": []}, StructPrecondError, r"'ignore', got \[\]"),
    "wrong rounding": ({"rounding": "up"}, StructPrecondError, "'kahan', got 'up'"),
    "text for a rule": (
        {"combine_params": ("PerParameter",)},
        GroupError,
        "instances of PreconditionerGroup, got 'PerParameter'",
    ),
    "rule that names a parameter twice": (
        {"combine_params": (Twice(), PerParameter())},
        GroupError,
        r"names a parameter twice.*0\.weight \+ 0\.weight",
    ),
    "strategy of a group that is a class": (
        {"params": _groups(strategy=MuonStrategy)},
        StructPrecondError,
        "class instead of an instance",
    ),
    "hyperparameter of another strategy in a group": (
        {"params": _groups(momentum=0.9)},
        HyperparameterError,
        r"\['momentum'\].*Its hyperparameters are T, alpha1",
    ),
}


@pytest.mark.parametrize(("what", "error", "message"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_constructor_refuses_and_leaves_the_model_alone(
    what: dict[str, Any], error: type[StructPrecondError], message: str
) -> None:
    kwargs = dict(what)
    model: nn.Module = kwargs.pop("model", net)()
    params = kwargs.pop("params", lambda model: None)(model)
    before = values(model)
    with pytest.raises(error, match=f"(?s){message}") as caught:
        SIRFShampoo(model, params, **kwargs)
    assert isinstance(caught.value, StructPrecondError)
    assert isinstance(caught.value, ValueError)
    assert same_bits(values(model), before)
    assert not model._forward_hooks


def test_unit_on_several_devices_is_refused() -> None:
    model = net()
    model[0].bias = nn.Parameter(torch.zeros(4, device="meta"))
    with pytest.raises(GroupError, match=r"0\.weight: torch.float32 on cpu, 0\.bias: .* on meta"):
        SIRFShampoo(model, combine_params=(LinearWeightBias(), PerParameter()))
    assert not model._forward_hooks
