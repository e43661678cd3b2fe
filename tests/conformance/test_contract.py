"""The contract accepts sound strategies and finds the faults of broken ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    SOAP,
    AdamW,
    Hyperparameter,
    SIRFShampoo,
    State,
    StepContext,
    Strategy,
    StructuredOptimizer,
    StructureError,
)
from structprecond.testing import StrategyContract
from structprecond.testing.cells import NO_STRUCTURE, Cell, run_cell
from structprecond.testing.conformance import Result, main, render
from structprecond.testing.runs import PRECISIONS, Make
from structprecond.testing.situations import SITUATIONS
from structprecond.testing.table import CONTRACTS, every_fourth

PRECISION = {precision.name: precision for precision in PRECISIONS}
SITUATION = {situation.name: situation for situation in SITUATIONS}


def _cell(situation: str, check: str, precision: str = "float32") -> Cell:
    return Cell(NO_STRUCTURE, PRECISION[precision], SITUATION[situation], check)


# --- strategies of one's own ---------------------------------------------------------------------


@dataclass
class SignState(State):
    momentum: Tensor


@dataclass(frozen=True)
class SignStrategy(Strategy[SignState]):
    hyperparameters: ClassVar[Mapping[str, Hyperparameter]] = {
        "lr": Hyperparameter(0.01, lambda v: v >= 0, "at least 0")
    }
    decay: ClassVar[Literal["before", "after", "inside"]] = "inside"
    structures = ()

    def init(self, like: Tensor, structures: Any, dtypes: Any) -> SignState:
        return SignState(torch.zeros_like(like))

    def update(self, state: SignState, grad: Tensor, hp: Any, ctx: StepContext) -> Tensor:
        return state.momentum.lerp_(grad, 0.1).sign()


class TestStrategyOfOnesOwn(StrategyContract):
    def make(self, model: nn.Module, **overrides: Any) -> StructuredOptimizer:
        return StructuredOptimizer(model, strategy=SignStrategy(), **overrides)


CALLS: list[int] = []


@dataclass(frozen=True)
class ForgetfulStrategy(SignStrategy):
    """Counts outside its state."""

    def update(self, state: SignState, grad: Tensor, hp: Any, ctx: StepContext) -> Tensor:
        CALLS.append(1)
        return grad / len(CALLS)


@dataclass(frozen=True)
class ExplodingStrategy(SignStrategy):
    def update(self, state: SignState, grad: Tensor, hp: Any, ctx: StepContext) -> Tensor:
        state.momentum.fill_(torch.inf)
        return grad


@dataclass(frozen=True)
class LazyStrategy(SignStrategy):
    def update(self, state: SignState, grad: Tensor, hp: Any, ctx: StepContext) -> Tensor:
        return torch.zeros_like(grad)


@dataclass(frozen=True)
class RandomStrategy(SignStrategy):
    def update(self, state: SignState, grad: Tensor, hp: Any, ctx: StepContext) -> Tensor:
        return torch.rand_like(grad)


def _making(optimizer: Any, **settings: Any) -> Make:
    def make(model: nn.Module, **overrides: Any) -> StructuredOptimizer:
        made: StructuredOptimizer = optimizer(model, **settings, **overrides)
        return made

    return make


def _own(strategy: Strategy[Any]) -> Make:
    return _making(StructuredOptimizer, strategy=strategy)


@pytest.mark.parametrize(
    ("strategy", "cell", "message"),
    [
        (ForgetfulStrategy(), _cell("plain", "deepcopy"), "the runs differ after"),
        (ForgetfulStrategy(), _cell("plain", "resume"), "the runs differ after"),
        (RandomStrategy(), _cell("plain", "pickle"), "the runs differ after"),
        (ExplodingStrategy(), _cell("plain", "resume", "float16"), "not finite"),
        (LazyStrategy(), _cell("plain", "resume"), "no step changed the model"),
    ],
)
def test_broken_strategies_fail(strategy: Strategy[Any], cell: Cell, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_cell(_own(strategy), cell)


# --- steps that break promises -------------------------------------------------------------------


class DecaysAll(AdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            torch._foreach_mul_(group["params"], 0.99)


class AveragesAll(AdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for bucket in self.buckets:
            bucket.state.named_tensors()["exp_avg"].mul_(0.99)


class ScalesGradients(AdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        torch._foreach_mul_([p.grad for p in self.param_groups[0]["params"]], 2)


class FillsGradients(AdamW):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "situation", "message"),
    [
        (DecaysAll, "late gradient", "took no part, but moved"),
        (DecaysAll, "frozen, then thawed", "took no part, but moved"),
        (AveragesAll, "missing gradients", "took no part, but .*exp_avg"),
        (ScalesGradients, "tied parameters", "was changed by step"),
        (FillsGradients, "late gradient", "came or went"),
    ],
)
def test_steps_that_break_promises_fail(optimizer: Any, situation: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_cell(_making(optimizer), _cell(situation, "resume"))


# --- checkpoints and copies that lose something --------------------------------------------------


def _lose(name: str) -> Callable[[Any, Any], None]:
    def lose(optimizer: Any, checkpoint: Any) -> None:
        for entry in checkpoint["state"].values():
            if name in entry:
                entry[name] = torch.zeros_like(entry[name])

    return lose


def _cast(optimizer: Any, checkpoint: Any) -> None:
    for entry in checkpoint["state"].values():
        for name, tensor in entry.items():
            if tensor.is_floating_point():
                entry[name] = tensor.to(torch.bfloat16).float()


def _keep_lr(optimizer: Any, checkpoint: Any) -> None:
    for saved, live in zip(checkpoint["param_groups"], optimizer.param_groups, strict=True):
        saved["lr"] = live["lr"]


@pytest.mark.parametrize(
    ("optimizer", "tamper", "situation", "settings"),
    [
        (AdamW, _lose("step"), "plain", {}),
        (AdamW, _lose("global_step"), "plain", {}),
        (AdamW, _lose("exp_avg_sq"), "tied parameters", {}),
        (SOAP, _lose("initialized"), "plain", {}),
        (SOAP, _lose("overdue"), "missing gradients", {"precondition_frequency": every_fourth}),
        (SOAP, _lose("bases.0.mat"), "plain", {}),
        (SIRFShampoo, _lose("preconditioner_momenta.0.mat"), "group added later", {}),
        (AdamW, _cast, "plain", {}),
        (AdamW, _keep_lr, "plain", {}),
    ],
)
def test_what_a_checkpoint_loses_is_missed(
    optimizer: Any, tamper: Callable[[Any, Any], None], situation: str, settings: dict[str, Any]
) -> None:
    class Tampered(optimizer):  # type: ignore[misc]
        def load_state_dict(self, state_dict: Any) -> None:
            tamper(self, state_dict)
            super().load_state_dict(state_dict)

    run_cell(_making(optimizer, **settings), _cell(situation, "resume"))
    with pytest.raises(AssertionError, match="resume"):
        run_cell(_making(Tampered, **settings), _cell(situation, "resume"))


class Shares(AdamW):
    """Shares its state with its copies."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        shared = {id(b.state): b.state for b in self.buckets}
        other = AdamW(copy.deepcopy(self.model, memo))  # type: ignore[arg-type]
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo | shared))
        return other


