"""Bad input raises an error that says what was given and what to do, and changes nothing."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Size, Tensor, nn

from structprecond import (
    KLSOAP,
    LARS,
    SAM,
    SOAP,
    AdamW,
    AdamWStrategy,
    DiagonalMatrix,
    FlattenAndConcatenate,
    FlattenEmbedding,
    GradientError,
    GroupError,
    HyperparameterError,
    KLShampoo,
    KLShampooStrategy,
    KLSOAPStrategy,
    LARSStrategy,
    LinearWeightBias,
    Muon,
    MuonStrategy,
    NorMuon,
    NorMuonStrategy,
    PerParameter,
    PreconditionerGroup,
    Scion,
    ScionStrategy,
    Shampoo,
    ShampooStrategy,
    SIRFShampoo,
    SIRFShampooStrategy,
    SOAPStrategy,
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
        r"has the keys \['1'\]; keys are numbers of axes",
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
    model: nn.Module = kwargs.pop("model", _net)()
    params = kwargs.pop("params", lambda model: None)(model)
    before = values(model)
    with pytest.raises(error, match=f"(?s){message}") as caught:
        SIRFShampoo(model, params, **kwargs)
    assert isinstance(caught.value, StructPrecondError)
    assert isinstance(caught.value, ValueError)
    assert same_bits(values(model), before)
    assert not model._forward_hooks


def test_unit_on_several_devices_is_refused() -> None:
    model = _net()
    model[0].bias = nn.Parameter(torch.zeros(4, device="meta"))
    with pytest.raises(GroupError, match=r"0\.weight: torch.float32 on cpu, 0\.bias: .* on meta"):
        SIRFShampoo(model, combine_params=(LinearWeightBias(), PerParameter()))
    assert not model._forward_hooks


OPTIMIZERS = (KLSOAP, LARS, SOAP, AdamW, KLShampoo, Muon, NorMuon, Scion, Shampoo, SIRFShampoo)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_misspelt_keyword_is_a_type_error(cls: Any) -> None:
    model = _net()
    with pytest.raises(TypeError, match="unexpected keyword argument 'beta_2'"):
        cls(model, lr=0.1, beta_2=0.1)
    assert not model._forward_hooks


STRATEGIES = (
    KLSOAPStrategy,
    LARSStrategy,
    SOAPStrategy,
    AdamWStrategy,
    KLShampooStrategy,
    MuonStrategy,
    NorMuonStrategy,
    ScionStrategy,
    ShampooStrategy,
    SIRFShampooStrategy,
)
NO_NUMBERS: dict[str, Any] = {
    "NaN": math.nan,
    "infinity": math.inf,
    "None": None,
    "a text": "0.1",
    "two numbers": torch.ones(2),
    "three numbers": (0.1, 0.2, 0.3),
    "a complex number": 1j,
    "a list": [],
}


@pytest.mark.parametrize("value", NO_NUMBERS.values(), ids=NO_NUMBERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_hyperparameter_of_any_strategy_takes_what_is_no_number(
    strategy: Any, value: Any
) -> None:
    model = _net()
    before = values(model)
    lr = {"lr": 0.1}  # one strategy has no default
    last = model[2].parameters()
    optimizer = StructuredOptimizer(model, last, strategy=strategy(), hyperparameters=lr)
    groups = copy.copy(optimizer.param_groups)
    for name in strategy.hyperparameters:
        if name == "grafting_beta2" and value is None:
            continue  # its default
        message = rf"^{name} must be .*, got {re.escape(repr(value))}\.$"
        given = {**lr, name: value}
        with pytest.raises(HyperparameterError, match=message):
            StructuredOptimizer(model, strategy=strategy(), hyperparameters=given)
        with pytest.raises(HyperparameterError, match=message):
            optimizer.add_param_group({"params": list(model[0].parameters()), name: value})
    assert optimizer.param_groups == groups
    assert len(optimizer.state) == 2
    assert same_bits(values(model), before)
    assert not model._forward_hooks


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unknown_hyperparameters_are_listed_with_those_that_exist(strategy: Any) -> None:
    for given in ({"beta_2": 0.1}, [("beta_2", 0.1)]):
        with pytest.raises(HyperparameterError, match=r"beta_2.*Known are .*lr.*"):
            StructuredOptimizer(_net(), strategy=strategy(), hyperparameters=given)  # type: ignore[arg-type]


ARGUMENTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "grafting": (lambda m: Shampoo(m, grafting="adamw"), "grafting.*'adamw'"),  # type: ignore[arg-type]
    "root": (lambda m: Shampoo(m, root="svd"), "root.*'svd'"),  # type: ignore[arg-type]
    "exponent": (
        lambda m: Shampoo(m, exponent=-0.5),
        r"exponent must be a finite number above 0.*-0\.5",
    ),
    "start step": (lambda m: Shampoo(m, start_preconditioning_step=0), "at least 1.*0"),
    "clip_rms": (lambda m: SOAP(m, clip_rms=0.0), r"clip_rms must be a finite.*got 0\.0"),
    "two ways of merging": (
        lambda m: SOAP(m, merge_dims=True, combine_params=(PerParameter(),)),
        "merge_dims=True is short for.*Put MergeDims into combine_params",
    ),
    "data format": (
        lambda m: SOAP(m, merge_dims=True, data_format="foo"),  # type: ignore[arg-type]
        "data_format must be one of 'channels_first', 'channels_last', got 'foo'",
    ),
    "size of merged axes": (
        lambda m: SOAP(m, merge_dims=True, max_precond_dim=0),
        "max_dim must be at least 1",
    ),
    "structure without eigenbasis": (
        lambda m: SOAP(m, structures="triltoeplitz"),
        r"SOAPStrategy cannot use the structure 'triltoeplitz', given for 0\.weight.*It can use",
    ),
    "hierarchy in KL-Shampoo": (
        lambda m: KLShampoo(m, structures="hierarchical2_2"),
        "KLShampooStrategy cannot use.*'hierarchical2_2'",
    ),
    "structures without factors": (
        lambda m: StructuredOptimizer(m, strategy=AdamWStrategy(), structures="diagonal"),
        "AdamWStrategy has no Kronecker factors. Leave it out",
    ),
    "init_factor": (lambda m: KLShampoo(m, init_factor=0.0), r"init_factor must be a finite"),
    "coefficients": (lambda m: Muon(m, coefficient_type="quartic"), "'quartic'"),  # type: ignore[arg-type]
    "no iterations": (lambda m: Muon(m, num_ns_steps=0), "at least 1.*0"),
    "scale": (lambda m: Muon(m, scale_mode="none"), "scale_mode.*'none'"),  # type: ignore[arg-type]
    "precision": (lambda m: Muon(m, fp32_matmul_prec="low"), "fp32_matmul_prec.*'low'"),  # type: ignore[arg-type]
    "kind of decay": (
        lambda m: Muon(m, weight_decay_method="l1"),  # type: ignore[arg-type]
        "weight_decay_method.*'l1'",
    ),
    "two scales": (
        lambda m: Muon(m, match_rms="adamw", scale_mode="unit_rms_norm"),
        "match_rms='adamw' and scale_mode='unit_rms_norm'",
    ),
    "factor to no lr": (
        lambda m: Muon(m, lr=0.0, adamw_lr=0.1),
        r"adamw_lr=0\.1 is kept as a factor to lr.*Start with an lr above 0",
    ),
    "longest axis": (lambda m: SOAP(m, max_precond_dim=-5), "max_precond_dim must be.*-5"),
    "no longest axis": (
        lambda m: KLShampoo(m, max_precond_dim=None),  # type: ignore[arg-type]
        "max_precond_dim must be.*None",
    ),
    "text for yes or no": (
        lambda m: SOAP(m, skip_first="no"),  # type: ignore[arg-type]
        "skip_first must be True or False, got 'no'",
    ),
    "text for maximize": (
        lambda m: AdamW(m, maximize="no"),  # type: ignore[arg-type]
        "maximize must be True or False, got 'no'",
    ),
    "text for nesterov": (
        lambda m: Muon(m, nesterov="no"),  # type: ignore[arg-type]
        "nesterov must be True or False, got 'no'",
    ),
    "number for clamping": (
        lambda m: KLShampoo(m, clamping=0.5),  # type: ignore[arg-type]
        r"clamping must be True or False, got 0\.5",
    ),
    "number for always_scale": (
        lambda m: LARS(m, lr=0.1, always_scale=2),  # type: ignore[arg-type]
        "always_scale must be True or False, got 2",
    ),
    "scale factor": (
        lambda m: Muon(m, extra_scale_factor=math.nan),
        "extra_scale_factor must be.*got nan",
    ),
    "radius": (lambda m: Scion(m, radius=-1.0), r"radius must be.*got -1\.0"),
    "radius of the head": (lambda m: Scion(m, head_radius=math.inf), "radius must be.*got inf"),
    "number for a hook": (
        lambda m: Muon(m, before_weight_update=3),  # type: ignore[arg-type]
        "before_weight_update takes a function or None, got 3",
    ),
    "list of routes": (
        lambda m: Muon(m, routes=["0.weight"]),  # type: ignore[arg-type]
        r"routes is a dict.*got \['0\.weight'\]",
    ),
    "text for a second lr": (
        lambda m: Muon(m, adamw_lr="x"),  # type: ignore[arg-type]
        "adamw_lr must be.*got 'x'",
    ),
    "unknown norm": (lambda m: ScionStrategy(norm="l7"), "norm.*'l7'"),  # type: ignore[arg-type]
    "route to an unknown name": (
        lambda m: Muon(m, routes={"0.weight": "sgd"}),
        r"routes sends '0\.weight' to 'sgd'.*'muon', 'adamw'",
    ),
    "route to a class": (
        lambda m: Muon(m, routes={"0.weight": SOAPStrategy}),  # type: ignore[dict-item]
        "class instead of an instance",
    ),
    "route of nothing": (
        lambda m: Muon(m, routes={"2.wieght": "adamw"}),
        r"'2\.wieght' apply to no parameter.*infer_roles\(model\)",
    ),
    "misspelt role": (
        lambda m: StructuredOptimizer(
            m, strategy={"default": AdamWStrategy(), "matrices": MuonStrategy()}
        ),
        "'matrices' apply to no parameter. A rule is a role.*matrix",
    ),
    "two patterns for one": (
        lambda m: StructuredOptimizer(
            m, strategy={"default": AdamWStrategy(), "0.*": SOAPStrategy(), "*ht": SOAPStrategy()}
        ),
        r"Several rules apply to 0\.weight: '0\.\*', '\*ht'",
    ),
    "pattern for a part of a unit": (
        lambda m: StructuredOptimizer(
            m,
            strategy={"default": AdamWStrategy(), "0.bias": SOAPStrategy()},
            combine_params=(LinearWeightBias(), PerParameter()),
        ),
        r"'0\.bias' applies to a parameter of 0\.weight \+ 0\.bias",
    ),
    "no default": (
        lambda m: StructuredOptimizer(m, strategy={"matrix": MuonStrategy()}),
        "'default' to strategies, got",
    ),
    "rule that is a number": (
        lambda m: StructuredOptimizer(
            m,
            strategy={"default": AdamWStrategy(), 3: MuonStrategy()},  # type: ignore[dict-item]
        ),
        "name patterns and 'default'",
    ),
    "class for a strategy": (
        lambda m: StructuredOptimizer(m, strategy=AdamWStrategy),  # type: ignore[arg-type]
        "class instead of an instance",
    ),
    "text for a strategy": (
        lambda m: StructuredOptimizer(m, strategy="adamw"),  # type: ignore[arg-type]
        "instance of Strategy.*got 'adamw'",
    ),
    "no strategy": (
        lambda m: StructuredOptimizer(m, strategy=None),  # type: ignore[arg-type]
        "instance of Strategy.*got None",
    ),
    "learning rate on no device": (
        lambda m: AdamW(m, lr=torch.tensor(0.1, device="meta")),
        "lr must be",
    ),
    "number of samples in a text": (
        lambda m: StructuredOptimizer(m, strategy=AdamWStrategy(), batch_size="8"),  # type: ignore[arg-type]
        "batch_size must be.*'8'",
    ),
    "heads": (lambda m: SplitHeads("0.weight", 0), "heads must be at least 1"),
    "axis of heads": (lambda m: SplitHeads("0.weight", 2, axis=5), "axis 0 or 1"),
}


@pytest.mark.parametrize(("make", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_argument_is_refused_and_the_model_left_alone(
    make: Callable[[nn.Module], Any], message: str
) -> None:
    model = _net()
    before = values(model)
    with pytest.raises(StructPrecondError, match=f"(?s){message}"):
        make(model)
    assert same_bits(values(model), before)
    assert not model._forward_hooks
    assert all(p.requires_grad for p in model.parameters())


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


def _used_up(model: nn.Module) -> Any:
    params = model.parameters()
    list(params)
    return params


def _two_groups(model: nn.Module) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}, {"params": next(model.parameters())}]


PARAMS: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "nothing": (lambda m: [], ValueError, "empty parameter list"),
    "no parameters of a model": (lambda m: nn.Tanh().parameters(), ValueError, "empty param"),
    "a generator that is used up": (_used_up, ValueError, "empty parameter list"),
    "a parameter in two groups": (_two_groups, ValueError, "more than one parameter group"),
    "a parameter twice in a group": (
        lambda m: [*m.parameters(), next(m.parameters())],
        UserWarning,
        "duplicate parameters",
    ),
    "a set in a group": (
        lambda m: [{"params": set(m.parameters())}],
        TypeError,
        "ordered collections.*use a list",
    ),
    "a parameter alone": (lambda m: next(m.parameters()), TypeError, "should be an iterable of"),
    "a number": (lambda m: 3, TypeError, "not iterable"),
    "a text": (lambda m: "abc", TypeError, "only optimize Tensors.*str"),
    "numbers": (lambda m: [1, 2], TypeError, "only optimize Tensors.*int"),
    "modules": (lambda m: [nn.Linear(2, 2)], TypeError, "only optimize Tensors.*Linear"),
    "the class of a model": (lambda m: nn.Linear, TypeError, "not iterable"),
    "a group as a dict": (
        lambda m: {"params": list(m.parameters())},
        TypeError,
        "only optimize Tensors.*str",
    ),
    "a group without params": (lambda m: [{"lr": 0.1}], KeyError, "params"),
    "names for some": (
        lambda m: [("a", next(m.parameters())), *list(m.parameters())[1:]],
        ValueError,
        "with/without names",
    ),
    "results": (lambda m: [2 * next(m.parameters())], ValueError, "non-leaf"),
}


@pytest.mark.parametrize("cls", [AdamW, SOAP, Muon])
@pytest.mark.parametrize(("params", "error", "message"), PARAMS.values(), ids=PARAMS)
def test_parameters_are_refused_as_torch_does(
    params: Callable[[nn.Module], Any], error: type[Exception], message: str, cls: Any
) -> None:
    model = _net()
    before = values(model)
    with pytest.raises(error, match=message):
        torch.optim.SGD(params(model), lr=0.1)
    with pytest.raises(error, match=message):
        cls(params(model), lr=0.1)
    assert same_bits(values(model), before)
    assert not model._forward_hooks


@pytest.mark.parametrize("cls", [AdamW, SOAP, Muon])
def test_group_that_is_refused_is_not_added(cls: Any) -> None:
    model = _net()
    optimizer = cls(model[0].parameters(), lr=0.1)
    for damage in (
        {"params": list(model[0].parameters())},
        {"params": set(model[1].parameters())},
        {"params": list(model[1].parameters()), "lr": -1.0},
        {"params": list(model[1].parameters()), "learning_rate": 0.1},
        {"params": list(model[1].parameters()), "strategy": SOAPStrategy},
        {"params": list(model[1].parameters()), "structures": "dence"},
        {"params": [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]},
    ):
        before = snapshot(model, optimizer)
        with pytest.raises((ValueError, TypeError)):
            optimizer.add_param_group(damage)
        assert same_bits(snapshot(model, optimizer), before)
        assert len(optimizer.param_groups) == 1
        assert set(optimizer.state) == set(model[0].parameters())


def test_parameter_in_two_groups_of_a_model_is_an_error_as_in_torch() -> None:
    model = _net()
    groups = [{"params": model[0].parameters()}, {"params": model.parameters()}]
    with pytest.raises(ValueError, match="more than one parameter group"):
        SIRFShampoo(model, groups)
    assert not model._forward_hooks


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


def _grad(bad: float) -> Callable[[Any, Any], None]:
    def damage(model: Any, optimizer: Any) -> None:
        model[2].weight.grad[0, 0] = bad

    return damage


def _sparse(model: Any, optimizer: Any) -> None:
    model[2].weight.grad = model[2].weight.grad.to_sparse()


def _unknown_name(model: Any, optimizer: Any) -> None:
    entry = optimizer.state[model[2].weight]
    optimizer.state[model[2].weight] = {**entry, "momentum": torch.ones(())}


def _misshapen(model: Any, optimizer: Any) -> None:
    entry = optimizer.state[model[2].weight]
    optimizer.state[model[2].weight] = {**entry, "step": torch.ones(3)}


def _failing_interval(model: Any, optimizer: Any) -> None:
    def interval(step: int) -> bool:
        raise LookupError(f"no schedule for step {step}")

    optimizer.param_groups[0]["precondition_frequency"] = interval


STEPS: dict[str, tuple[Callable[[Any, Any], None], Any, type[Exception], str]] = {
    "NaN": (_grad(math.nan), None, GradientError, r"2\.weight.*not finite.*nothing was changed"),
    "infinity": (_grad(math.inf), None, GradientError, r"2\.weight.*not finite"),
    "a sparse gradient": (_sparse, None, GradientError, r"2\.weight.*sparse_coo.*sparse=False"),
    "an unknown name in the state": (_unknown_name, None, StructPrecondError, r"2\.weight.*'mom"),
    "a misshapen entry": (_misshapen, None, StructPrecondError, r"2\.weight.*'step': \(3,\)"),
    "an interval that raises": (_failing_interval, None, LookupError, "no schedule for step 3"),
    "a number for a closure": (lambda m, o: None, 3, TypeError, "'int' object is not callable"),
    "a loss for a closure": (
        lambda m, o: None, torch.ones(()), TypeError, "'Tensor' object is not callable"
    ),
    "a closure with arguments": (
        lambda m, o: None, lambda batch: 0.0, TypeError, "missing 1 required positional argument"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "closure", "error", "message"), STEPS.values(), ids=STEPS)
def test_step_raises_and_changes_nothing(
    damage: Callable[[Any, Any], None], closure: Any, error: type[Exception], message: str
) -> None:
    model = mlp()
    optimizer = SOAP(model, precondition_frequency=1, nonfinite="raise")
    for step in range(3):
        set_grads(list(model.parameters()), step)
        optimizer.step()
    set_grads(list(model.parameters()), 3)
    before = snapshot(model, optimizer)
    frequency = optimizer.param_groups[0]["precondition_frequency"]
    damage(model, optimizer)
    with pytest.raises(error, match=f"(?s){message}"):
        optimizer.step(closure)
    optimizer.param_groups[0]["precondition_frequency"] = frequency
    now = snapshot(model, optimizer)
    for key in ("params", "stacks", "groups", "counters"):
        assert same_bits(now[key], before[key]), key


SAM_MISTAKES: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a name for the base": (lambda m: SAM(m, "soap"), "takes a class.*got 'soap'"),  # type: ignore[arg-type]
    "a strategy for the base": (lambda m: SAM(m, SOAPStrategy()), "takes a class"),  # type: ignore[arg-type]
    "no parameters": (lambda m: SAM(None, SOAP), "params is None"),
    "parameters twice": (lambda m: SAM(m, SOAP(m)), "which has its parameters, but params is"),
    "SAM around SAM": (lambda m: SAM(None, SAM(m, SOAP)), "base_optimizer is a SAM"),
    "rho": (lambda m: SAM(m, SOAP, rho=-1.0), r"rho must be.*got -1\.0"),
    "a hyperparameter of the base": (lambda m: SAM(m, SOAP, lr=-1.0), r"lr must be.*got -1\.0"),
    "a step without a closure": (lambda m: SAM(m, SOAP).step(), "no first step is pending"),
}


@pytest.mark.parametrize(("make", "message"), SAM_MISTAKES.values(), ids=SAM_MISTAKES)
def test_sam_refuses_and_leaves_the_model_alone(
    make: Callable[[nn.Module], Any], message: str
) -> None:
    """More of them are in `tests/test_sam.py`."""
    model = _net()
    before = values(model)
    with pytest.raises(StructPrecondError, match=f"(?s){message}"):
        make(model)
    assert same_bits(values(model), before)
    assert not model._forward_hooks


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
