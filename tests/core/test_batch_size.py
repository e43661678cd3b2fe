"""The batch size is the number of samples behind the gradients, however the model is called."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from structprecond import SIRFShampoo, StructPrecondError, get_batch_size


def _x(samples: int) -> Tensor:
    return torch.randn(samples, 3)


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Called(nn.Module):
    """A model that is called as the test likes, and returns what the test likes."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.net = _model()
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
        (lambda net, x: net(x), (_x(5),), {}),
        (lambda net, x: net(x), (), {"x": _x(5)}),
        (lambda net, flag, x: net(x), ("train",), {"x": _x(5)}),
        (lambda net, inputs: net(inputs["x"]), ({"x": _x(5), "labels": torch.zeros(5)},), {}),
        (lambda net, inputs: net(inputs["x"]), (), {"inputs": {"x": _x(5)}}),
        (lambda net, inputs: net(inputs[1][0]["x"]), ([None, ({"x": _x(5)}, 3)],), {}),
        (lambda net, scale, x: net(x) * scale, (torch.tensor(2.0), _x(5)), {}),
        (lambda net, sample: net(sample.x), (Sample("a", _x(5)),), {}),
        (lambda net, x: net(x[:3]), (_x(5),), {}),
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

    x, mask = _x(5), torch.tensor([1, 1, 0, 0, 1])
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
        output = model(_x(5))
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
    outputs = model(_x(5))
    torch.stack([outputs[i].sum() for i in used]).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 5


def test_output_that_is_a_parameter_counts_once_a_step() -> None:
    # hooks on leaves outlive the pass; open_clip returns its logit bias, for instance
    model = Called(lambda net, x: (net(x), net[2].bias))
    optimizer = SIRFShampoo(model)
    for _ in range(3):
        optimizer.zero_grad()
        output, bias = model(_x(5))
        (output.sum() + bias.sum()).backward()
        optimizer.step()
        assert optimizer.batch_size == 5


# --- passes that do not count --------------------------------------------------------------------


def _in_evaluation(model: nn.Module) -> None:
    model.eval()
    model(_x(7))
    model.train()


def _in_evaluation_with_gradient(model: nn.Module) -> None:
    model.eval()
    x = _x(7).requires_grad_()
    torch.autograd.grad(model(x).sum(), x)
    model.train()


def _without_gradients(model: nn.Module) -> None:
    with torch.no_grad():
        model(_x(7))


def _in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        model(_x(7))


def _loss_dropped(model: nn.Module) -> None:
    model(_x(7))


def _in_a_copy(model: nn.Module) -> None:
    copy.deepcopy(model)(_x(7)).sum().backward()


def _in_a_pickled_copy(model: nn.Module) -> None:
    pickle.loads(pickle.dumps(model))(_x(7)).sum().backward()


def _in_a_part(model: nn.Module) -> None:
    next(model.children())(_x(7))


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
    model = _model()
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        optimizer.zero_grad()
        if when == "before":
            other(model)
        loss = model(_x(5)).sum()
        if when == "between":
            other(model)
        loss.backward()
        if when == "after":
            other(model)
        optimizer.step()
        assert optimizer.batch_size == 5


def test_functional_transforms_work_and_are_not_counted() -> None:
    # torch.func.grad refuses functions that write to captured tensors
    model = _model()
    optimizer = SIRFShampoo(model)
    optimizer.zero_grad()
    model(_x(5)).sum().backward()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(model, params, (x,))
        return output.sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, _x(7))
    assert per_sample["0.weight"].shape == (7, 4, 3)
    optimizer.step()
    assert optimizer.batch_size == 5


# --- several passes ------------------------------------------------------------------------------