def test_copies_that_share_memory_are_noticed() -> None:
    with pytest.raises(AssertionError, match="changes the first run"):
        run_cell(_making(Shares), _cell("plain", "deepcopy"))


# --- what is stated about structures -------------------------------------------------------------


class ClaimsTooMuch(StrategyContract):
    structures = ("dense", "triltoeplitz")

    def make(self, model: nn.Module, **overrides: Any) -> StructuredOptimizer:
        return SOAP(model, **overrides)


class ClaimsTooLittle(StrategyContract):
    structures = ("dense", "block2diagonal", "none")

    def make(self, model: nn.Module, **overrides: Any) -> StructuredOptimizer:
        return SOAP(model, **overrides)


def test_structures_are_those_that_are_stated() -> None:
    assert ClaimsTooLittle().accepted() == ["diagonal"]
    cell = next(c for c in ClaimsTooMuch.cells() if c.structure == "triltoeplitz")
    ((failed, error),) = ClaimsTooMuch().failures([cell])
    assert failed == cell
    assert isinstance(error, StructureError)


# --- the page of results -------------------------------------------------------------------------


def test_page_says_what_failed_and_leaves_no_cell_empty() -> None:
    sound = TestStrategyOfOnesOwn.covering_cells()
    results = {"sound": Result(TestStrategyOfOnesOwn, sound)}
    broken = ClaimsTooMuch.covering_cells()
    results["broken"] = Result(ClaimsTooMuch, broken, {broken[0]: "it did not"}, ["diagonal"])
    page = render(results)
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert all(entry.strip() for row in rows for entry in row.strip("|").split("|"))
    assert len({len(row.split("|")) for row in rows if row.startswith("| sound |")}) == 2
    assert f"- broken, {broken[0]}: it did not" in page
    assert "✗ not refused" in page
    assert "| sound | - | ✓ | ✓ | ✓ | ✓ | ✓ |" in page


@pytest.mark.slow
def test_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.md"
    assert main(["--pairs", "--only", "LARS", "--output", str(file)]) == 0
    assert "python -m structprecond.testing.conformance --pairs" in file.read_text("utf-8")
    ran = len(CONTRACTS["LARS"].covering_cells())
    assert f"LARS: {ran} of {ran} cells pass" in capsys.readouterr().out


def test_page_of_the_documentation_is_about_all_strategies_and_settings() -> None:
    page = (Path(__file__).parents[2] / "docs/conformance.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    for name, contract in CONTRACTS.items():
        own = [row[1:] for row in rows if row[0] == name]
        assert ["✓"] * len(SITUATIONS) in own
        for structure in contract.structures:
            assert [structure, *["✓"] * len(PRECISIONS)] in own
        if contract.refused():
            refusals = [contract.refusal] * len(PRECISIONS)
            assert [", ".join(contract.refused()), *refusals] in own
    assert {row[0] for row in rows} == {*CONTRACTS, "strategy", "---"}
    assert "✗" not in page
