"""Bad input raises an error that says what was given and what to do, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Size, Tensor, nn

from structprecond import (
    FlattenAndConcatenate,
    FlattenEmbedding,
    GradientError,
    GroupError,
    HyperparameterError,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
    SIRFShampoo,
    SIRFShampooStrategy,
    SplitHeads,
    StructPrecondError,
    StructuredOptimizer,
    StructureError,
)
from tests.helpers import mlp, same_bits, set_grads, snapshot, values


def _net() -> nn.Sequential:
    """Return a model with parameters of one, two and three axes."""
    return nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 2, 3), nn.LayerNorm(2))


FOREIGN = nn.Parameter(torch.ones(5, 7))


@dataclass(frozen=True)
class Foreign(FlattenAndConcatenate):
    """Claims a parameter that is not the model's."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [[*model.parameters(), FOREIGN]]


@dataclass(frozen=True)
class OneWeightOnly(PerParameter):
    """Leaves everything but one weight to the next rule."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [[p] for name, p in model.named_parameters() if name == "0.weight"]


@dataclass(frozen=True)
class OneShort(FlattenAndConcatenate):
    """Gives back fewer tensors than it was given."""

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [list(model.parameters())]

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        return super().ungroup(grouped_tensor[: -tensor_shapes[-1].numel()], tensor_shapes[:-1])


@dataclass(frozen=True)
class Flat(PerParameter):
    """Gives back vectors."""

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        return [grouped_tensor.flatten()]


@dataclass(frozen=True)
class Transposing(PerParameter):
    """Groups the transpose, and gives back the right shape with the wrong entries."""

    def group(self, tensors: list[Tensor]) -> Tensor:
        return super().group([tensors[0].mT.contiguous() if tensors[0].ndim == 2 else tensors[0]])


@dataclass(frozen=True)
class Halving(PerParameter):
    """Groups half of the entries, and gives back the right shape."""

    def group(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].flatten()[: tensors[0].numel() // 2]

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[Size]) -> list[Tensor]:
        twice = torch.cat([grouped_tensor, grouped_tensor, grouped_tensor])
        return [twice[: tensor_shapes[0].numel()].view(tensor_shapes[0])]


@dataclass(frozen=True)
class NoAxes(PerParameter):
    """Groups a stack of numbers."""

    stacked = True

    def group(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].flatten()


def _mixed() -> nn.Module:
    model = _net()
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
    "misspelt key in a group": (
        {"params": _groups(alpha=0.9)},
        HyperparameterError,
        r"\['alpha'\].*alpha1, alpha2",
    ),
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
    # the shapes alone are right
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
}


@pytest.mark.parametrize(("what", "error", "message"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_constructor_refuses_and_leaves_the_model_alone(
    what: dict[str, Any], error: type[StructPrecondError], message: str
) -> None:
    kwargs = dict(what)
    model: nn.Module = kwargs.pop("model", _net)()
    params = kwargs.pop("params", lambda model: None)(model)
    before = values(model)
    with pytest.raises(error, match=f"(?s){message}") as caught:
        SIRFShampoo(model, params, **kwargs)
    assert isinstance(caught.value, StructPrecondError)
    assert isinstance(caught.value, ValueError)
    assert same_bits(values(model), before)
    assert not model._forward_hooks


def test_misspelt_keyword_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="beta_2"):
        SIRFShampoo(_net(), beta_2=0.1)  # type: ignore[call-arg]
    with pytest.raises(HyperparameterError, match="beta_2"):
        StructuredOptimizer(
            _net(), strategy=SIRFShampooStrategy(), hyperparameters={"beta_2": 0.1}, batch_size=1
        )


def test_hyperparameters_of_torch_optimizers_are_refused_not_ignored() -> None:
    for key in ("weight_decay", "momentum", "betas", "eps", "foreach", "fused"):
        with pytest.raises(HyperparameterError, match=key):
            SIRFShampoo(_net(), [{"params": list(_net().parameters())[:0], key: 0.5}])


# --- parameters without a model ------------------------------------------------------------------


@pytest.mark.parametrize("rule", [LinearWeightBias(), FlattenEmbedding(), SplitHeads("*", 1)])
def test_rule_that_needs_modules_refuses_plain_parameters(rule: PreconditionerGroup) -> None:
    with pytest.raises(GroupError, match=rf"(?s){type(rule).__name__}.*modules.*first argument"):
        SIRFShampoo(_net().parameters(), combine_params=(rule, PerParameter()), batch_size=1)


def test_counting_needs_the_model() -> None:
    with pytest.raises(StructPrecondError, match=r"first argument.*batch_size="):
        SIRFShampoo(_net().parameters())


def test_params_need_the_model_first() -> None:
    model = _net()
    with pytest.raises(StructPrecondError, match="Pass the model first"):
        SIRFShampoo(model.parameters(), list(model.parameters()))


def test_no_parameters_at_all_is_an_error_as_in_torch() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        SIRFShampoo([], batch_size=1)
    with pytest.raises(ValueError, match="empty parameter list"):
        SIRFShampoo(nn.Tanh(), batch_size=1)


def test_parameter_in_two_groups_is_an_error_as_in_torch() -> None:
    model = _net()
    groups = [{"params": model[0].parameters()}, {"params": model.parameters()}]
    with pytest.raises(ValueError, match="more than one parameter group"):
        SIRFShampoo(model, groups)


# --- at the step ---------------------------------------------------------------------------------


def test_unknown_batch_size_raises_at_the_step_and_changes_nothing() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    set_grads(list(model.parameters()), 0)  # no forward pass
    before = snapshot(model, optimizer)
    with pytest.raises(StructPrecondError, match=r"SIRFShampooStrategy needs the batch size.*="):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)
    optimizer.batch_size = 6
    optimizer.step()
    assert optimizer.global_step == 1


def test_unknown_batch_size_does_not_count_the_step_as_skipped() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    set_grads(list(model.parameters()), 0)
    model[0].bias.grad[0] = torch.nan
    with pytest.raises(StructPrecondError, match="needs the batch size"):
        optimizer.step()
    assert optimizer.skipped == 0


def test_sparse_gradient_raises_names_the_parameter_and_changes_nothing() -> None:
    model = nn.ModuleDict(
        {"words": nn.Embedding(5, 3, sparse=True), "head": nn.Linear(3, 2)}
    ).double()
    optimizer = SIRFShampoo(model, batch_size=4)
    model["head"](model["words"](torch.tensor([0, 2, 2, 4]))).sum().backward()
    before = snapshot(model, optimizer)
    with pytest.raises(GradientError, match=r"words\.weight.*sparse"):
        optimizer.step()
    assert same_bits(snapshot(model, optimizer), before)


@pytest.mark.parametrize("value", [0, -3, True, 2.0, "8", None])
def test_assigning_a_bad_batch_size_keeps_the_old_one(value: Any) -> None:
    model = _net()
    optimizer = SIRFShampoo(model, batch_size=4)
    counting = SIRFShampoo(model)
    for o in (optimizer, counting):
        with pytest.raises(HyperparameterError, match="batch_size must be"):
            o.batch_size = value
    assert optimizer.batch_size == 4
    assert len(model._forward_hooks) == 1


def test_measure_that_fails_says_what_to_do() -> None:
    class Texts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, texts: list[str]) -> Tensor:
            return self.weight * len(texts)

    model = Texts()
    SIRFShampoo(model, batch_size=1)
    optimizer = SIRFShampoo(model)
    with pytest.raises(StructPrecondError, match="batch_size="):
        model(["a", "b"])
    optimizer.batch_size = lambda inputs: len(inputs[0])
    model(["a", "b"]).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 2
