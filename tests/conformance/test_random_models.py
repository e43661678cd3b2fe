"""Random models, groupings, structures, strategies and gradients: saved, loaded, unstacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from structprecond import (
    AdamWStrategy,
    FlattenEmbedding,
    KLShampooStrategy,
    KLSOAPStrategy,
    LARSStrategy,
    LinearWeightBias,
    Matricize,
    MergeDims,
    MuonStrategy,
    NorMuonStrategy,
    PerParameter,
    PreconditionerGroup,
    ScionStrategy,
    ShampooStrategy,
    SIRFShampooStrategy,
    SOAPStrategy,
    Strategy,
    StructuredOptimizer,
)
from structprecond.testing.cells import STRUCTURES
from structprecond.testing.comparing import first_difference
from structprecond.testing.models import noise
from tests.helpers import through_a_file

# the default profile suits slower tests
EXAMPLES = max(50, settings().max_examples)
SAVED_AT, STEPS = 4, 7
LR = 0.01

# the factor of each kind of gradient; None is no gradient
SIZES: dict[str, float | None] = {
    "normal": 1.0, "zero": 0.0, "tiny": 1e-30, "large": 1e15, "constant": 1.0,
    "missing": None,
}  # fmt: skip
WITH_ROOTS = ("dense", "diagonal", "block2diagonal", "block7diagonal", "none")
ANY = (*STRUCTURES, "block7diagonal", "hierarchical3_2")


@dataclass(frozen=True)
class Candidate:
    """A strategy, the structures that it can use, and its refresh interval's name.

    Args:
        strategy: The strategy.
        structures: Empty if it has no factors.
        interval: None if it refreshes nothing.
        continuous: Whether rounding errors in gradients stay as small in the directions. They do
            not where gradients leave eigenbases undetermined.
        settings: Hyperparameters.
        gradients: The kinds of gradients that it can take.
    """

    strategy: Strategy[Any]
    structures: tuple[str, ...] = ()
    interval: str | None = None
    continuous: bool = True
    settings: tuple[tuple[str, Any], ...] = ()
    gradients: tuple[str, ...] = tuple(SIZES)


def _but(kind: str) -> tuple[str, ...]:
    return tuple(other for other in SIZES if other != kind)


def _factored(strategy: Strategy[Any]) -> Candidate:
    return Candidate(strategy, WITH_ROOTS, "precondition_frequency", continuous=False)


def _iterative(strategy: Strategy[Any]) -> Candidate:
    # iterations for roots give up on condition numbers that eigendecompositions can deal with
    return replace(_factored(strategy), settings=(("eps", 0.1),), gradients=_but("large"))


CANDIDATES = (
    Candidate(SIRFShampooStrategy(), ANY, "T"),
    _factored(SOAPStrategy()),
    _factored(SOAPStrategy(precondition_1d=True, skip_first=False, transport=True, clip_rms=2.0)),
    _factored(KLShampooStrategy()),
    _factored(KLShampooStrategy(precondition_1d=True, clamping=False)),
    _factored(KLSOAPStrategy(max_precond_dim=20)),
    _factored(ShampooStrategy()),
    _iterative(ShampooStrategy(grafting=None, exponent=0.5, root="coupled_newton")),
    _iterative(ShampooStrategy(grafting="sgd", exponent=0.5, root="newton_db")),
    Candidate(MuonStrategy()),
    Candidate(NorMuonStrategy()),
    Candidate(ScionStrategy(norm="spectral", radius=1.0)),
    Candidate(ScionStrategy(norm="row", radius=1.0)),
    Candidate(LARSStrategy(always_scale=True)),
    Candidate(AdamWStrategy()),
)

widths = st.integers(1, 40)
layers = st.one_of(
    st.tuples(st.just(nn.Linear), widths, widths, st.booleans()),
    st.tuples(st.just(nn.Conv2d), widths, widths, st.integers(1, 3)),
    st.tuples(st.just(nn.Embedding), widths, widths),
    st.tuples(st.just(nn.LayerNorm), widths),
)
rules = st.sampled_from(
    [
        (PerParameter(),),
        (LinearWeightBias(), PerParameter()),
        (FlattenEmbedding(), PerParameter()),
        (FlattenEmbedding(), LinearWeightBias(), MergeDims(50)),
        (MergeDims(100),),
        (Matricize(),),
    ]
)


@dataclass(frozen=True)
class Plan:
    """The random choices for one example."""

    layers: list[tuple[Any, ...]]
    rules: tuple[PreconditionerGroup, ...]
    candidate: Candidate
    structures: Any
    dtype: torch.dtype
    interval: int
    refresh: Any
    gradients: list[dict[str, str]]

    def model(self) -> nn.ModuleList:
        return nn.ModuleList([layer(*sizes) for layer, *sizes in self.layers]).to(self.dtype)

    def optimizer(self, params: Any) -> StructuredOptimizer:
        interval = self.candidate.interval
        hyperparameters = {"lr": LR, **dict(self.candidate.settings)}
        hyperparameters |= {} if interval is None else {interval: self.interval}
        given = {"structures": self.structures} if self.candidate.structures else {}
        return StructuredOptimizer(
            params,
            strategy=self.candidate.strategy,
            hyperparameters=hyperparameters,
            combine_params=self.rules,
            batch_size=4,
            refresh=self.refresh,
            **given,
        )

    def set_gradients(self, params: Mapping[str, Tensor], step: int) -> None:
        for i, (name, p) in enumerate(params.items()):
            kind = self.gradients[step][name]
            size = SIZES[kind]
            grad = noise(p.shape, step, i)
            if kind == "constant":
                grad = grad.flatten()[:1].expand(p.shape)  # of rank one
            p.grad = None if size is None else (grad * size).to(p.dtype)


@st.composite
def plans(draw: Any, candidates: Sequence[Candidate] = CANDIDATES) -> Plan:
    drawn = draw(st.lists(layers, min_size=1, max_size=3))
    candidate = draw(st.sampled_from(candidates))
    structures: Any = None
    if candidate.structures:
        one = st.sampled_from(candidate.structures)
        structures = {n: draw(st.tuples(*[one] * n)) for n in range(1, 5)}
    model = nn.ModuleList([layer(*sizes) for layer, *sizes in drawn])
    kind = st.sampled_from(candidate.gradients)
    return Plan(
        drawn,
        draw(rules),
        candidate,
        structures,
        draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from(["synchronous", "staggered"])),
        [{name: draw(kind) for name, _ in model.named_parameters()} for _ in range(STEPS)],
    )


def _step(plan: Plan, model: nn.Module, optimizer: StructuredOptimizer, steps: range) -> None:
    for step in steps:
        plan.set_gradients(dict(model.named_parameters()), step)
        optimizer.step()


def _assert_finite(model: nn.Module, optimizer: StructuredOptimizer) -> None:
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
    for bucket in optimizer.buckets:
        for name, tensor in bucket.named_tensors().items():
            assert tensor.isfinite().all(), name


@settings(max_examples=EXAMPLES)
@given(plan=plans())
def test_what_is_saved_and_loaded_goes_on_to_the_bit(plan: Plan) -> None:
    event(type(plan.candidate.strategy).__name__)
    torch.manual_seed(0)
    model, resumed = plan.model(), plan.model()
    optimizer = plan.optimizer(model)
    _step(plan, model, optimizer, range(SAVED_AT))
    weights, state = through_a_file([model.state_dict(), optimizer.state_dict()])
    again = plan.optimizer(resumed)
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    _step(plan, resumed, again, range(SAVED_AT, STEPS))
    _step(plan, model, optimizer, range(SAVED_AT, STEPS))
    assert not first_difference(model.state_dict(), resumed.state_dict())
    assert not first_difference(optimizer.state_dict(), again.state_dict())
    _assert_finite(model, optimizer)


@settings(max_examples=EXAMPLES)
@given(plan=plans([candidate for candidate in CANDIDATES if candidate.continuous]))
def test_stacks_train_as_an_optimizer_per_parameter(plan: Plan) -> None:
    # groupings that need modules make units of several parameters, or find one by its module
    alone = tuple(rule for rule in plan.rules if not rule.requires_modules)
    plan = Plan(**{**vars(plan), "rules": alone, "dtype": torch.float64, "refresh": "synchronous"})
    torch.manual_seed(0)
    model = plan.model()
    params = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    _step(plan, model, plan.optimizer(model), range(STEPS))
    optimizers = [plan.optimizer([p]) for p in params.values()]
    for step in range(STEPS):
        plan.set_gradients(params, step)
        for optimizer in optimizers:
            optimizer.step()
    for name, p in model.named_parameters():
        assert (p - params[name]).norm() <= 1e-10 * max(1.0, p.norm().item()), name
