"""The contestants: our optimizers, and those of other packages with the same settings."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from structprecond import SOAP, AdamW, Muon, Shampoo, SIRFShampoo
from structprecond.errors import StructPrecondError
from structprecond.linalg.polar import MatmulPrecision

Build = Callable[[nn.Module], torch.optim.Optimizer]
OURS = "structprecond"
BATCH_SIZE = 32
STRUCTURES = ("dense", "diagonal", "block30diagonal", "hierarchical15_15", "triltoeplitz")


def _matrices_apart(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return Muon's parameters and the others, as our roles split them."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return _apart(model, lambda p: p.ndim >= 2 and id(p) not in embeddings)


def _apart(
    model: nn.Module, chosen: Callable[[nn.Parameter], bool]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the chosen parameters and the others."""
    params = list(model.parameters())
    return [p for p in params if chosen(p)], [p for p in params if not chosen(p)]


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


class _WithAdamW(torch.optim.Optimizer):
    """Another package's optimizer for some parameters, with torch's fused AdamW for the rest."""

    def __init__(self, main: torch.optim.Optimizer, rest: Sequence[nn.Parameter]) -> None:
        self.parts = [main, *([torch.optim.AdamW(rest, fused=True)] if rest else [])]
        super().__init__([p for part in self.parts for p in _params(part)], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def _params(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


class TorchMuon(_WithAdamW):
    """torch's Muon for matrices, in bfloat16 or float32, with torch's fused AdamW for the rest."""

    def __init__(self, model: nn.Module, float32: bool) -> None:
        matrices, rest = _matrices_apart(model)
        # torch's Muon takes only matrices; these views share the convolutions' memory
        self.views = [nn.Parameter(p.detach().flatten(1)) for p in matrices]
        self.matrices, self.float32 = matrices, float32
        super().__init__(torch.optim.Muon(self.views, **_MUON), rest)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for view, p in zip(self.views, self.matrices, strict=True):
            view.grad = None if p.grad is None else p.grad.flatten(1)
        module: Any = importlib.import_module("torch.optim._muon")
        iterate = module._zeropower_via_newtonschulz
        if self.float32:
            module._zeropower_via_newtonschulz = lambda g, *args: iterate(_Float32(g), *args)
        try:
            super().step()
        finally:
            module._zeropower_via_newtonschulz = iterate


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
_SHAMPOO: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "precondition_frequency": 10}

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
    "shampoo": {OURS: partial(Shampoo, **_SHAMPOO)},
    **{f"sirf-shampoo {structure}": _sirf(structure) for structure in STRUCTURES},
}
"""The contestants of each race by name; ours come first."""


# --- packages in local checkouts -----------------------------------------------------------------

LONGEST = 10000
"""The longest axis with a Kronecker factor, as in our defaults."""


