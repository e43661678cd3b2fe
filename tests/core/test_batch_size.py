"""The batch size is the number of samples behind the gradients, however the model is called."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structprecond import SIRFShampoo, StructPrecondError, get_batch_size
from tests.helpers import points, two_layers


class Called(nn.Module):
    """A model with inputs and outputs that the test chooses."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.net = two_layers()
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(self.net, *args, **kwargs)


@dataclass
class Sample:
    name: str
    x: Tensor


# --- inputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "args", "kwargs"),
    [
        (lambda net, x: net(x), (points(5),), {}),
        (lambda net, x: net(x), (), {"x": points(5)}),
        (lambda net, flag, x: net(x), ("train",), {"x": points(5)}),
        (
            lambda net, inputs: net(inputs["x"]),
            ({"x": points(5), "labels": torch.zeros(5)},),
            {},
        ),
        (lambda net, inputs: net(inputs["x"]), (), {"inputs": {"x": points(5)}}),
        (
            lambda net, inputs: net(inputs[1][0]["x"]),
            ([None, ({"x": points(5)}, 3)],),
            {},
        ),
        (lambda net, scale, x: net(x) * scale, (torch.tensor(2.0), points(5)), {}),
        (lambda net, sample: net(sample.x), (Sample("a", points(5)),), {}),
        (lambda net, x: net(x[:3]), (points(5),), {}),
    ],
    ids=[
        "positional",
        "keyword",
        "text first",
        "dict",
        "dict by keyword",
        "nested",
        "scalar tensor first",
        "dataclass",
        "the input counts, not the output",
    ],
)
def test_inputs_of_any_form_are_counted(
    forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    model = Called(forward)
    optimizer = SIRFShampoo(model)
    assert optimizer.batch_size is None
    for _ in range(2):
        optimizer.zero_grad()
        model(*args, **kwargs).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 5


def test_get_batch_size_raises_if_there_is_no_tensor_to_measure() -> None:
    with pytest.raises(StructPrecondError, match=r"'str'.*batch_size="):
        get_batch_size(("text", torch.tensor(1.0)))


def test_own_callable_gets_the_tuple_of_inputs_once_per_forward() -> None:
    model, seen = Called(lambda net, x, mask: net(x)), []

    def measure(inputs: tuple[Any, ...]) -> int:
        seen.append(inputs)
        return int(inputs[1].sum())

    x, mask = points(5), torch.tensor([1, 1, 0, 0, 1])
    optimizer = SIRFShampoo(model, batch_size=measure)
    model(x, mask=mask).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 3
    assert len(seen) == 1
    assert isinstance(seen[0], tuple)
    assert seen[0][0] is x
    assert seen[0][1] is mask


# --- outputs -------------------------------------------------------------------------------------


@dataclass
class Output:
    loss: Tensor
    hidden: list[Tensor]


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: {"loss": net(x).sum(), "size": 5},
        lambda net, x: (None, {"loss": net(x).sum()}),
        lambda net, x: Output(net(x).sum(), [x]),
        lambda net, x: [Output(torch.zeros(()), [net(x)])],
        lambda net, x: net(x).sum(),
        lambda net, x: (x, net(x)),
    ],
    ids=["dict", "nested", "dataclass", "dataclass in a list", "loss", "input passed through"],
)
def test_outputs_of_any_form_are_counted(forward: Callable[..., Any]) -> None:
    model = Called(forward)
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(points(5))
        tensors = _floats(output)
        sum(t.sum() for t in tensors if t.requires_grad).backward()  # type: ignore[union-attr]
        optimizer.step()
        assert optimizer.batch_size == 5


def _floats(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Output):
        return _floats([tree.loss, tree.hidden])
    children = tree.values() if isinstance(tree, dict) else tree
    return [
        t
        for child in children
        if isinstance(child, Tensor | Output | dict | list)
        for t in _floats(child)
    ]


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_several_outputs_count_once_whichever_are_used(used: tuple[int, ...]) -> None:
    model = Called(lambda net, x: (net(x), net(x) * 2))
    optimizer = SIRFShampoo(model)
    outputs = model(points(5))
    torch.stack([outputs[i].sum() for i in used]).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 5


def test_output_that_is_a_parameter_counts_once_a_step() -> None:
    # hooks on leaves outlive the pass; open_clip, for example, returns its logit bias
    model = Called(lambda net, x: (net(x), net[2].bias))
    optimizer = SIRFShampoo(model)
    for _ in range(3):
        optimizer.zero_grad()
        output, bias = model(points(5))
        (output.sum() + bias.sum()).backward()
        optimizer.step()
        assert optimizer.batch_size == 5


# --- passes that do not count --------------------------------------------------------------------


def _in_evaluation(model: nn.Module) -> None:
    model.eval()
    model(points(7))
    model.train()


def _in_evaluation_with_gradient(model: nn.Module) -> None:
    model.eval()
    x = points(7).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    model.train()


def _without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        model(points(7))


def _in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model(points(7))


def _loss_dropped(model: nn.Module) -> None:
    model(points(7))


def _in_a_copy(model: nn.Module) -> None:
    copy.deepcopy(model)(points(7)).sum().backward()


def _in_a_pickled_copy(model: nn.Module) -> None:
    pickle.loads(pickle.dumps(model))(points(7)).sum().backward()


def _in_a_part(model: nn.Module) -> None:
    next(model.children())(points(7))


@pytest.mark.parametrize(
    "other",
    [
        _in_evaluation,
        _in_evaluation_with_gradient,
        _without_gradients,
        _in_inference_mode,
        _loss_dropped,
        _in_a_copy,
        _in_a_pickled_copy,
        _in_a_part,
    ],
)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_other_passes_are_not_counted(other: Callable[[nn.Module], None], when: str) -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        optimizer.zero_grad()
        if when == "before":
            other(model)
        loss = model(points(5)).sum()
        if when == "between":
            other(model)
        loss.backward()
        if when == "after":
            other(model)
        optimizer.step()
        assert optimizer.batch_size == 5


def test_functional_transforms_work_and_are_not_counted() -> None:
    # torch.func.grad refuses functions that write to captured tensors
    model = two_layers()
    optimizer = SIRFShampoo(model)
    optimizer.zero_grad()
    model(points(5)).sum().backward()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, params, (x,))
        return output.sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, points(7))
    assert per_sample["0.weight"].shape == (7, 4, 3)
    optimizer.step()
    assert optimizer.batch_size == 5
