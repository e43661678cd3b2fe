"""SOAP-Muon against Muon without whitening, and against exact polar factors with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import MatchRMS, Muon, SOAPMuon, StructPrecondError, describe

SHAPES = [(6, 4), (4, 6), (5, 5)]
LR = 0.1


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False) for o, i in SHAPES]
    # the last linear layer is the head
    return nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), *layers, nn.Linear(5, 2)).double()


def set_grads(model: nn.Module, step: int) -> None:
    torch.manual_seed(step + 1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)


@pytest.mark.parametrize("whitening", ["soap", "kl"])
def test_without_whitening_it_is_muon(whitening: Any) -> None:
    ours, reference = model(), model()
    settings: dict[str, Any] = {
        "lr": LR,
        "weight_decay": 0.0,
        "adamw_weight_decay": 0.0,
        "adamw_betas": (0.8, 0.9),
        "nesterov": True,
        "coefficient_type": "quintic",
        "policies": (MatchRMS(0.2),),
    }
    # an epsilon far above all second moments divides all entries alike
    soap = SOAPMuon(
        ours,
        whitening=whitening,
        betas=(0.9, 0.95),
        eps=1e30,
        precondition_frequency=2,
        **settings,
    )
    muon = Muon(reference, momentum=0.9, **settings)
    set_grads(ours, -1)
    soap.step()  # only initializes hidden matrices
    reference.load_state_dict(ours.state_dict())
    for p in [*muon.param_groups[0]["params"]][-2:]:  # the head's AdamW is one step ahead
        p.requires_grad_(False)
    for step in range(6):
        set_grads(ours, step)
        set_grads(reference, step)
        soap.step()
        muon.step()
        for p, q in list(zip(ours.parameters(), reference.parameters(), strict=True))[:-2]:
            assert (p - q).norm() < 1e-6 * q.norm()


def _polar(matrix: Tensor) -> Tensor:
    U, _, V = torch.linalg.svd(matrix, full_matrices=False)
    return U @ V


@pytest.mark.parametrize("nesterov", [True, False])
# the first whitened momentum consists of signs, and may be singular if it is square
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_the_whitened_momentum_is_orthogonalized_in_the_eigenbasis(
    shape: tuple[int, int], nesterov: bool
) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False), nn.Linear(shape[0], 1))
    p = next(layer.double().parameters())
    optimizer = SOAPMuon(
        layer,
        lr=LR,
        weight_decay=0.1,
        nesterov=nesterov,
        betas=(0.9, 0.8),
        precondition_frequency=10**6,
        num_ns_steps=30,
    )
    p.grad = torch.randn_like(p)
    optimizer.step()
    left, right = (optimizer.state[p][f"bases.{axis}.mat"] for axis in (0, 1))
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    expected = p.detach().clone()
    for _ in range(5):
        p.grad = torch.randn_like(p)
        G = left.mT @ p.grad @ right
        m, v = 0.9 * m + 0.1 * G, 0.8 * v + 0.2 * G**2
        D = left @ _polar((0.9 * m + 0.1 * G if nesterov else m) / v.sqrt()) @ right.mT
        D = D * 0.2 / D.square().mean().sqrt()
        expected = (expected - LR * D) * (1 - LR * 0.1)
        optimizer.step()
        assert (p - expected).norm() < 1e-6 * expected.norm()


def test_kl_whitening_divides_by_the_eigenvalues() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 1)).double()
    p = next(layer.parameters())
    optimizer = SOAPMuon(
        layer, lr=LR, whitening="kl", weight_decay=0.0, num_ns_steps=30, nesterov=False
    )
    for _ in range(4):
        p.grad = torch.randn_like(p)
        optimizer.step()
    before, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    p.grad = torch.randn_like(p)
    optimizer.step()
    left, right = (state[f"bases.{axis}.mat"] for axis in (0, 1))
    m = 0.9 * state["exp_avg"] + 0.1 * (left.mT @ p.grad @ right)
    roots = state["eigenvalues.0"][:, None] ** -0.5 * state["eigenvalues.1"] ** -0.5
    D = left @ _polar(m * roots) @ right.mT
    D = D * 0.2 / D.square().mean().sqrt()
    torch.testing.assert_close(p.detach(), before - LR * D, rtol=1e-6, atol=1e-8)


def test_only_hidden_matrices_are_orthogonalized() -> None:
    network = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 9))
    rows = describe(SOAPMuon(network)).rows
    own = {name for row in rows if row.strategy == "SOAPMuonStrategy" for name in row.names}
    assert own == {"1.weight"}
    rows = describe(SOAPMuon(network, whitening="kl", structures="block2diagonal")).rows
    assert {r.structures for r in rows if r.strategy == "KLMuonStrategy"} == {
        ("block2diagonal", "block2diagonal")
    }


def test_unknown_whitening_is_refused() -> None:
    with pytest.raises(StructPrecondError, match="whitening"):
        SOAPMuon(nn.Linear(3, 2), whitening="shampoo")  # type: ignore[arg-type]
    with pytest.raises(StructPrecondError, match="fp32_matmul_prec"):
        SOAPMuon(nn.Linear(3, 2), fp32_matmul_prec="low")  # type: ignore[arg-type]