def _factored_apart(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters whose axes all get factors, and the others."""
    return _apart(model, lambda p: p.ndim >= 2 and max(p.shape) <= LONGEST)


def _distributed_shampoo(model: nn.Module, soap: bool) -> torch.optim.Optimizer:
    package = importlib.import_module("distributed_shampoo")
    factored, rest = _factored_apart(model)
    kind: dict[str, Any]
    if soap:
        kind = {"preconditioner_config": package.DefaultSOAPConfig, "betas": (0.95, 0.95)}
    else:
        kind = {"grafting_config": package.AdamPreconditionerConfig(beta2=0.95, epsilon=1e-8)}
    settings = (_SOAP if soap else _SHAMPOO) | kind
    made = package.DistributedShampoo(
        factored,
        max_preconditioner_dim=LONGEST,
        # its default merges the axes of small matrices into one
        distributed_config=package.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=math.inf
        ),
        **settings,
    )
    return _WithAdamW(made, rest)


def _emerging_muon(model: nn.Module, precision: MatmulPrecision) -> torch.optim.Optimizer:
    package = importlib.import_module("emerging_optimizers.orthogonalized_optimizers")
    matrices, rest = _matrices_apart(model)
    made = package.Muon(
        matrices,
        coefficient_type="simple",
        scale_mode="shape_scaling",
        fp32_matmul_prec=precision,
        # its Triton kernel computes in bfloat16
        use_syrk=matrices[0].is_cuda and precision == "medium",
        **_MUON,
    )
    return _WithAdamW(made, rest)


def _dion_muon(model: nn.Module) -> torch.optim.Optimizer:
    package = importlib.import_module("dion")
    matrices, rest = _matrices_apart(model)
    settings = {"mu" if key == "momentum" else key: value for key, value in _MUON.items()}
    groups: list[dict[str, Any]] = [{"params": matrices}]
    groups += [{"params": rest, "algorithm": "adamw"}] if rest else []
    made: torch.optim.Optimizer = package.Muon(
        groups,
        flatten=True,
        use_triton=matrices[0].is_cuda,
        **settings,
    )
    return made


def _dash(model: nn.Module) -> torch.optim.Optimizer:
    package = importlib.import_module("ista_daslab_optimizers.dash")
    factored, rest = _factored_apart(model)
    beta1, beta2 = _SHAMPOO["betas"]
    # it wants blocks that divide an axis of each matrix, of at most 1024 as published
    rows = math.gcd(*(p.shape[0] for p in factored))
    block = max(n for n in range(1, 1025) if rows % n == 0)
    config = package.DashConfig(
        beta_G=beta1,
        beta_LR=beta2,
        beta_graft=beta2,
        inv_root_freq=_SHAMPOO["precondition_frequency"],
        block_size=block,
        # the more accurate of the two root methods that it proposes, with its own scaling
        inv_root_method=package.DashInverseRootMethodType.NDB,
        matrix_scaling_type=package.DashMatrixScalingType.POWER_ITER_MULTI,
    )
    made = package.DashGpu(factored, lr=_SHAMPOO["lr"], weight_decay=0.0, config=config)
    return _WithAdamW(made, rest)


@dataclass(frozen=True)
class Peer:
    """A package that is raced from a local checkout.

    Args:
        repository: Where it is on GitHub.
        module: What is imported from the checkout.
        builds: What it contributes to races.
    """

    repository: str
    module: str
    builds: Mapping[str, Build]


PEERS: Mapping[str, Peer] = {
    "distributed-shampoo": Peer(
        "facebookresearch/optimizers",
        "distributed_shampoo",
        {
            "soap": partial(_distributed_shampoo, soap=True),
            "shampoo": partial(_distributed_shampoo, soap=False),
        },
    ),
    "emerging-optimizers": Peer(
        "NVIDIA-NeMo/Emerging-Optimizers",
        "emerging_optimizers.orthogonalized_optimizers",
        {
            "muon, float32": partial(_emerging_muon, precision="highest"),
            "muon, bfloat16": partial(_emerging_muon, precision="medium"),
        },
    ),
    "dion": Peer("microsoft/dion", "dion", {"muon, bfloat16": _dion_muon}),
    "dash": Peer(
        "IST-DASLab/ISTA-DASLab-Optimizers", "ista_daslab_optimizers.dash", {"shampoo": _dash}
    ),
}
"""The packages that `--peer-path` takes, by name."""


def with_peers(given: Sequence[str]) -> dict[str, dict[str, Build]]:
    """Return the races with packages from local checkouts, each given as NAME=DIR.

    Raises:
        StructPrecondError: If a name is unknown, or the package cannot be imported from there.
    """
    races = {name: dict(builds) for name, builds in RACES.items()}
    for entry in given:
        name, _, path = entry.partition("=")
        if name not in PEERS or not path:
            raise StructPrecondError(
                f"--peer-path got {entry!r}, expected NAME=DIR with one of the names "
                f"{', '.join(PEERS)}. Name a checkout, as in --peer-path dion=../dion."
            )
        _import(entry, PEERS[name], Path(path).resolve())
        for race, build in PEERS[name].builds.items():
            races[race][name] = build
    return races


def _import(entry: str, peer: Peer, folder: Path) -> None:
    """Import a package from a checkout, or say why that fails."""
    top = peer.module.partition(".")[0]
    expected = f"--peer-path got {entry!r}, expected a checkout of {peer.repository}"
    if not (folder / top / "__init__.py").is_file():
        raise StructPrecondError(
            f"{expected}, but {folder} has no package {top}. "
            f"Clone https://github.com/{peer.repository} and name its folder."
        )
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(peer.module)
    except Exception as error:  # what a package may raise as it is imported
        raise StructPrecondError(
            f"{expected}, but importing {peer.module} failed with {type(error).__name__}: {error}. "
            "Install what it requires, or leave it out."
        ) from error
    finally:
        sys.path.remove(str(folder))
    if not Path(str(module.__file__)).is_relative_to(folder):
        raise StructPrecondError(
            f"{expected}, but {peer.module} was imported from {module.__file__}. "
            f"Uninstall that copy, or leave out --peer-path {entry.partition('=')[0]}."
        )
