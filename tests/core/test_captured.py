"""Captured steps, with fake graphs that replay the recorded operations on the same memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from structprecond import (
    KLSOAP,
    LARS,
    SOAP,
    AdamW,
    CapturedStep,
    KLShampoo,
    Muon,
    NorMuon,
    Scion,
    Shampoo,
    SIRFShampoo,
    StructPrecondError,
)
from structprecond.core import captured as module
from structprecond.core.step import Plan
from tests.helpers import assert_close, same_bits, snapshot, values

Make = Callable[..., Any]
MAKERS: dict[str, Make] = {
    "AdamW": AdamW,
    "SOAP": partial(SOAP, precondition_frequency=4),
    "SOAP staggered": partial(SOAP, precondition_frequency=9, refresh="staggered"),
    "SOAP, all options": partial(
        SOAP, precondition_frequency=4, clip_rms=1.0, normalize_grads=True, skip_first=False
    ),
    "KL-Shampoo": partial(KLShampoo, precondition_frequency=4),
    "KL-SOAP": partial(KLSOAP, precondition_frequency=4),
    "Shampoo": partial(Shampoo, precondition_frequency=5, start_preconditioning_step=6),
    "SIRF-Shampoo": partial(SIRFShampoo, batch_size=4, kappa=0.01),
    "SIRF-Shampoo, T": partial(SIRFShampoo, batch_size=4, T=3),
    "SIRF-Shampoo, structures": partial(
        SIRFShampoo,
        batch_size=4,
        structures={1: "diagonal", 2: ("hierarchical2_1", "block2diagonal"), 4: "triltoeplitz"},
    ),
    "SOAP, blocks": partial(
        SOAP, precondition_frequency=4, structures={1: "none", 2: "block2diagonal", 4: "dense"}
    ),
    "Muon": partial(Muon, nesterov=True, adamw_betas=(0.8, 0.9)),
    "NorMuon": NorMuon,
    "Scion": Scion,
    "LARS": partial(LARS, momentum=0.9, dampening=0.5, nesterov=False, weight_decay=0.1),
}
STEPS = 17


class _Graph(TorchDispatchMode):
    """Records operations on floating-point tensors and int32, which stand in for device tensors.

    Other integers and masks stand in for the host: replays do not recompute values that depend on
    them, which may not enter recorded values. Recorded values may not be read on the host.

    Args:
        inputs: Other tensors on the device.
    """

    # numbers in host tensors
    on_host: ClassVar[list[Tensor]] = []

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self._inputs = {t.data_ptr() for t in inputs}
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is_tensor(t)]
        on_device = [t for t in given if _on_device(t) or t.data_ptr() in self._inputs]
        floating = [t for t in on_device if all(t is not h for h in self.on_host)]
        if floating and func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        ):
            raise AssertionError(f"{func} waits for the device")
        result = func(*args, **kwargs)
        results = [t for t in torch.utils._pytree.tree_leaves(result) if _is_tensor(t)]
        made = [t for t in results if _on_device(t)]
        if made and given and not floating and func is not torch.ops.aten.detach.default:
            raise AssertionError(f"{func} brings {[t.dtype for t in given]} to the device")
        if floating or made:
            self.operations.append((func, args, kwargs, results))
        return result

    def replay(self) -> None:
        for func, args, kwargs, recorded in self.operations:
            again = func(*args, **kwargs)
            results = [t for t in torch.utils._pytree.tree_leaves(again) if _is_tensor(t)]
            for old, new in zip(recorded, results, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _on_device(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.int32


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[_Graph]:
    """Record on the CPU; recording leaves the device as it was."""
    recorded: list[_Graph] = []

    def record(plans: Sequence[Plan]) -> Callable[[], None]:
        buckets = [plan.bucket for plan in plans]
        tensors: list[Tensor] = [p for b in buckets for p in b.params]
        tensors += [t for b in buckets for t in b.state.named_tensors().values()]
        tensors += [b.compensation for b in buckets if b.compensation is not None]
        before = [t.detach().clone() for t in tensors]
        graph = _Graph([plan.recorded.seeds for plan in plans if plan.recorded is not None])
        with graph:
            module.apply_all(plans)
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(old)
        recorded.append(graph)
        return torch.no_grad()(graph.replay)

    monkeypatch.setattr(module, "_record", record)
    return recorded


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 2), nn.Linear(5, 6), nn.Linear(5, 6), nn.Embedding(7, 4)]
    return nn.ModuleList([*layers, nn.Linear(4, 2)]).double()


def _fill(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if p.grad is None:
            p.grad = grad
        else:
            p.grad.copy_(grad)


@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("name", MAKERS)
def test_replayed_steps_are_the_steps(name: str, lr: str, graphs: list[_Graph]) -> None:
    model, make = _model(), MAKERS[name]
    twin = copy.deepcopy(model)
    first = torch.tensor(0.01, dtype=torch.float64) if lr == "tensor" else 0.01
    optimizer, plain = make(model, lr=first, nonfinite="ignore"), make(twin, lr=0.01)
    step = CapturedStep(optimizer)
    for i in range(STEPS):
        rate = 0.01 / (1 + i)
        plain.param_groups[0]["lr"] = rate
        if lr == "tensor":
            optimizer.param_groups[0]["lr"].fill_(rate)
        else:
            optimizer.param_groups[0]["lr"] = rate
        _fill(model, i)
        _fill(twin, i)
        step()
        plain.step()
        assert_close(values(model), values(twin), 1e-9)
    assert step.replays >= 6
    # one for steps without a refresh, one for refreshes without a decomposition, by products
    # alone or of units without factors
    refreshed = {"SIRF-Shampoo, T", "KL-Shampoo", "KL-SOAP", "SOAP staggered"}
    assert len(graphs) == (2 if name in refreshed else 1)
    assert optimizer.global_step == STEPS
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        mine, theirs = optimizer.state[p], plain.state[q]
        assert {k: int(mine[k]) for k in ("step", "skipped", "failed")} == {
            k: int(theirs[k]) for k in ("step", "skipped", "failed")
        }
        for key in mine:
            assert_close(mine[key].double(), theirs[key].double(), 1e-8)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("name", ["AdamW", "SOAP", "Muon"])
def test_replayed_steps_round_as_the_steps_do(
    name: str, rounding: str, graphs: list[_Graph]
) -> None:
    model, make = _model().bfloat16(), partial(MAKERS[name], lr=0.01, rounding=rounding)
    twin = copy.deepcopy(model)
    plain = make(twin)
    step = CapturedStep(make(model, nonfinite="ignore"))
    for i in range(8):
        _fill(model, i)
        _fill(twin, i)
        step()
        plain.step()
    assert step.replays >= 5
    assert_close(values(model), values(twin), 1e-9)


def test_what_a_graph_cannot_hold_runs_as_usual(graphs: list[_Graph]) -> None:
    model = _model()
    optimizer = SOAP(model, nonfinite="ignore", precondition_frequency=lambda step: step == 3)
    step = CapturedStep(optimizer)
    for i in range(4):
        _fill(model, i)
        step()
    assert (step.replays, len(graphs)) == (0, 0)
    optimizer.param_groups[0]["precondition_frequency"] = 100
    step()
    assert step.replays == 1
    next(iter(model.parameters())).grad = None
    step()
    assert step.replays == 1
    _fill(model, 0)
    step()
    assert (step.replays, len(graphs)) == (2, 2)


@pytest.mark.parametrize(
    "change", ["hyperparameter", "in a tensor", "gradients", "layout", "batch size", "maximize"]
)
def test_changes_are_recorded_anew(
    change: str, graphs: list[_Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model()
    twin = copy.deepcopy(model)
    make = partial(SIRFShampoo, batch_size=4, nonfinite="ignore")
    optimizer, plain = make(model), make(twin)
    alpha = torch.tensor(0.9)
    monkeypatch.setattr(_Graph, "on_host", [alpha])
    for each in (optimizer, plain):
        each.param_groups[0]["alpha1"] = alpha
    step = CapturedStep(optimizer)
    for i in range(6):
        if i == 3:
            for each in (optimizer, plain):
                if change == "hyperparameter":
                    each.param_groups[0]["alpha1"] = 0.5
                elif change == "in a tensor":
                    alpha.fill_(0.5)
                elif change == "layout":
                    for group in each.param_groups:
                        for p in group["params"]:
                            p.grad = p.grad.mT.contiguous().mT if p.ndim > 1 else p.grad
                elif change == "gradients":
                    each.zero_grad(set_to_none=True)
                elif change == "batch size":
                    each.batch_size = 40
                else:
                    each.maximize = True
        _fill(model, i)
        _fill(twin, i)
        step()
        plain.step()
    assert len(graphs) == 2
    assert_close(values(model), values(twin), 1e-9)


def test_a_recording_that_fails_is_not_replayed(
    graphs: list[_Graph], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _model()
    optimizer = AdamW(model, nonfinite="ignore")
    step = CapturedStep(optimizer)
    _fill(model, 0)
    step()
    before, counters = values(model), snapshot(model, optimizer)
    good = module._record

    def fail(optimizer: Any) -> Any:
        good(optimizer)
        raise RuntimeError("capture")

    monkeypatch.setattr(module, "_record", fail)
    with pytest.raises(RuntimeError, match="capture"):
        step()
    assert same_bits(values(model), before)
    assert same_bits(snapshot(model, optimizer), counters)
    monkeypatch.setattr(module, "_record", good)
    step()
    assert not same_bits(values(model), before)


def test_only_optimizers_that_do_not_wait_are_taken() -> None:
    model = _model()
    with pytest.raises(StructPrecondError, match=r"nonfinite='skip'.*nonfinite=\"ignore\""):
        CapturedStep(SOAP(model))
    with pytest.raises(StructPrecondError, match="an optimizer of this library"):
        CapturedStep(torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]


def test_parameters_on_the_cpu_are_refused_where_a_graph_would_be_recorded() -> None:
    model = _model()
    optimizer = AdamW(model, nonfinite="ignore")
    step = CapturedStep(optimizer)
    _fill(model, 0)
    step()
    with pytest.raises(StructPrecondError, match=r"on cpu. Call optimizer\.step\(\)"):
        step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", MAKERS)
def test_replayed_steps_are_the_steps_on_a_gpu(name: str) -> None:
    model = _model().cuda()
    twin = copy.deepcopy(model)
    step = CapturedStep(MAKERS[name](model, lr=0.01, nonfinite="ignore"))
    plain = MAKERS[name](twin, lr=0.01)
    for i in range(STEPS):
        for m in (model, twin):
            source = _model()
            _fill(source, i)
            for p, q in zip(m.parameters(), source.parameters(), strict=True):
                assert q.grad is not None
                p.grad = p.grad if p.grad is not None else torch.empty_like(p)
                p.grad.copy_(q.grad)
        step()
        plain.step()
    assert step.replays >= 6
    assert_close([v.cpu() for v in values(model)], [v.cpu() for v in values(twin)], 1e-6)
