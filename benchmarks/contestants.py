"""The contestants: our optimizers, and those of other packages with the same settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from structprecond import SOAP, AdamW, Muon, SIRFShampoo
from structprecond.linalg.polar import MatmulPrecision

Build = Callable[[nn.Module], torch.optim.Optimizer]
OURS = "structprecond"
BATCH_SIZE = 32
STRUCTURES = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz")


def _matrices_apart(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return Muon's parameters and the others, as our roles split them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    params = list(model.parameters())
    matrices = [p for p in params if p.ndim >= 2 and id(p) not in embeddings]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in params if id(p) not in chosen]


_MUON: dict[str, Any] = {"lr": 1e-3, "momentum": 0.95, "weight_decay": 0.1, "nesterov": True}


def our_muon(model: nn.Module, precision: MatmulPrecision = "highest") -> torch.optim.Optimizer:
    """Make Muon with torch's settings; the last linear layer is not a head here."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return Muon(
        model,
        coefficient_type="simple",
        scale_mode="shape_scaling",
        fp32_matmul_prec=precision,
        routes={f"{name}.weight": "muon" for name in linear[-1:]},
        **_MUON,
    )


class TorchMuon(torch.optim.Optimizer):
    """torch's Muon for matrices, in bfloat16 or float32, with torch's fused AdamW for the rest."""

    def __init__(self, model: nn.Module, float32: bool) -> None:
        matrices, rest = _matrices_apart(model)
        # torch's Muon takes only matrices; these views share the convolutions' memory
        self.views = [nn.Parameter(p.detach().flatten(1)) for p in matrices]
        self.matrices, self.float32 = matrices, float32
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(self.views, **_MUON)]
        if rest:
            self.parts.append(torch.optim.AdamW(rest, fused=True))
        super().__init__(matrices, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for view, p in zip(self.views, self.matrices, strict=True):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        module: Any = importlib.import_module("torch.optim._muon")
        iterate = module._zeropower_via_newtonschulz
        if self.float32:
            module._zeropower_via_newtonschulz = lambda g, *args: iterate(_Float32(g), *args)
        try:
            for part in self.parts:
                part.step()
        finally:
            module._zeropower_via_newtonschulz = iterate
        self.state.update({k: v for part in self.parts for k, v in part.state.items()})


class _Float32:
    """A tensor that stays in float32 where torch's Muon converts it to bfloat16."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def bfloat16(self) -> torch.Tensor:
        return self.tensor.clone()

    def size(self, axis: int) -> int:
        return self.tensor.size(axis)


def _heavyball(name: str, **kwargs: Any) -> Build:
    def build(model: nn.Module) -> torch.optim.Optimizer:
        package = importlib.import_module("heavyball")
        made: torch.optim.Optimizer = getattr(package, name)(model.parameters(), **kwargs)
        return made

    return build


def _pytorch_optimizer_soap(model: nn.Module, **kwargs: Any) -> torch.optim.Optimizer:
    package = importlib.import_module("pytorch_optimizer")
    made: torch.optim.Optimizer = package.SOAP(model.parameters(), **kwargs)
    return made


def _pytorch_optimizer_muon(model: nn.Module) -> torch.optim.Optimizer:
    package = importlib.import_module("pytorch_optimizer")
    matrices, rest = _matrices_apart(model)
    groups = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
    made: torch.optim.Optimizer = package.Muon([g for g in groups if g["params"]], **_MUON)
    return made


def _sirfshampoo(structure: str) -> Build:
    """Return the package's optimizer with the structures of the package `singd`.

    The release on the package index supports only dense factors; a class attribute adds the others.
    """

    def build(model: nn.Module) -> torch.optim.Optimizer:
        from singd.structures.blockdiagonal import Block30DiagonalMatrix
        from singd.structures.diagonal import DiagonalMatrix
        from singd.structures.hierarchical import Hierarchical15_15Matrix
        from singd.structures.triltoeplitz import TrilToeplitzMatrix
        from sirfshampoo.optimizer import SIRFShampoo as Published

        class WithStructures(Published):  # type: ignore[misc]
            SUPPORTED_STRUCTURES = Published.SUPPORTED_STRUCTURES | {
                "diagonal": DiagonalMatrix,
                "block30diagonal": Block30DiagonalMatrix,
                "hierarchical15_15": Hierarchical15_15Matrix,
                "triltoeplitz": TrilToeplitzMatrix,
            }

        made: torch.optim.Optimizer = WithStructures(
            model, lr=1e-3, beta2=0.01, batch_size=BATCH_SIZE, structures=structure
        )
        return made

    return build


def _sirf(structure: str) -> dict[str, Build]:
    ours = partial(SIRFShampoo, lr=1e-3, beta2=0.01, batch_size=BATCH_SIZE, structures=structure)
    return {OURS: ours, "sirfshampoo": _sirfshampoo(structure)}


_SOAP: dict[str, Any] = {"lr": 3e-3, "precondition_frequency": 10}

RACES: Mapping[str, Mapping[str, Build]] = {
    "soap": {
        OURS: partial(SOAP, **_SOAP),
        "structprecond, staggered": partial(SOAP, refresh="staggered", **_SOAP),
        # its defaults skip axes above 2048 and merge those of convolutions
        "heavyball": _heavyball("SOAP", max_precond_dim=10000, merge_dims=False, **_SOAP),
        "pytorch_optimizer": partial(_pytorch_optimizer_soap, **_SOAP),
    },
    "muon, float32": {
        OURS: our_muon,
        "torch": partial(TorchMuon, float32=True),
    },
    "muon, bfloat16": {
        OURS: partial(our_muon, precision="medium"),
        "torch": partial(TorchMuon, float32=False),
        "pytorch_optimizer": _pytorch_optimizer_muon,
        "heavyball": _heavyball("Muon", lr=3e-3),
    },
    "adamw": {
        OURS: AdamW,
        "torch, foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
        "torch, fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    },
    **{f"sirf-shampoo {structure}": _sirf(structure) for structure in STRUCTURES},
}
"""The contestants of each race by name; ours come first."""
