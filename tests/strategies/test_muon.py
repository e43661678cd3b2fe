"""Muon, NorMuon and Scion against recorded trajectories, torch's Muon and formulas by SVD."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    HyperparameterError,
    Matricize,
    Muon,
    MuonStrategy,
    NorMuon,
    PerParameter,
    PreconditionerGroup,
    Scion,
    ScionStrategy,
    SplitHeads,
    StackExperts,
    StructPrecondError,
    StructuredOptimizer,
)
from structprecond.linalg import newton_schulz
from tests import golden
from tests.core.routed import warns_of_roles

EXACT: Any = {"coefficient_type": "polar_express", "num_ns_steps": 12}


def _exact_polar(matrix: Tensor) -> Tensor:
    svd = torch.linalg.svd(matrix, full_matrices=False)
    return svd.U @ svd.Vh


def _step(
    params: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad.clone()
    optimizer.step()
    return grads


@pytest.mark.parametrize("name", golden.names("muon_"))
def test_recorded_trajectory(name: str) -> None:
    recorded = golden.load(name)
    model = recorded.model()
    with warns_of_roles():
        optimizer = Muon(model.parameters(), fp32_matmul_prec="highest", **recorded.kwargs)
    assert recorded.replay(model, optimizer) < 1e-4


def test_all_recorded_trajectories_are_here() -> None:
    assert len(golden.names("muon_")) == 4


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_torch_muon(adjust: str, shape: tuple[int, int]) -> None:
    ours = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    theirs = nn.Parameter(ours.detach().clone())
    kwargs: Any = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    mode: Any = "shape_scaling" if adjust == "original" else "match_rms_adamw"
    optimizer = StructuredOptimizer(
        [ours],
        strategy=MuonStrategy(
            nesterov=True, coefficient_type="simple", scale_mode=mode, fp32_matmul_prec="highest"
        ),
        hyperparameters={k: v for k, v in kwargs.items() if k != "nesterov"},
    )
    reference = torch.optim.Muon([theirs], adjust_lr_fn=adjust, **kwargs)
    start = ours.detach().clone()
    for seed in range(10):
        _step([ours], optimizer, seed)
        _step([theirs], reference, seed)
    # torch's iteration runs in bfloat16, which has 3 digits
    assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(
    ("method", "factor", "l2"),
    [
        ("decoupled", 1 - 0.1 * 0.2, 0.0),
        ("independent", 1 - 0.2, 0.0),
        ("palm", 1 - 0.1**2 * 0.2, 0.0),
        ("l2", 1.0, 0.2),
    ],
)
def test_momentum_and_weight_decay(method: Any, factor: float, l2: float, nesterov: bool) -> None:
    p = nn.Parameter(torch.randn(4, 6, dtype=torch.float64))
    optimizer = Muon(
        [("w", p)],
        lr=0.1,
        momentum=0.7,
        weight_decay=0.2,
        weight_decay_method=method,
        nesterov=nesterov,
        **EXACT,
    )
    expected, m = p.detach().clone(), torch.zeros_like(p)
    for seed in range(4):
        (grad,) = _step([p], optimizer, seed)
        assert p.grad is not None
        assert torch.equal(p.grad, grad)
        grad = grad + l2 * expected
        m = 0.7 * m + 0.3 * grad
        u = 0.3 * grad + 0.7 * m if nesterov else m
        expected = factor * expected - 0.1 * 6**0.5 * _exact_polar(u)
    assert (p - expected).norm() < 1e-8


@pytest.mark.parametrize(
    ("mode", "scales"),
    [
        ("spectral", {(4, 9): 3.0, (9, 4): 3.0}),
        ("shape_scaling", {(4, 9): 1.0, (9, 4): 1.5}),
        ("unit_rms_norm", {(4, 9): 2 / 3, (9, 4): 1.5}),
        ("match_rms_adamw", {(4, 9): 0.6, (9, 4): 0.6}),
    ],
)
def test_scales(mode: Any, scales: dict[tuple[int, int], float]) -> None:
    for shape, scale in scales.items():
        strategy = MuonStrategy(scale_mode=mode, extra_scale_factor=0.5, **EXACT)
        stack = torch.randn(3, *shape, dtype=torch.float64)
        assert (
            strategy.scaled_orthogonalize_fn(stack) - 0.5 * scale * _exact_polar(stack)
        ).norm() < 1e-8


def test_match_rms_makes_updates_as_large_as_those_of_adamw() -> None:
    p = nn.Parameter(torch.zeros(64, 32, dtype=torch.float64))
    _step([p], Muon([("w", p)], lr=1.0, scale_mode="match_rms_adamw", weight_decay=0.0, **EXACT), 0)
    assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 6, 3, 3), (5, 1, 3, 3), (5, 4, 1, 1), (6, 4, 3)])
def test_convolutions_are_matrices_with_their_own_scale(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = StructuredOptimizer(
        [p],
        strategy=MuonStrategy(scale_mode="unit_rms_norm", **EXACT),
        hyperparameters={"lr": 1.0, "weight_decay": 0.0},
    )
    (grad,) = _step([p], optimizer, 0)
    matrix = grad.flatten(1)
    scale = (matrix.shape[0] / matrix.shape[1]) ** 0.5
    assert (p.flatten(1) + scale * _exact_polar(matrix)).norm() < 1e-8


@pytest.mark.parametrize("shape", [(6,), (1,), (2, 3, 2)])
def test_other_shapes_under_other_rules_are_flattened(shape: tuple[int, ...]) -> None:
    p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = StructuredOptimizer(
        [p],
        strategy=MuonStrategy(scale_mode="shape_scaling", **EXACT),
        hyperparameters={"lr": 1.0, "weight_decay": 0.0},
        combine_params=(PerParameter(),),
    )
    (grad,) = _step([p], optimizer, 0)
    matrix = grad.reshape(shape[0], -1)
    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    assert (p.reshape(matrix.shape) + scale * _exact_polar(matrix)).norm() < 1e-8


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)


def test_blocks_of_a_fused_projection_one_by_one() -> None:
    model = _Attention().double()
    start = model.qkv.weight.detach().clone()
    optimizer = Muon(
        model,
        lr=1.0,
        weight_decay=0.0,
        scale_mode="shape_scaling",
        routes={"proj.weight": "muon"},
        combine_params=(SplitHeads("qkv.weight", 3), Matricize()),
        **EXACT,
    )
    grad = _step(list(model.parameters()), optimizer, 0)[0]
    for block in range(3):
        rows = slice(4 * block, 4 * block + 4)
        expected = start[rows] - _exact_polar(grad[rows])
        assert (model.qkv.weight[rows] - expected).norm() < 1e-8
    assert "adamw" not in str(type(optimizer.buckets[0].strategy)).lower()


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 4))


def test_experts_are_a_stack() -> None:
    model: nn.Module = nn.ModuleDict({"experts": _Experts(), "head": nn.Linear(4, 2)}).double()
    weight = next(model.parameters())
    start = weight.detach().clone()
    optimizer = Muon(model, lr=1.0, weight_decay=0.0, scale_mode="shape_scaling", **EXACT)
    grad = _step(list(model.parameters()), optimizer, 0)[0]
    for expert in range(3):
        expected = start[expert] - 1.5**0.5 * _exact_polar(grad[expert])
        assert (weight[expert] - expected).norm() < 1e-8


def test_hooks_before_and_after_the_weight_update() -> None:
    p = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    seen: list[Tensor] = []

    def project(params: Tensor, update: Tensor) -> Tensor:
        seen.append(params.clone())
        return update - params * (params * update).sum((1, 2), keepdim=True)

    def unit_rows(params: Tensor) -> Tensor:
        return params / params.norm(dim=-1, keepdim=True)

    optimizer = Muon(
        [("w", p)],
        lr=0.1,
        weight_decay=0.5,
        before_weight_update=project,
        after_weight_update=unit_rows,
        **EXACT,
    )
    start = p.detach().clone()
    (grad,) = _step([p], optimizer, 0)
    update = 5**0.5 * _exact_polar(grad)
    update = update - start * (start * update).sum()
    moved = (1 - 0.05) * start - 0.1 * update
    assert torch.equal(seen[0][0], start)
    assert (p - moved / moved.norm(dim=-1, keepdim=True)).norm() < 1e-8


def test_a_constraint_leaves_rows_without_a_gradient_alone() -> None:
    model = nn.ModuleList([nn.Linear(3, 5, bias=False) for _ in range(3)]).double()
    params = list(model.parameters())
    unit_rows = MuonStrategy(after_weight_update=lambda p: p / p.norm(dim=-1, keepdim=True))
    optimizer = StructuredOptimizer(params, strategy=unit_rows)
    before = params[1].detach().clone()
    for p in (params[0], params[2]):
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert torch.equal(params[1], before)
    for p in (params[0], params[2]):
        assert torch.allclose(p.norm(dim=-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_normuon(shape: tuple[int, int]) -> None:
    p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    kwargs: Any = {"lr": 0.1, "momentum": 0.8, "beta2": 0.6, "eps": 1e-6, "weight_decay": 0.3}
    optimizer = NorMuon([("w", p)], **kwargs, **EXACT)
    expected, m = p.detach().clone(), torch.zeros_like(p)
    v = torch.zeros(shape[0], 1, dtype=torch.float64)
    for seed in range(4):
        (grad,) = _step([p], optimizer, seed)
        m = 0.8 * m + 0.2 * grad
        polar = _exact_polar(m)
        v = 0.6 * v + 0.4 * polar.square().mean(1, keepdim=True)
        normalized = polar / (v.sqrt() + 1e-6)
        rate = 0.2 * 0.1 * (shape[0] * shape[1]) ** 0.5 / normalized.norm()
        expected = expected - 0.1 * 0.3 * expected - rate * normalized
    assert (p - expected).norm() < 1e-8


@pytest.mark.parametrize("shape", [(3, 4), (31, 13)])
def test_normuon_stays_put_on_zero_gradients(shape: tuple[int, int]) -> None:
    p = nn.Parameter(torch.randn(shape))
    before = p.detach().clone()
    optimizer = NorMuon([("w", p)], weight_decay=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, before)


def test_scion_steps_have_unit_norm() -> None:
    momentum = torch.randn(2, 6, 4, dtype=torch.float64)
    steps = {
        "spectral": 1.5**0.5 * _exact_polar(momentum),
        "sign": momentum.sign() / 4,
        "row": 2 * momentum / momentum.norm(dim=2, keepdim=True),
        "rms": 24**0.5 * momentum / momentum.flatten(1).norm(dim=1)[:, None, None],
    }
    for norm, expected in steps.items():
        strategy = ScionStrategy(norm=norm, radius=3.0, **EXACT)  # type: ignore[arg-type]
        assert (strategy.scaled_orthogonalize_fn(momentum) - 3 * expected).norm() < 1e-7
        zeros = strategy.scaled_orthogonalize_fn(torch.zeros_like(momentum))
        assert torch.equal(zeros, torch.zeros_like(momentum))
        for scale in (1e-30, 1e30):
            scaled = strategy.scaled_orthogonalize_fn((scale * momentum).float())
            assert scaled.isfinite().all()


def test_scion_gives_every_role_its_norm() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 7))
    model = model.double()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = Scion(model, lr=0.01, radius=5.0, head_radius=20.0, weight_decay=1.0, **EXACT)
    params = list(model.parameters())
    grads = _step(params, optimizer, 0)

    def rms(g: Tensor) -> Tensor:
        return 5 * g * g.numel() ** 0.5 / g.norm()

    g = grads
    rows = 5 * g[0] * 2 / g[0].norm(dim=1, keepdim=True)
    spectral = 5 * (6 / 4) ** 0.5 * _exact_polar(g[1])
    sign = 20 * g[5].sign() / 6
    expected = [rows, spectral, rms(g[2]), rms(g[3]), rms(g[4]), sign, rms(g[6])]
    for p, before, step in zip(params, start, expected, strict=True):
        assert (p - 0.99 * before + 0.01 * step).norm() < 1e-8


def test_adamw_gets_its_own_settings() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 7)).double()
    reference = copy.deepcopy(model)
    optimizer = Muon(
        model, lr=0.2, adamw_lr=0.01, adamw_betas=(0.7, 0.8), adamw_weight_decay=0.3, adamw_eps=1e-5
    )
    auxiliary = [p for i, p in enumerate(reference.parameters()) if i != 1]
    torch_adamw = torch.optim.AdamW(
        auxiliary, lr=0.01, betas=(0.7, 0.8), weight_decay=0.3, eps=1e-5
    )
    for seed in range(5):
        grads = _step(list(model.parameters()), optimizer, seed)
        for p, grad in zip(reference.parameters(), grads, strict=True):
            p.grad = grad.clone()
        torch_adamw.step()
        for group in (*optimizer.param_groups, *torch_adamw.param_groups):
            group["lr"] *= 0.9  # schedules apply to both
    assert len(optimizer.param_groups) == 1
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    for i, (p, q) in enumerate(pairs):
        assert torch.allclose(p, q, rtol=1e-12, atol=1e-12) == (i != 1)


def test_tensor_learning_rates_scale_alike() -> None:
    models = [nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 7)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    rates: list[Any] = [0.1, torch.tensor(0.1)]
    for model, lr in zip(models, rates, strict=True):
        optimizer = Muon(model, lr=lr, adamw_lr=0.02, weight_decay_method="palm")
        for seed in range(3):
            _step(list(model.parameters()), optimizer, seed)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"scale_mode": "rms"}, StructPrecondError, "scale_mode must be 'spectral'"),
        ({"weight_decay_method": "l1"}, StructPrecondError, "weight_decay_method must be"),
        ({"fp32_matmul_prec": "low"}, StructPrecondError, "fp32_matmul_prec must be 'highest'"),
        ({"coefficient_type": "qintic"}, StructPrecondError, "Unknown Newton-Schulz coefficients"),
        ({"num_ns_steps": 0}, StructPrecondError, "integer of at least 1, got 0"),
        ({"match_rms": "adamw"}, TypeError, "unexpected keyword argument 'match_rms'"),
        ({"lr": 0.0, "adamw_lr": 0.1}, HyperparameterError, "impossible with lr=0"),
        ({"momentum": 1.0}, HyperparameterError, "momentum must be a number from 0 to below 1"),
        ({"adamw_betas": (0.9, 1.0)}, HyperparameterError, "adamw_betas must be a pair"),
        ({"adamw_lr": "x"}, HyperparameterError, "adamw_lr must be a finite number"),
        ({"adamw_lr": -1.0}, HyperparameterError, "adamw_lr must be a finite number.*got -1.0"),
        ({"lr": None, "adamw_lr": 1.0}, HyperparameterError, "lr must be a finite number"),
        ({"routes": [("head", "adamw")]}, StructPrecondError, "routes must be a dict from"),
        ({"nesterov": "no"}, StructPrecondError, "nesterov must be True or False, got 'no'"),
        ({"maximize": "no"}, StructPrecondError, "maximize must be True or False, got 'no'"),
        ({"extra_scale_factor": -1.0}, HyperparameterError, "extra_scale_factor must be a finite"),
        ({"before_weight_update": "f"}, StructPrecondError, "takes a function or None, got 'f'"),
        ({"routes": {"head": "sgd"}}, StructPrecondError, "routes sends 'head' to 'sgd'"),
    ],
)
def test_wrong_arguments(kwargs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Muon(nn.Linear(3, 2), **kwargs)


@pytest.mark.parametrize("kwargs", [{"radius": -1.0}, {"radius": float("nan")}, {"norm": "max"}])
def test_wrong_arguments_of_scion(kwargs: Any) -> None:
    with pytest.raises(StructPrecondError, match=f"{next(iter(kwargs))} must be"):
        ScionStrategy(**kwargs)


def test_scion_takes_coefficients_as_a_list() -> None:
    triples = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]
    optimizer = Scion(
        [("w", nn.Parameter(torch.ones(3, 2)))], coefficient_type=triples, num_ns_steps=2
    )
    assert optimizer.buckets[0].strategy.coefficient_type == tuple(triples)  # type: ignore[attr-defined]


@pytest.mark.parametrize("hook", ["before_weight_update", "after_weight_update"])
def test_hooks_that_return_nothing_are_refused(hook: str) -> None:
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = Muon([("w", p)], **{hook: lambda *args: None})  # type: ignore[arg-type]
    p.grad = torch.ones_like(p)
    with pytest.raises(StructPrecondError, match=r"return a tensor of shape \(1, 3, 2\), got None"):
        optimizer.step()


def test_a_dead_row_stays_dead_without_an_epsilon() -> None:
    p = nn.Parameter(torch.randn(5, 3))
    before = p.detach().clone()
    optimizer = NorMuon([("w", p)], eps=0.0, weight_decay=0.0)
    p.grad = torch.randn(5, 3)
    p.grad[2] = 0.0
    optimizer.step()
    assert torch.equal(p[2], before[2])
    assert p.isfinite().all()


@pytest.mark.parametrize("split", [SplitHeads("*", 4), StackExperts("*")])
def test_pieces_of_one_row_are_rows(split: PreconditionerGroup) -> None:
    model = nn.ParameterDict(
        {"w": torch.zeros(4, 8) if "Split" in repr(split) else torch.zeros(4, 1, 8)}
    )
    optimizer = StructuredOptimizer(
        model,
        strategy=MuonStrategy(scale_mode="unit_rms_norm", fp32_matmul_prec="highest", **EXACT),
        hyperparameters={"lr": 1.0, "weight_decay": 0.0},
        combine_params=(split,),
    )
    _step(list(model.parameters()), optimizer, 0)
    # sqrt(out / in) for each
    assert torch.allclose(
        model["w"].reshape(4, 8).norm(dim=1), torch.full((4,), 8**-0.5), atol=1e-4
    )


def test_structures_are_refused_where_there_are_no_factors() -> None:
    with pytest.raises(StructPrecondError, match="has no Kronecker factors"):
        StructuredOptimizer(nn.Linear(3, 2), strategy=MuonStrategy(), structures="diagonal")


def test_custom_coefficients() -> None:
    triples = [(2.0, -1.5, 0.5), (1.5, -0.5, 0.0)]
    p = nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
    optimizer = Muon([("w", p)], lr=1.0, coefficient_type=triples, num_ns_steps=2, weight_decay=0.0)
    (grad,) = _step([p], optimizer, 0)
    assert (p + 5**0.5 * newton_schulz(0.05 * grad, 2, triples)).norm() < 1e-10


def test_a_weight_decay_of_one_is_no_exception() -> None:
    start, grad = torch.randn(2, 4, 3, dtype=torch.float64)
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    p.grad, q.grad = grad, grad + start
    options: Any = {"lr": 0.1, "routes": {"*": "muon"}, **EXACT}
    Muon([p], weight_decay=1.0, weight_decay_method="l2", **options).step()
    Muon([q], weight_decay=0.0, **options).step()
    assert torch.allclose(p, q, rtol=0, atol=1e-12)
    assert not torch.equal(p, start)
