"""The hooks of torch's optimizers run, and may replace what they see."""

from __future__ import annotations

import copy
from typing import Any

import torch

from structprecond import (
    SIRFShampoo,
)
from tests.helpers import (
    SETTINGS,
    assert_close,
    backward,
    dense_units,
    mlp,
    same_bits,
    train,
    values,
)


def test_step_hooks_run_around_every_step_and_see_its_arguments() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, batch_size=6, **SETTINGS)
    seen: list[Any] = []

    def before(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append(("before", opt is optimizer, opt.global_step))

    def after(opt: Any, args: Any, kwargs: Any) -> None:
        seen.append(("after", opt is optimizer, opt.global_step))

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    train(model, optimizer, 2)
    expected = [("before", True, 0), ("after", True, 1), ("before", True, 1), ("after", True, 2)]
    assert seen == expected
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1)
    assert seen == expected


def test_step_pre_hook_may_change_the_gradients() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    optimizer, dense = SIRFShampoo(model, **SETTINGS), dense_units(twin)

    def clip(opt: Any, args: Any, kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    optimizer.register_step_pre_hook(clip)
    train(model, optimizer, 3)
    for step in range(3):
        twin.zero_grad()
        backward(twin, step)
        grads = [p.grad for p in twin.parameters() if p.grad is not None]
        total = sum(grad.square().sum().item() for grad in grads) ** 0.5
        assert total > 0.1
        for grad in grads:
            grad *= 0.1 / (total + 1e-6)
        for unit in dense:
            unit.step(6)
    assert_close(values(model), values(twin))


def test_state_dict_hooks_run_and_may_replace_the_state_dict() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("pre"))

    def post(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**state_dict, "extra": 1}

    handle = optimizer.register_state_dict_post_hook(post)
    assert optimizer.state_dict()["extra"] == 1
    assert calls == ["pre", "post"]
    handle.remove()
    assert "extra" not in optimizer.state_dict()


def test_load_state_dict_hooks_run_and_may_replace_what_is_loaded() -> None:
    model = mlp()
    optimizer = SIRFShampoo(model, **SETTINGS)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    fresh = SIRFShampoo(mlp())
    steps: list[int] = []

    def pre(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        steps.append(opt.global_step)
        wrapped: dict[str, Any] = state_dict["wrapped"]
        return wrapped

    fresh.register_load_state_dict_pre_hook(pre)
    fresh.register_load_state_dict_post_hook(lambda opt: steps.append(fresh.global_step))
    fresh.load_state_dict({"wrapped": saved})
    assert steps == [0, 2]
    assert same_bits(fresh.state_dict()["state"], saved["state"])
