"""timm's factory: the same optimizers as ours built by hand, to the bit."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from torch import nn

from structprecond import SOAP, Muon, SIRFShampoo, describe
from tests.integrations.examples import assert_equal, example

# their own deprecations
pytestmark = pytest.mark.filterwarnings("ignore")

LR, DECAY, LAYER_DECAY, STEPS = 0.01, 0.05, 0.5, 4
OPTIMIZERS = pytest.mark.parametrize(
    ("name", "optimizer", "settings"),
    [
        ("muon", Muon, {"momentum": 0.9}),  # timm's default
        ("soap", SOAP, {"precondition_frequency": 2}),
        ("sirfshampoo", SIRFShampoo, {"T": 2, "batch_size": 8}),
    ],
)


def layer_of(name: str) -> int:
    """Return the layer of a parameter, as timm counts: the last norm belongs to the last block."""
    if name.startswith("blocks."):
        return 1 + int(name.split(".")[1])
    return {"norm": 2, "head": 3}.get(name.split(".")[0], 0)


def decays(name: str, p: nn.Parameter) -> bool:
    return p.ndim > 1 and name not in ("pos_embed", "cls_token")


def groups_by_hand(model: nn.Module, layer_decay: bool) -> list[dict[str, Any]]:
    """Return a group for each weight decay and learning rate."""
    members = defaultdict(list)
    for name, p in model.named_parameters():
        scale = LAYER_DECAY ** (3 - layer_of(name)) if layer_decay else 1.0
        members[scale, decays(name, p)].append(p)
    return [
        {"params": params, "lr": LR * scale, "weight_decay": DECAY * decayed}
        for (scale, decayed), params in members.items()
    ]


def train(timm: Any, model: Any, optimizer: Any) -> None:
    for step in range(STEPS):
        x, y = timm.pictures(8, seed=step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the example, with its entries in timm's registry during the test."""
    module = example("timm_registry", "timm")
    registry = module.default_registry
    monkeypatch.setattr(registry, "_optimizers", dict(registry._optimizers))
    module.register()
    return module


@OPTIMIZERS
@pytest.mark.parametrize("layer_decay", [False, True])
def test_decay_groups_and_layer_decay(
    timm: Any, name: str, optimizer: Any, settings: dict[str, Any], layer_decay: bool
) -> None:
    theirs, ours = timm.make_model(), timm.make_model()
    more = {"layer_decay": LAYER_DECAY} if layer_decay else {}
    made = timm.create_optimizer_v2(
        theirs, name, lr=LR, weight_decay=DECAY, model=theirs, **more, **settings
    )
    assert type(made) is optimizer
    assert made.model is theirs
    # sets the learning rates of the layers, as timm leaves that to its schedules
    timm.CosineLRScheduler(made, t_initial=10**9, t_in_epochs=False).step_update(0)
    train(timm, theirs, made)
    train(timm, ours, optimizer(ours, groups_by_hand(ours, layer_decay), **settings))
    assert_equal(theirs, ours)


def test_the_weight_decay_of_parameters_reaches_kappa(timm: Any) -> None:
    model = timm.make_model()
    made = timm.create_optimizer_v2(
        model.named_parameters(), "sirfshampoo", lr=LR, weight_decay=DECAY, batch_size=8
    )
    (group,) = made.param_groups
    assert group["weight_decay"] == DECAY
    other = timm.make_model()
    train(timm, model, made)
    train(timm, other, SIRFShampoo(other, lr=LR, kappa=DECAY, batch_size=8))
    assert_equal(model, other)


def test_the_fallback_list_goes_to_adamw(timm: Any) -> None:
    model = timm.make_model()
    made = timm.create_optimizer_v2(
        model, "muon", lr=LR, weight_decay=DECAY, model=model, fallback_list=["*.qkv.weight"]
    )
    strategies = {name: row.strategy for row in describe(made).rows for name in row.names}
    assert strategies["blocks.0.attn.qkv.weight"] == "AdamWStrategy"
    assert strategies["blocks.0.mlp.fc1.weight"] == "MuonStrategy"


def test_every_optimizer_has_an_entry(timm: Any) -> None:
    for name in timm.NAMES:
        model = timm.make_model()
        made = timm.create_optimizer_v2(model, name, lr=LR, weight_decay=DECAY, model=model)
        assert type(made).__name__ == name


def test_the_example_learns(timm: Any) -> None:
    losses = timm.main(["--steps", "30"])
    assert losses[-1] < 0.8 * losses[0]
