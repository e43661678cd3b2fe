"""SOAP against recorded trajectories, Adam, and itself in other coordinates."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from structprecond import (
    KLSOAP,
    SOAP,
    KLShampoo,
    PerParameter,
    Shampoo,
    StructPrecondError,
    StructureError,
)
from tests import golden


@pytest.mark.parametrize("name", golden.names("soap_"))
def test_reproduces_the_published_trajectory(name: str) -> None:
    recorded = golden.load(name)
    model = recorded.model()
    kwargs = recorded.kwargs
    if "betas" in kwargs:
        kwargs["betas"] = tuple(kwargs["betas"])
    optimizer = SOAP(model.parameters(), **kwargs)
    assert recorded.replay(model, optimizer) < 1e-4


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, grads: list[Tensor]) -> None:
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad.clone().to(p.dtype)
    optimizer.step()


def _gradients(model: nn.Module, steps: int) -> list[list[Tensor]]:
    return [[torch.randn_like(p) for p in model.parameters()] for _ in range(steps)]


def _distance(actual: Tensor, expected: Tensor) -> float:
    return float(((actual - expected).norm() / expected.norm()).detach())


@pytest.mark.parametrize("structure", ["diagonal", "none"])
def test_without_rotated_axes_it_is_adam_after_the_skipped_first_step(structure: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Conv2d(2, 3, 2)).double()
    reference = copy.deepcopy(model)
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.97), "eps": 1e-30}
    ours = SOAP(model.parameters(), structures=structure, weight_decay=0.0, **settings)
    adam = torch.optim.Adam(reference.parameters(), **settings)
    first, *rest = _gradients(model, 40)
    _step(model, ours, first)
    for grads in rest:
        _step(model, ours, grads)
        _step(reference, adam, grads)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert _distance(p, q) < 1e-9


def _orthogonal(n: int) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]


def test_a_rotated_quadratic_from_a_rotated_start_gives_the_rotated_trajectory() -> None:
    # square, since the basis of a null space depends on the axes
    A, B = (torch.randn(5, 5, dtype=torch.float64) for _ in range(2))
    U, V = _orthogonal(5), _orthogonal(5)
    plain = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))
    rotated = nn.Parameter(U @ plain.detach() @ V.mT)
    optimizers = [SOAP([p], lr=0.02, precondition_frequency=3) for p in (plain, rotated)]
    for _ in range(30):
        # changes, as a second gradient like the first one has zeros in its basis, and Adam divides
        # their rounding errors by eps
        C = torch.randn(5, 5, dtype=torch.float64)
        losses = [
            (A @ plain @ B - C).square().sum(),
            (A @ (U.mT @ rotated @ V) @ B - C).square().sum(),
        ]
        for p, loss, optimizer in zip((plain, rotated), losses, optimizers, strict=True):
            (p.grad,) = torch.autograd.grad(loss, p)
            optimizer.step()
        assert _distance(rotated, U @ plain @ V.mT) < 1e-11


def test_permuting_output_neurons_permutes_the_trajectory() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    permuted = nn.Parameter(plain.detach()[order].clone())
    optimizers = [SOAP([p], lr=0.05, precondition_frequency=2) for p in (plain, permuted)]
    for _ in range(20):
        grad = torch.randn(5, 4, dtype=torch.float64)
        plain.grad, permuted.grad = grad.clone(), grad[order].clone()
        for optimizer in optimizers:
            optimizer.step()
        assert _distance(permuted, plain[order]) < 1e-6


def test_a_unit_in_a_stack_of_50_equals_the_unit_alone() -> None:
    stack = [nn.Parameter(torch.randn(6, 4, dtype=torch.float64)) for _ in range(50)]
    copies = [nn.Parameter(p.detach().clone()) for p in stack]
    together = SOAP(stack, lr=0.02, precondition_frequency=3)
    alone = [SOAP([p], lr=0.02, precondition_frequency=3) for p in copies]
    for _ in range(15):
        for i, (p, q) in enumerate(zip(stack, copies, strict=True)):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            alone[i].step()
        together.step()
    assert max(_distance(p, q) for p, q in zip(stack, copies, strict=True)) < 1e-9


class _Products(TorchDispatchMode):
    """Counts matrix products; a batched product counts once."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.count += name in ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")
        return func(*args, **(kwargs or {}))


