"""The optimizers of the scoreboard, and those of other packages in the same harness."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import structprecond
from structprecond import RECOMMENDED, Hyperball
from structprecond.core.plain import describe_object
from structprecond.roles import NOT_MATRICES, infer_roles


@dataclass(frozen=True)
class Entrant:
    """An optimizer with its settings, except for the learning rate and the momentum.

    Args:
        make: Makes the optimizer from a model, a learning rate, a momentum and the number of
            samples behind a gradient.
        lr: The recommended learning rate, where the search starts.
        momentum: The recommended momentum: of the first moment for Adam and its relatives.
        momenta: The other momenta to try.
        settings: The other settings, to tell results of older ones apart.
        seeds: The number of seeds with the best settings.
        package: The package that it comes from.
    """

    make: Callable[[nn.Module, float, float, int], Optimizer]
    lr: float
    momentum: float
    momenta: tuple[float, ...]
    settings: str
    seeds: int = 2
    package: str = "structprecond"

    @property
    def available(self) -> bool:
        """Whether its package is installed."""
        return importlib.util.find_spec(self.package) is not None


# which keyword is the momentum
_MOMENTUM = {"SIRFShampoo": "alpha1", "Muon": "momentum", "NorMuon": "momentum"}
_MOMENTUM |= {"Scion": "momentum", "LARS": "momentum", "PSGDKron": "momentum"}


def _ours(name: str, momenta: tuple[float, ...], seeds: int = 2, **more: Any) -> Entrant:
    """Return one of our optimizers with its recommended settings and some others."""
    optimizer: Any = getattr(structprecond, name)
    settings = RECOMMENDED[name] | more
    keyword = _MOMENTUM.get(name, "betas")
    usual = {k: p.default for k, p in inspect.signature(optimizer).parameters.items()} | settings
    momentum = usual["betas"][0] if keyword == "betas" else usual[keyword]

    def make(model: nn.Module, lr: float, momentum: float, samples: int) -> Optimizer:
        value = (momentum, usual["betas"][1]) if keyword == "betas" else momentum
        given = {**settings, "lr": lr, keyword: value}
        if name == "SIRFShampoo":
            given["batch_size"] = samples
        made: Optimizer = optimizer(model, **given)
        return made

    rest = {k: v for k, v in settings.items() if k not in ("lr", keyword)}
    default = inspect.signature(optimizer).parameters[keyword].default
    if keyword == "betas" and usual["betas"][1] != default[1]:
        rest["beta2"] = usual["betas"][1]
    shown = describe_object(rest)
    return Entrant(make, usual["lr"], momentum, momenta, shown, seeds)


def _torch_adamw(model: nn.Module, lr: float, momentum: float, samples: int) -> Optimizer:
    settings = RECOMMENDED["AdamW"] | {"lr": lr, "betas": (momentum, 0.95)}
    return torch.optim.AdamW(model.parameters(), **settings, fused=True)


class _TorchMuon(torch.optim.Optimizer):
    """torch's Muon for hidden matrices, and torch's AdamW for the rest, as torch recommends."""

    def __init__(self, model: nn.Module, lr: float, momentum: float) -> None:
        roles = infer_roles(model)
        named = dict(model.named_parameters())
        others = {n for n, p in named.items() if roles[n].role in NOT_MATRICES or p.ndim != 2}
        matrices = [p for n, p in named.items() if n not in others]
        groups = [
            {"params": matrices, "lr": lr, "muon": True},
            {"params": [named[n] for n in others], "lr": lr, "muon": False},
        ]
        super().__init__([g for g in groups if g["params"]], {})
        settings: dict[str, Any] = {"lr": lr, "weight_decay": 0.1}
        self._parts: list[tuple[dict[str, Any], Optimizer]] = []
        for group in self.param_groups:
            made: Optimizer
            if group["muon"]:
                made = torch.optim.Muon(
                    group["params"],
                    momentum=momentum,
                    nesterov=True,
                    adjust_lr_fn="match_rms_adamw",
                    **settings,
                )
            else:
                made = torch.optim.AdamW(group["params"], betas=(0.9, 0.95), fused=True, **settings)
            self._parts.append((group, made))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, part in self._parts:
            part.param_groups[0]["lr"] = group["lr"]
            part.step()


def _torch_muon(model: nn.Module, lr: float, momentum: float, samples: int) -> Optimizer:
    return _TorchMuon(model, lr, momentum)


def _heavyball(name: str, model: nn.Module, lr: float, momentum: float, samples: int) -> Optimizer:
    package = importlib.import_module("heavyball")
    settings: dict[str, Any] = {"lr": lr, "weight_decay": 0.1}
    if name == "SOAP":
        settings |= {"betas": (momentum, 0.95), "precondition_frequency": 2}
    else:
        settings |= {"betas": (momentum, 0.999)}
    made: Optimizer = getattr(package, name)(model.parameters(), **settings)
    return made


def _pytorch_optimizer(model: nn.Module, lr: float, momentum: float, samples: int) -> Optimizer:
    package = importlib.import_module("pytorch_optimizer")
    made: Optimizer = package.SOAP(
        model.parameters(),
        lr=lr,
        betas=(momentum, 0.95),
        weight_decay=0.1,
        precondition_frequency=2,
    )
    return made


def _sirfshampoo(model: nn.Module, lr: float, momentum: float, samples: int) -> Optimizer:
    package = importlib.import_module("sirfshampoo")
    made: Optimizer = package.SIRFShampoo(
        model, lr=lr, alpha1=momentum, beta2=0.1, lam=0.03, batch_size=samples
    )
    return made


def _peer(make: Callable[..., Optimizer], package: str, lr: float, settings: str) -> Entrant:
    return Entrant(make, lr, 0.9, (0.95,), settings, package=package)


BASELINE = "AdamW (torch)"
"""The optimizer whose loss is the target."""
RIVAL = "Muon (torch)"
"""The optimizer that the best one has to beat."""

_FINALISTS = 8

ENTRANTS: dict[str, Entrant] = {
    BASELINE: Entrant(
        _torch_adamw, 0.016, 0.9, (0.95,), "weight_decay 0.1, beta2 0.95", _FINALISTS, "torch"
    ),
    RIVAL: Entrant(
        _torch_muon, 0.032, 0.9, (0.95,), "weight_decay 0.1, match_rms", _FINALISTS, "torch"
    ),
    "SOAPMuon": _ours("SOAPMuon", (0.95,)),
    "SOAPMuon, kl": _ours("SOAPMuon", (0.95,), _FINALISTS, whitening="kl"),
    "Muon": _ours("Muon", (0.95,)),
    "KLShampoo": _ours("KLShampoo", (0.95,)),
    "KLShampoo, frequency 10": _ours(
        "KLShampoo", (0.95,), precondition_frequency=10, refresh="synchronous"
    ),
    "SOAP": _ours("SOAP", (0.95,)),
    "SOAP, frequency 10": _ours("SOAP", (0.95,), precondition_frequency=10, refresh="synchronous"),
    "SIRFShampoo": _ours("SIRFShampoo", (0.95,)),
    "SIRFShampoo, blocks of 32": _ours(
        "SIRFShampoo", (0.95,), structures={2: "block32diagonal", 4: "block32diagonal"}
    ),
    "SIRFShampoo, hierarchical": _ours(
        "SIRFShampoo", (0.95,), structures={2: "hierarchical32_32", 4: "hierarchical32_32"}
    ),
    "PSGDKron": _ours("PSGDKron", (0.95,)),
    "NorMuon": _ours("NorMuon", (0.9,)),
    "KLSOAP": _ours("KLSOAP", (0.95,)),
    "Shampoo": _ours("Shampoo", (0.95,)),
    "Scion": _ours("Scion", (0.95,)),
    "LARS": _ours("LARS", (0.95,)),
    "SOAP (heavyball)": _peer(
        partial(_heavyball, "SOAP"), "heavyball", 0.016, "weight_decay 0.1, frequency 2"
    ),
    "PSGD-Kron (heavyball)": _peer(
        partial(_heavyball, "PSGDKron"), "heavyball", 0.004, "weight_decay 0.1"
    ),
    "SOAP (pytorch_optimizer)": _peer(
        _pytorch_optimizer, "pytorch_optimizer", 0.016, "weight_decay 0.1, frequency 2"
    ),
    "SIRF-Shampoo (sirfshampoo)": _peer(_sirfshampoo, "sirfshampoo", 0.05, "beta2 0.1, lam 0.03"),
}
"""The entrants by name; a new one is one entry."""

_STRUCTURES: dict[str, Any] = {
    "dense": "dense",
    "one-sided": {2: ("dense", "none")},
    "block128diagonal": "block128diagonal",
    "block64diagonal": "block64diagonal",
    "block32diagonal": "block32diagonal",
    "block16diagonal": "block16diagonal",
    "diagonal": "diagonal",
}
_INTERVALS = {"SOAP": "precondition_frequency", "KLShampoo": "precondition_frequency"}
_INTERVALS |= {"SIRFShampoo": "T"}


def _variants(name: str, structures: dict[str, Any]) -> dict[str, Entrant]:
    """Return an optimizer with each structure, and with each refresh interval."""
    found = {}
    for label, structure in structures.items():
        more = {"structures": structure, "refresh": "staggered"}
        found[f"{name}, {label}"] = _ours(name, (), **more)
    for every in (1, 2, 5, 10, 20):
        more = {_INTERVALS[name]: every, "refresh": "staggered"}
        found[f"{name}, every {every}"] = _ours(name, (), **more)
    return found


VARIANTS: dict[str, Entrant] = {
    **_variants("SOAP", _STRUCTURES),
    **_variants("KLShampoo", _STRUCTURES),
    **_variants("SIRFShampoo", {**_STRUCTURES, "hierarchical32_32": "hierarchical32_32"}),
}
"""What structures and refresh intervals buy, at the recommended settings."""

WIDTHS = {
    "Muon": _ours("Muon", ()),
    "Muon, hyperball": _ours("Muon", (), policies={"muon": (Hyperball(),)}),
}
"""The optimizers whose learning rates are compared for models of several widths."""

KNOWN = {**ENTRANTS, **VARIANTS, **WIDTHS}
"""All of them by name."""
