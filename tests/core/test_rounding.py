"""Parameters of low precision: rounded once, and without losing small updates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import (
    LARS,
    SOAP,
    AdamW,
    LARSStrategy,
    MuonStrategy,
    PreconditionerGroup,
    StructPrecondError,
    StructuredOptimizer,
)
from structprecond.core.rounding import round_stochastically, row_keys
from tests.helpers import PlainDescent

LOW = [torch.bfloat16, torch.float16]


def _round(values: Tensor, dtype: torch.dtype, draws: int) -> Tensor:
    """Round the same values several times, each time as another row."""
    keys = row_keys(torch.arange(draws), 1)
    return round_stochastically(values.expand(draws, *values.shape), dtype, keys)


def _many_small_steps(dtype: torch.dtype, rounding: Any, steps: int = 400) -> Tensor:
    """Add 1e-4 to ones, `steps` times, by SGD."""
    p = nn.Parameter(torch.ones(64, dtype=dtype))
    optimizer = LARS([p], lr=1e-4, rounding=rounding)
    for _ in range(steps):
        p.grad = torch.full_like(p, -1.0)
        optimizer.step()
    return p.detach().double()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_small_updates_count(dtype: torch.dtype) -> None:
    # half a unit in the last place of 1 is 4e-3 in bfloat16 and 5e-4 in float16
    assert (_many_small_steps(dtype, "nearest") == 1.0).all()
    torch.manual_seed(0)
    stochastic = _many_small_steps(dtype, "stochastic")
    assert stochastic.mean().item() == pytest.approx(1.04, abs=0.006)
    assert stochastic.unique().numel() > 1
    kahan = _many_small_steps(dtype, "kahan")
    assert kahan == pytest.approx(1.04, abs=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_stochastic_rounding_is_unbiased_between_neighbours(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1.0 + 1e-4, -3.3333, 2e-3, -7.77e3, 1e-6, 0.0, -1e-30])
    lower = torch.nextafter(values.to(dtype), torch.full((), -torch.inf, dtype=dtype)).float()
    upper = torch.nextafter(values.to(dtype), torch.full((), torch.inf, dtype=dtype)).float()
    draws = _round(values, dtype, 4000).float()
    assert ((draws >= lower) & (draws <= upper)).all()
    # four standard deviations of the mean of a coin that lands on neighbours
    assert ((draws.mean(0) - values).abs() <= 4 * (upper - lower) / 2 / 4000**0.5).all()
    exact = values.to(dtype)
    assert torch.equal(_round(exact.float(), dtype, 1)[0], exact)


@pytest.mark.parametrize("start", [1.0, -1.0, 1.5, 3e-3])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_stochastic_rounding_has_the_probability_of_the_distance(
    dtype: torch.dtype, start: float
) -> None:
    near = torch.tensor(start, dtype=dtype)
    for direction in (-torch.inf, torch.inf):
        far = torch.nextafter(near, torch.tensor(direction, dtype=dtype))
        for fraction in (0.1, 0.3, 0.5, 0.8):
            value = near.float() + fraction * (far.float() - near.float())
            draws = _round(value.expand(2000), dtype, 100)
            share = (draws == far).double().mean().item()
            # 5 standard deviations are less than a tenth of each fraction
            deviation = (fraction * (1 - fraction) / 200_000) ** 0.5
            assert share == pytest.approx(fraction, abs=5 * deviation)
            assert bool(((draws == far) | (draws == near)).all())


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan])
def test_stochastic_rounding_keeps_what_is_not_finite(special: float) -> None:
    rounded = _round(torch.tensor([special]), torch.bfloat16, 1)[0]
    assert torch.equal(rounded.isnan(), torch.tensor([special]).isnan())
    assert rounded.isnan() or rounded.item() == special


def test_parameters_are_rounded_once() -> None:
    # decay and update together: 1 * (1 - 0.25) - 0.5 * 1e-2, rounded at the end
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    q = nn.Parameter(torch.ones(1, dtype=torch.float32))
    for parameter in (p, q):
        parameter.grad = torch.full_like(parameter, 0.3)
        AdamW([parameter], lr=0.003, weight_decay=0.3).step()
    assert torch.equal(p, q.detach().bfloat16())


def test_kahan_follows_float32_closely() -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)).bfloat16()
    models = {name: copy.deepcopy(start) for name in ("nearest", "stochastic", "kahan")}
    models["float32"] = copy.deepcopy(start).float()
    optimizers = {
        name: SOAP(m, lr=1e-4, rounding="nearest" if name == "float32" else name)  # type: ignore[arg-type]
        for name, m in models.items()
    }
    for step in range(100):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(p.shape, generator=generator) for p in start.parameters()]
        for name, model in models.items():
            for p, grad in zip(model.parameters(), grads, strict=True):
                # the same gradients for all, bit for bit
                p.grad = grad.bfloat16().to(p.dtype)
            optimizers[name].step()

    vectors = {
        name: torch.cat([p.detach().float().flatten() for p in m.parameters()])
        for name, m in (*models.items(), ("start", start))
    }
    way, *distances = (
        float((vectors[name] - vectors["float32"]).norm())
        for name in ("start", "nearest", "stochastic", "kahan")
    )
    nearest, stochastic, kahan = distances
    assert nearest > 0.5 * way
    assert kahan < 0.35 * way
    assert kahan < 0.7 * stochastic


def test_what_was_lost_is_saved_and_follows_its_unit() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)]).bfloat16()
    optimizer = SOAP(model, lr=1e-3, rounding="kahan")
    params = list(model.parameters())

    def step(model: nn.Module, optimizer: StructuredOptimizer, seed: int, live: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, generator=generator)
            p.grad = grad.bfloat16() if i < live else None
        optimizer.step()

    step(model, optimizer, 0, 6)
    step(model, optimizer, 1, 6)
    untouched = optimizer.state[params[4]]["compensation"].clone()
    assert untouched.any()
    assert untouched.dtype == torch.bfloat16
    step(model, optimizer, 2, 4)
    assert torch.equal(optimizer.state[params[4]]["compensation"], untouched)
    other = copy.deepcopy(model)
    resumed = SOAP(other, lr=1e-3, rounding="kahan")
    resumed.load_state_dict(optimizer.state_dict())
    for seed in range(3, 8):
        step(model, optimizer, seed, 6)
        step(other, resumed, seed, 6)
    assert all(torch.equal(p, q) for p, q in zip(params, other.parameters(), strict=True))


def test_float32_parameters_keep_nothing() -> None:
    p = nn.Parameter(torch.ones(3, 2))
    assert "compensation" not in SOAP([p], rounding="kahan").state[p]


class _Copying(PreconditionerGroup):
    """A grouping whose `ungroup` copies, so that there are no windows."""

    requires_modules = False

    def identify(self, model: nn.Module) -> list[list[nn.Parameter]]:
        return [[p] for p in model.parameters()]

    def group(self, tensors: list[Tensor]) -> Tensor:
        return tensors[0].flip(0)

    def ungroup(self, grouped_tensor: Tensor, tensor_shapes: list[torch.Size]) -> list[Tensor]:
        return [grouped_tensor.flip(0)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Copying)

    def __hash__(self) -> int:
        return 0


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
def test_rules_without_windows_and_constraints(rounding: Any) -> None:
    def unit_rows(params: Tensor) -> Tensor:
        return params / params.norm(dim=-1, keepdim=True)

    params = [nn.Parameter(torch.randn(4, 3).bfloat16()) for _ in range(2)]
    plain = [nn.Parameter(p.detach().clone()) for p in params]
    strategy = MuonStrategy(after_weight_update=unit_rows)
    first = StructuredOptimizer(
        params, strategy=strategy, combine_params=(_Copying(),), rounding=rounding
    )
    second = StructuredOptimizer(plain, strategy=strategy, rounding=rounding)
    for _ in range(3):
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    for p, q in zip(params, plain, strict=True):
        assert torch.allclose(p.float(), q.float(), atol=0.02)
        assert torch.allclose(p.float().norm(dim=1), torch.ones(4), atol=0.01)


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(StructPrecondError, match="rounding must be 'nearest', 'stochastic'"):
        SOAP([nn.Parameter(torch.ones(2))], rounding="up")  # type: ignore[arg-type]


# --- models that were converted in part ----------------------------------------------------------


def _three_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])


def _unit_norm(params: Tensor) -> Tensor:
    return params / params.norm(dim=-1, keepdim=True)


CONVERTED: dict[str, Any] = {
    "AdamW": lambda model: AdamW(model, lr=0.01, weight_decay=0.1),
    "AdamW with a tensor": lambda model: AdamW(model, lr=torch.tensor(0.01), weight_decay=0.1),
    "SOAP": lambda model: SOAP(model, lr=0.01, precondition_frequency=1),
    "Muon with a constraint": lambda model: StructuredOptimizer(
        model, strategy=MuonStrategy(after_weight_update=_unit_norm)
    ),
    "LARS without windows": lambda model: StructuredOptimizer(
        model,
        strategy=LARSStrategy(),
        hyperparameters={"lr": 0.01},
        combine_params=(_Copying(),),
    ),
}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("converted", [0, 1, 2])
@pytest.mark.parametrize("make", CONVERTED.values(), ids=CONVERTED)
def test_each_parameter_is_rounded_in_its_own_dtype(
    make: Any, converted: int, dtype: torch.dtype
) -> None:
    mixed, exact, low = _three_layers(), _three_layers(), _three_layers()
    for model in (exact, low):  # all start from the same values
        for p in model[converted].parameters():
            p.data = p.data.to(dtype).to(p.dtype)
    optimizers = [make(model) for model in (mixed, exact, low)]
    mixed[converted].to(dtype)
    low.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        starts = [p.detach().clone() for p in mixed.parameters()]
        for p, q, r in zip(*(m.parameters() for m in (mixed, exact, low)), strict=True):
            # gradients that all dtypes hold, and the same parameters in each step
            grad = torch.randn(p.shape, generator=generator).bfloat16().half().float()
            for parameter in (p, q, r):
                parameter.grad = grad.to(parameter.dtype)
        for model, start in ((exact, starts), (low, starts)):
            for p, value in zip(model.parameters(), start, strict=True):
                p.data.copy_(value)
        for optimizer in optimizers:
            optimizer.step()
        for i, layer in enumerate(mixed):
            expected = low[i] if i == converted else exact[i]
            for p, q in zip(layer.parameters(), expected.parameters(), strict=True):
                assert p.dtype == (dtype if i == converted else torch.float32)
                assert torch.equal(p, q)


def test_an_update_too_large_for_a_converted_layer_is_skipped() -> None:
    model: Any = _three_layers()
    optimizer = StructuredOptimizer(model, strategy=PlainDescent(), hyperparameters={"lr": 10.0})
    model[2].half()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    # its norm leaves the range of float16, and that of float32 by far not
    model[2].weight.grad.fill_(3e4)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match=r"2\.weight are too large"):
        optimizer.step()
    assert torch.equal(model[2].weight, before[4])
    assert not any(torch.equal(p, q) for p, q in zip(model[:2].parameters(), before, strict=False))
    assert optimizer.skipped == 1