def test_passes_accumulate_until_the_step() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    for sizes in ((5,), (2, 3, 4), (6, 1)):
        optimizer.zero_grad()
        for samples in sizes:
            model(_x(samples)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == sum(sizes)


def test_two_forwards_and_one_backward_count_both() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        optimizer.zero_grad()
        first, second = model(_x(5)), model(_x(3))
        (first.sum() + second.sum()).backward()
        optimizer.step()
        assert optimizer.batch_size == 8


def test_two_backwards_of_one_forward_count_it_once() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(_x(5))
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 5


def test_gradient_penalty_counts_the_forward_once() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    x = _x(5).requires_grad_()
    output = model(x).sum()
    (penalty,) = torch.autograd.grad(output, x, create_graph=True)
    (output + penalty.square().sum()).backward()
    optimizer.step()
    assert optimizer.batch_size == 5


def test_accumulation_counts_gradients_of_parameters_that_were_added_later() -> None:
    model = _model()
    model[0].requires_grad_(False)
    optimizer = SIRFShampoo(model, model[0].parameters())
    optimizer.add_param_group({"params": model[2].parameters()})
    for _ in range(2):
        optimizer.zero_grad()
        for samples in (5, 3):
            model(_x(samples)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 8


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("when", ["before the forward", "before the backward"])
@pytest.mark.parametrize("whose", ["optimizer", "model"])
def test_zero_grad_may_stand_anywhere_before_the_backward(
    whose: str, when: str, set_to_none: bool
) -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    zero_grad: Any = (optimizer if whose == "optimizer" else model).zero_grad
    for _ in range(3):
        if when == "before the forward":
            zero_grad(set_to_none=set_to_none)
        loss = model(_x(5)).sum()
        if when == "before the backward":
            zero_grad(set_to_none=set_to_none)
        loss.backward()
        optimizer.step()
        assert optimizer.batch_size == 5


@pytest.mark.parametrize(
    ("whose", "set_to_none", "when"),
    [
        ("optimizer", True, "before the forward"),
        ("optimizer", True, "before the backward"),
        ("optimizer", False, "before the forward"),
        ("optimizer", False, "before the backward"),
        ("model", True, "before the forward"),
        ("model", True, "before the backward"),
        # gradients that the model sets to zero look like any others: documented, use the optimizer
    ],
)
def test_samples_of_a_step_that_the_scaler_skipped_do_not_count(
    whose: str, set_to_none: bool, when: str
) -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    zero_grad: Any = (optimizer if whose == "optimizer" else model).zero_grad
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, torch.inf, 1.0):
        if when == "before the forward":
            zero_grad(set_to_none=set_to_none)
        loss = model(_x(5)).sum() * factor
        if when == "before the backward":
            zero_grad(set_to_none=set_to_none)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.global_step == 2
    assert optimizer.batch_size == 5


# --- activation checkpointing --------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A model that recomputes its first half in the backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = _model(), nn.Linear(2, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        output: Tensor = self.second(hidden)
        return output


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [(5,), (5, 3)])
def test_checkpointed_part_does_not_count_twice(
    micro_batches: tuple[int, ...], use_reentrant: bool
) -> None:
    model = Checkpointed(use_reentrant)
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        optimizer.zero_grad()
        for samples in micro_batches:
            model(_x(samples).requires_grad_()).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == sum(micro_batches)


# Without early stop, the recomputation runs the whole forward, its hooks included, in the backward.
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [(5,), (5, 3)])
def test_checkpointed_model_does_not_count_twice(
    micro_batches: tuple[int, ...], use_reentrant: bool, early_stop: bool
) -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    with set_checkpoint_early_stop(early_stop):
        for _ in range(2):
            optimizer.zero_grad()
            for samples in micro_batches:
                x = _x(samples).requires_grad_()
                checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
            optimizer.step()
            assert optimizer.batch_size == sum(micro_batches)


# --- explicit batch sizes ------------------------------------------------------------------------