def test_an_ordinary_step_takes_six_matrix_products_per_bucket() -> None:
    model = nn.ModuleList([nn.Linear(8, 6, bias=False) for _ in range(5)])
    optimizer = SOAP(model, precondition_frequency=4)
    counts = []
    for grads in _gradients(model, 10):
        with _Products() as products:
            _step(model, optimizer, grads)
        counts.append(products.count)
    # step 0 initializes (2 outer products, 1 more for the basis of the short axis, 3 to complete
    # that of the long one); every 4th update turns the first moment into the new bases (4) and
    # takes one product for each basis (2)
    assert counts == [6, 6, 6, 6, 12, 6, 6, 6, 12, 6]


def _low_rank(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape[0], 1) @ torch.randn(1, shape[1])


_HARD_GRADIENTS = {
    "rank 1": lambda shape: _low_rank(shape),
    "exact zeros": lambda shape: torch.zeros(shape),
    "a dead row": lambda shape: torch.randn(shape) * (torch.arange(shape[0]) > 0)[:, None],
    "1e-20": lambda shape: 1e-20 * torch.randn(shape),
    "1e+10": lambda shape: 1e10 * torch.randn(shape),
    "zeros, then not": lambda shape: torch.randn(shape) * float(torch.rand(()) > 0.9),
}


@pytest.mark.parametrize("structures", ["dense", "block4diagonal"])
@pytest.mark.parametrize("kind", _HARD_GRADIENTS)
def test_hard_gradients_give_finite_bounded_updates_and_orthogonal_bases(
    kind: str, structures: str
) -> None:
    p = nn.Parameter(torch.randn(12, 7))
    optimizer = SOAP([p], lr=0.01, weight_decay=0.0, structures=structures)
    for _ in range(200):
        before = p.detach().clone()
        p.grad = _HARD_GRADIENTS[kind](p.shape)
        optimizer.step()
        # Adam's update of one entry is at most about (1 - b1) / sqrt(1 - b2) / (1 - b1^t) ...
        assert p.isfinite().all()
        assert (p - before).norm() <= 0.01 * 25 * p.numel() ** 0.5
    for basis in optimizer.buckets[0].state.bases:  # type: ignore[attr-defined]
        Q = basis[0].to_dense()
        assert (Q.mT @ Q - torch.eye(Q.shape[-1])).abs().max() < 1e-5


