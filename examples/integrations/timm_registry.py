"""Optimizers of this library by name in timm, on a random tiny vision transformer.

    python examples/integrations/timm_registry.py

timm makes param groups for weight decay and layer decay, without names. The keyword `model` passes
the model on beside them, so that the optimizer knows the role of each parameter.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models import VisionTransformer
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import CosineLRScheduler
from torch import nn

import structprecond

# timm keeps its own "adamw" and "lars"
NAMES = "SOAP SOAPMuon Shampoo KLShampoo KLSOAP SIRFShampoo PSGDKron Muon NorMuon Scion".split()


def make(
    optimizer: Any, params: Any, weight_decay: float = 0.0, model: Any = None, **settings: Any
) -> Any:
    """Make an optimizer from what timm passes.

    Args:
        optimizer: The class of the optimizer.
        params: Parameters or param groups.
        weight_decay: That of groups without their own. In a group, every optimizer knows it by this
            name, which is not so for keywords: SIRF-Shampoo's is `kappa`.
        model: The model.
        settings: More keywords of the optimizer.
    """
    given = list(params)
    listed = given if isinstance(given[0], dict) else [{"params": given}]
    groups: list[dict[str, Any]] = [{"weight_decay": weight_decay, **group} for group in listed]
    for group in groups:
        if group.pop("use_fallback", False):  # it matched timm's fallback_list
            group["strategy"] = "adamw"
    return optimizer(*([groups] if model is None else [model, groups]), **settings)


def register() -> None:
    """Enter the optimizers in timm's registry, each by its name in lower case."""
    for name in NAMES:
        optimizer = getattr(structprecond, name)
        takes = inspect.signature(optimizer).parameters
        info = OptimInfo(
            name=name.lower(),
            opt_class=partial(make, optimizer),
            description=str(inspect.getdoc(optimizer)).splitlines()[0],
            has_eps="eps" in takes,
            has_momentum="momentum" in takes,
            has_betas="betas" in takes,
        )
        default_registry.register(info)


def make_model() -> Any:
    """Return a random vision transformer with two blocks."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(**sizes, num_classes=3)


def pictures(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise with one bright color, and its number."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    colors = torch.randint(3, (count,), generator=generator)
    return noise + nn.functional.one_hot(colors, 3)[:, :, None, None], colors


def main(argv: Sequence[str] | None = None) -> list[float]:
    """Train, and return the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--opt", default="muon")
    args = parser.parse_args(argv)
    model = make_model()
    optimizer = create_optimizer_v2(
        model, args.opt, lr=0.01, weight_decay=0.05, layer_decay=0.75, model=model
    )
    schedule = CosineLRScheduler(optimizer, t_initial=args.steps, t_in_epochs=False)
    losses = []
    for step in range(args.steps):
        schedule.step_update(step)
        x, y = pictures(64, seed=step)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    register()
    losses = main()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