def test_given_integer_stays_fixed_and_installs_no_hook() -> None:
    model = _model()
    optimizer = SIRFShampoo(model, batch_size=32)
    assert not model._forward_hooks
    for _ in range(2):
        optimizer.zero_grad()
        model(_x(5)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 32


def test_assigned_integer_stays_fixed_and_a_callable_turns_counting_on_again() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)

    def train(samples: int) -> None:
        optimizer.zero_grad()
        model(_x(samples)).sum().backward()
        optimizer.step()

    train(5)
    optimizer.batch_size = 9
    assert not model._forward_hooks
    for _ in range(2):
        train(4)
        assert optimizer.batch_size == 9
    optimizer.batch_size = get_batch_size
    for samples in (6, 3):
        train(samples)
        assert optimizer.batch_size == samples
    assert len(model._forward_hooks) == 1
    optimizer.batch_size = lambda inputs: 2 * len(inputs[0])
    train(6)
    assert optimizer.batch_size == 12
    assert len(model._forward_hooks) == 1


def test_integer_assigned_between_forward_and_backward_stays_fixed() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    loss = model(_x(5)).sum()
    optimizer.batch_size = 7
    loss.backward()
    optimizer.step()
    assert optimizer.batch_size == 7


def test_batch_size_is_what_the_update_uses() -> None:
    updates = []
    for samples, given in ((8, get_batch_size), (8, 8), (8, 2)):
        torch.manual_seed(0)
        model = _model()
        optimizer = SIRFShampoo(model, batch_size=given, beta2=0.5)
        model(torch.ones(samples, 3)).sum(1).mean().backward()
        optimizer.step()
        updates.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(updates[0], updates[1])
    assert not torch.equal(updates[1], updates[2])


# --- lifetime ------------------------------------------------------------------------------------


def test_deleted_optimizer_leaves_no_hook_behind() -> None:
    model = _model()
    optimizer, other = SIRFShampoo(model), SIRFShampoo(model)
    model(_x(5)).sum().backward()
    optimizer.step()
    del optimizer
    gc.collect()
    assert len(model._forward_hooks) == len(model._forward_hooks_with_kwargs) == 1
    del other
    gc.collect()
    assert not model._forward_hooks
    assert not model._forward_hooks_with_kwargs
    model(_x(5)).sum().backward()


def test_model_and_optimizer_can_be_garbage_collected() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    model(_x(5)).sum().backward()
    optimizer.step()
    weight: Any = model[0].weight
    references: list[Any] = [weakref.ref(thing) for thing in (model, optimizer, weight)]
    del weight
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_graph_that_outlives_the_optimizer_does_no_harm() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    loss = model(_x(5)).sum()
    del optimizer
    gc.collect()
    loss.backward()
    assert model[0].weight.grad is not None


def test_copies_of_the_optimizer_count_their_own_model() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    copiers: list[Any] = [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
    for copier in copiers:
        model_copy, clone = copier((model, optimizer))
        for m, o, samples in ((model, optimizer, 5), (model_copy, clone, 3)):
            o.zero_grad()
            m(_x(samples)).sum().backward()
            o.step()
        assert (optimizer.batch_size, clone.batch_size) == (5, 3)
        clone_reference = weakref.ref(clone)
        del clone, o
        gc.collect()
        assert clone_reference() is None


def test_saved_model_loads_and_runs() -> None:
    model = _model()
    optimizer = SIRFShampoo(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded(_x(5)).shape == (5, 2)
    assert optimizer.batch_size is None


# torch's own tracing reads .grad of non-leaf tensors when it resumes after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["before", "wrapped", "in place"])
def test_compiled_models_are_counted(how: str) -> None:
    torch.compiler.reset()
    model: Any = _model()
    compiled: Any = model if how == "in place" else torch.compile(model, backend="eager")
    optimizer = SIRFShampoo(compiled if how == "wrapped" else model)
    if how == "in place":
        model.compile(backend="eager")
    for samples in (5, 3, 4):
        optimizer.zero_grad()
        compiled(_x(samples)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == samples