def test_bfloat16_parameters_follow_float32_ones() -> None:
    exact = nn.Parameter(torch.randn(8, 6).bfloat16().float())
    rounded = nn.Parameter(exact.detach().bfloat16())
    optimizers = [SOAP([p], lr=1e-2, weight_decay=0.0) for p in (exact, rounded)]
    for _ in range(20):
        before, start = exact.detach().clone(), rounded.detach().float()
        exact.grad = torch.randn(8, 6).bfloat16().float()
        rounded.grad = exact.grad.bfloat16()
        for optimizer in optimizers:
            optimizer.step()
        # rounded once, in the result
        expected = start + (exact.detach() - before)
        assert ((rounded.float() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()
    state = optimizers[1].state[rounded]
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    assert torch.equal(state["exp_avg_sq"], optimizers[0].state[exact]["exp_avg_sq"])


def test_merging_is_the_same_as_reshaping_the_parameter() -> None:
    conv, expert = torch.randn(6, 4, 3, 3).double(), torch.randn(2, 5, 4).double()
    params = [nn.Parameter(conv), nn.Parameter(expert)]
    shapes = [(24, 9), (10, 4)]
    pairs = zip((conv, expert), shapes, strict=True)
    reshaped = [nn.Parameter(t.reshape(shape).clone()) for t, shape in pairs]
    merged = SOAP(params, lr=0.02, merge_dims=True, max_precond_dim=36, precondition_frequency=2)
    plain = SOAP(reshaped, lr=0.02, precondition_frequency=2)
    for _ in range(8):
        for p, q in zip(params, reshaped, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.view(q.shape).clone()
        merged.step()
        plain.step()
    for p, q in zip(params, reshaped, strict=True):
        assert torch.equal(p.view(q.shape), q)


def test_channels_last_merging_gives_the_transposed_trajectory() -> None:
    first = nn.Parameter(torch.randn(6, 4, 3, 2, dtype=torch.float64))
    last = nn.Parameter(first.detach().permute(0, 2, 3, 1).contiguous())
    settings: dict[str, Any] = {
        "lr": 0.02,
        "merge_dims": True,
        "max_precond_dim": 24,
        "precondition_frequency": 2,
    }
    optimizers = [SOAP([first], **settings), SOAP([last], data_format="channels_last", **settings)]
    for _ in range(12):
        first.grad = torch.randn_like(first)
        last.grad = first.grad.permute(0, 2, 3, 1).contiguous()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(last.permute(0, 3, 1, 2), first)


@pytest.mark.parametrize("merge_dims", [False, True])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (3, 5, 4), (1, 7), (), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_every_order_train(
    shape: tuple[int, ...], dtype: torch.dtype, merge_dims: bool
) -> None:
    target = torch.randn(shape)
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = SOAP([p], lr=0.1, weight_decay=0.0, merge_dims=merge_dims, max_precond_dim=40)
    for _ in range(60):
        optimizer.zero_grad()
        (p - target).square().sum().backward()
        optimizer.step()
    assert (p.float() - target).square().sum() <= 0.1 * target.square().sum()


def test_one_sided_soap_rotates_one_axis() -> None:
    p = nn.Parameter(torch.randn(6, 4))
    optimizer = SOAP([p], structures={2: ("dense", "none")})
    names = set(optimizer.state[p])
    assert {"factors.0.mat", "bases.0.mat"} <= names
    assert not any(name.startswith(("factors.1", "bases.1")) for name in names)


def test_blocks_on_one_axis_are_independent_problems() -> None:
    whole = nn.Parameter(torch.randn(8, 5, dtype=torch.float64))
    parts = [nn.Parameter(whole.detach()[i : i + 4].clone()) for i in (0, 4)]
    settings: dict[str, Any] = {"lr": 0.02, "precondition_frequency": 2}
    together = SOAP([whole], structures={2: ("block4diagonal", "none")}, **settings)
    apart = SOAP(parts, structures={2: ("dense", "none")}, **settings)
    for _ in range(12):
        whole.grad = torch.randn_like(whole)
        for part, i in zip(parts, (0, 4), strict=True):
            part.grad = whole.grad[i : i + 4].clone()
        together.step()
        apart.step()
    assert _distance(torch.cat([p.detach() for p in parts]), whole.detach()) < 1e-9


@pytest.mark.parametrize("make", [SOAP, KLSOAP, KLShampoo, Shampoo])
@pytest.mark.parametrize("structure", ["triltoeplitz", "hierarchical2_2", "triutopleftdiag"])
def test_structures_without_an_eigenbasis_raise_and_list_what_works(make, structure: str) -> None:
    message = f"cannot use the structure '{structure}', given for .*dense, diagonal, block<k>diag"
    with pytest.raises(StructureError, match=message):
        make([nn.Parameter(torch.zeros(3, 4))], structures=structure)


def test_merge_dims_beside_combine_params_raises() -> None:
    with pytest.raises(StructPrecondError, match="Put MergeDims into combine_params"):
        SOAP(nn.Linear(2, 3), merge_dims=True, combine_params=(PerParameter(),))


def _refreshed_steps(optimizer: SOAP, params: list[nn.Parameter], steps: int) -> Tensor:
    """Return whether each parameter's bases changed at each step, `(steps, params)`."""
    changed = []
    for _ in range(steps):
        before = [optimizer.state[p]["bases.0.mat"].clone() for p in params]
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        pairs = zip(params, before, strict=True)
        changed.append([not torch.equal(optimizer.state[p]["bases.0.mat"], q) for p, q in pairs])
    return torch.tensor(changed)


@pytest.mark.parametrize("count", [3, 10, 23])
def test_staggered_rows_take_turns(count: int) -> None:
    params = [nn.Parameter(torch.randn(6, 5)) for _ in range(count)]
    optimizer = SOAP(params, precondition_frequency=5, refresh="staggered")
    _refreshed_steps(optimizer, params, 1)  # initializes
    refreshed = _refreshed_steps(optimizer, params, 20)
    for start in range(0, 20, 5):
        assert (refreshed[start : start + 5].sum(0) == 1).all()
    assert (refreshed.sum(1) <= -(-count // 5)).all()


def test_synchronous_rows_are_refreshed_together() -> None:
    params = [nn.Parameter(torch.randn(6, 5)) for _ in range(4)]
    optimizer = SOAP(params, precondition_frequency=5)
    _refreshed_steps(optimizer, params, 1)
    expected = torch.tensor([(step + 1) % 5 == 0 for step in range(20)])
    assert torch.equal(_refreshed_steps(optimizer, params, 20), expected[:, None].expand(20, 4))


def test_a_callable_interval_gets_the_global_step() -> None:
    params, asked = [nn.Parameter(torch.randn(6, 5))], []

    def when(step: int) -> bool:
        asked.append(step)
        return step in (3, 4)

    optimizer = SOAP(params, precondition_frequency=when)
    refreshed = _refreshed_steps(optimizer, params, 7)
    assert asked == list(range(7))
    assert refreshed[1:, 0].tolist() == [False, False, True, True, False, False]


def test_bases_within_the_tolerance_are_not_refreshed() -> None:
    stable = nn.Parameter(torch.randn(4, 3))
    moving = nn.Parameter(torch.randn(4, 3))
    optimizer = SOAP([stable, moving], precondition_frequency=1, refresh_tolerance=0.05)
    grad = torch.randn(4, 3)
    changed = []
    for _ in range(6):
        before = [optimizer.state[p]["bases.1.mat"].clone() for p in (stable, moving)]
        stable.grad, moving.grad = grad.clone(), torch.randn(4, 3)
        optimizer.step()
        pairs = zip((stable, moving), before, strict=True)
        changed.append([not torch.equal(optimizer.state[p]["bases.1.mat"], q) for p, q in pairs])
    assert [c[0] for c in changed] == [True] + [False] * 5
    assert all(c[1] for c in changed)


@pytest.mark.parametrize("make", [SOAP, KLShampoo])
def test_a_row_that_missed_a_refresh_before_its_first_gradient_needs_none(make) -> None:
    early, late = (nn.Parameter(torch.randn(6, 5)) for _ in range(2))
    optimizer = make([early, late], precondition_frequency=lambda step: step in (1, 5))
    bases = []
    for step in range(7):
        early.grad = torch.randn(6, 5)
        # the first gradient comes after the refresh of step 1
        late.grad = torch.randn(6, 5) if step >= 3 else None
        optimizer.step()
        bases.append(optimizer.state[late]["bases.0.mat"].clone())
    changed = [not torch.equal(*pair) for pair in pairwise(bases)]
    # found at step 3, and refreshed at step 5
    assert changed == [False, False, True, False, True, False]


@pytest.mark.parametrize("structures", ["dense", "block3diagonal"])
def test_the_tolerance_decides_alike_at_any_scale_of_gradients(structures: str) -> None:
    def refreshed(scale: float) -> list[bool]:
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(6, 5))
        optimizer = SOAP(
            [p], precondition_frequency=1, refresh_tolerance=0.1, structures=structures
        )
        grad, changed = torch.randn(6, 5), []
        for step in range(16):
            before = optimizer.state[p][name].clone()
            # the same gradient, except for a few outliers
            p.grad = scale * (torch.randn(6, 5) if step % 5 == 2 else grad)
            optimizer.step()
            changed.append(not torch.equal(before, optimizer.state[p][name]))
        return changed

    name = "bases.0.mat" if structures == "dense" else "bases.0.blocks"
    expected = refreshed(1.0)
    assert {*expected[1:]} == {True, False}
    for scale in (1e-12, 1e12):
        assert refreshed(scale) == expected


def test_transport_carries_the_second_moment_by_the_squared_overlap() -> None:
    p = nn.Parameter(torch.randn(5, 4, dtype=torch.float64))
    optimizer = SOAP([p], transport=True, precondition_frequency=3)
    for _ in range(4):  # the last update is the third, which refreshes
        state = {name: t.clone() for name, t in optimizer.state[p].items()}
        p.grad = torch.randn_like(p)
        grad = p.grad.clone()
        optimizer.step()
    old = [state[f"bases.{k}.mat"] for k in (0, 1)]
    new = [optimizer.state[p][f"bases.{k}.mat"] for k in (0, 1)]
    v = 0.95 * state["exp_avg_sq"] + 0.05 * (old[0].mT @ grad @ old[1]).square()
    overlap = [(a.mT @ b).square() for a, b in zip(old, new, strict=True)]
    assert _distance(optimizer.state[p]["exp_avg_sq"], overlap[0].mT @ v @ overlap[1]) < 1e-12


def test_the_first_step_can_move() -> None:
    p = nn.Parameter(torch.zeros(5, 4, dtype=torch.float64))
    optimizer = SOAP([p], lr=0.01, skip_first=False)
    p.grad = torch.randn(5, 4, dtype=torch.float64)
    optimizer.step()
    # in its eigenbasis, the first gradient is diagonal, and Adam takes the signs of its entries
    U, _, V = torch.linalg.svd(p.grad, full_matrices=False)
    assert _distance(p.detach(), -0.01 * U @ V) < 1e-3


def test_clipping_survives_an_outlier() -> None:
    def losses(clip_rms: float | None, outlier: bool) -> list[float]:
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(8, 6))
        target = torch.randn(8, 6)
        optimizer = SOAP([p], lr=0.02, weight_decay=0.0, clip_rms=clip_rms)
        result = []
        for step in range(100):
            loss = (p - target).square().mean()
            result.append(loss.item())
            optimizer.zero_grad()
            (loss + 0.05 * (torch.randn(8, 6) * p).sum()).backward()
            if outlier and step == 50:
                p.grad = 1e5 * torch.randn(8, 6)
            optimizer.step()
        return result

    undisturbed, clipped = losses(3.0, False), losses(3.0, True)
    assert clipped[60] < 1.5 * undisturbed[50]
    assert losses(None, True)[60] > 2 * clipped[60] or losses(None, True)[99] > clipped[99]


@pytest.mark.parametrize(("shampoo_beta", "decay"), [(-1, 0.8), (0.0, 0.0), (0.3, 0.3)])
def test_decay_of_the_factors(shampoo_beta: float, decay: float) -> None:
    p = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    optimizer = SOAP([p], betas=(0.9, 0.8), shampoo_beta=shampoo_beta)
    left, right = torch.zeros(4, 4).double(), torch.zeros(3, 3).double()
    for _ in range(3):
        p.grad = torch.randn_like(p)
        left = decay * left + (1 - decay) * p.grad @ p.grad.mT
        right = decay * right + (1 - decay) * p.grad.mT @ p.grad
        optimizer.step()
        assert torch.allclose(optimizer.state[p]["factors.0.mat"], left)
        assert torch.allclose(optimizer.state[p]["factors.1.mat"], right)


@pytest.mark.parametrize("make", [SOAP, KLSOAP])
def test_nesterov_momentum_in_fixed_bases(make: Any) -> None:
    p = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    beta1, beta2, lr = 0.9, 0.8, 0.1
    settings: dict[str, Any] = {"policies": ()} if make is KLSOAP else {}
    optimizer = make(
        [p], lr=lr, betas=(beta1, beta2), weight_decay=0.0, eps=1e-3, nesterov=True,
        precondition_frequency=10**6, **settings,
    )  # fmt: skip
    p.grad = torch.randn_like(p)
    optimizer.step()
    left, right = (optimizer.state[p][f"bases.{axis}.mat"] for axis in (0, 1))
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    expected = p.detach().clone()
    for t in range(1, 6):
        p.grad = torch.randn_like(p)
        G = left.mT @ p.grad @ right
        m, v = beta1 * m + (1 - beta1) * G, beta2 * v + (1 - beta2) * G**2
        D = left @ ((beta1 * m + (1 - beta1) * G) / (v.sqrt() + 1e-3)) @ right.mT
        corrected = (1 - beta2**t) ** 0.5 / (1 - beta1 ** (t + 1)) if make is SOAP else 1.0
        expected = expected - lr * corrected * D
        optimizer.step()
        assert _distance(p, expected) < 1e-12
