"""The batch size of a step covers all its passes, or is given, and leaves no hook."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from structprecond import SIRFShampoo, get_batch_size
from tests.helpers import points, two_layers

# --- several passes ------------------------------------------------------------------------------


def test_passes_accumulate_until_the_step() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    for sizes in ((5,), (2, 3, 4), (6, 1)):
        optimizer.zero_grad()
        for samples in sizes:
            model(points(samples)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == sum(sizes)


def test_two_forwards_and_one_backward_count_both() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        optimizer.zero_grad()
        first, second = model(points(5)), model(points(3))
        (first.sum() + second.sum()).backward()
        optimizer.step()
        assert optimizer.batch_size == 8


def test_two_backwards_of_one_forward_count_it_once() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        optimizer.zero_grad()
        output = model(points(5))
        output.sum().backward(retain_graph=True)
        output.square().sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 5


def test_gradient_penalty_counts_the_forward_once() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    x = points(5).requires_grad_()
    output = model(x).sum()
    (penalty,) = torch.autograd.grad(output, x, create_graph=True)
    (output + penalty.square().sum()).backward()
    optimizer.step()
    assert optimizer.batch_size == 5


def test_accumulation_counts_gradients_of_parameters_that_were_added_later() -> None:
    model = two_layers()
    model[0].requires_grad_(False)
    optimizer = SIRFShampoo(model, model[0].parameters())
    optimizer.add_param_group({"params": model[2].parameters()})
    for _ in range(2):
        optimizer.zero_grad()
        for samples in (5, 3):
            model(points(samples)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 8


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("when", ["before the forward", "before the backward"])
@pytest.mark.parametrize("whose", ["optimizer", "model"])
def test_zero_grad_may_stand_anywhere_before_the_backward(
    whose: str, when: str, set_to_none: bool
) -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    zero_grad: Any = (optimizer if whose == "optimizer" else model).zero_grad
    for _ in range(3):
        if when == "before the forward":
            zero_grad(set_to_none=set_to_none)
        loss = model(points(5)).sum()
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
        # gradients zeroed by the model count as gradients (documented): zero by the optimizer
    ],
)
def test_samples_of_a_step_that_the_scaler_skipped_do_not_count(
    whose: str, set_to_none: bool, when: str
) -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    zero_grad: Any = (optimizer if whose == "optimizer" else model).zero_grad
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, torch.inf, 1.0):
        if when == "before the forward":
            zero_grad(set_to_none=set_to_none)
        loss = model(points(5)).sum() * factor
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
        self.first, self.second = two_layers(), nn.Linear(2, 2)
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
            model(points(samples).requires_grad_()).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == sum(micro_batches)


# Without early stop, the backward pass recomputes the whole forward pass, with its hooks.
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("micro_batches", [(5,), (5, 3)])
def test_checkpointed_model_does_not_count_twice(
    micro_batches: tuple[int, ...], use_reentrant: bool, early_stop: bool
) -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    with set_checkpoint_early_stop(early_stop):
        for _ in range(2):
            optimizer.zero_grad()
            for samples in micro_batches:
                x = points(samples).requires_grad_()
                checkpoint(model, x, use_reentrant=use_reentrant).sum().backward()
            optimizer.step()
            assert optimizer.batch_size == sum(micro_batches)


# --- explicit batch sizes ------------------------------------------------------------------------


def test_given_integer_stays_fixed_and_installs_no_hook() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model, batch_size=32)
    assert not model._forward_hooks
    for _ in range(2):
        optimizer.zero_grad()
        model(points(5)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 32


def test_assigned_integer_stays_fixed_and_a_callable_turns_counting_on_again() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)

    def train(samples: int) -> None:
        optimizer.zero_grad()
        model(points(samples)).sum().backward()
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
    model = two_layers()
    optimizer = SIRFShampoo(model)
    loss = model(points(5)).sum()
    optimizer.batch_size = 7
    loss.backward()
    optimizer.step()
    assert optimizer.batch_size == 7


def test_batch_size_is_what_the_update_uses() -> None:
    updates = []
    for samples, given in ((8, get_batch_size), (8, 8), (8, 2)):
        torch.manual_seed(0)
        model = two_layers()
        optimizer = SIRFShampoo(model, batch_size=given, beta2=0.5)
        model(torch.ones(samples, 3)).sum(1).mean().backward()
        optimizer.step()
        updates.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(updates[0], updates[1])
    assert not torch.equal(updates[1], updates[2])


# --- lifetime ------------------------------------------------------------------------------------


def test_deleted_optimizer_leaves_no_hook_behind() -> None:
    model = two_layers()
    optimizer, other = SIRFShampoo(model), SIRFShampoo(model)
    model(points(5)).sum().backward()
    optimizer.step()
    del optimizer
    gc.collect()
    assert len(model._forward_hooks) == len(model._forward_hooks_with_kwargs) == 1
    del other
    gc.collect()
    assert not model._forward_hooks
    assert not model._forward_hooks_with_kwargs
    model(points(5)).sum().backward()


def test_model_and_optimizer_can_be_garbage_collected() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    model(points(5)).sum().backward()
    optimizer.step()
    weight: Any = model[0].weight
    references: list[Any] = [weakref.ref(thing) for thing in (model, optimizer, weight)]
    del weight
    del model, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_graph_that_outlives_the_optimizer_does_no_harm() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    loss = model(points(5)).sum()
    del optimizer
    gc.collect()
    loss.backward()
    assert model[0].weight.grad is not None


def test_copies_of_the_optimizer_count_their_own_model() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    copiers: list[Any] = [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
    for copier in copiers:
        model_copy, clone = copier((model, optimizer))
        for m, o, samples in ((model, optimizer, 5), (model_copy, clone, 3)):
            o.zero_grad()
            m(points(samples)).sum().backward()
            o.step()
        assert (optimizer.batch_size, clone.batch_size) == (5, 3)
        clone_reference = weakref.ref(clone)
        del clone, o
        gc.collect()
        assert clone_reference() is None


def test_saved_model_loads_and_runs() -> None:
    model = two_layers()
    optimizer = SIRFShampoo(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded(points(5)).shape == (5, 2)
    assert optimizer.batch_size is None


# torch's own tracing reads .grad of non-leaf tensors when it resumes after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["before", "wrapped", "in place"])
def test_compiled_models_are_counted(how: str) -> None:
    torch.compiler.reset()
    model: Any = two_layers()
    compiled: Any = model if how == "in place" else torch.compile(model, backend="eager")
    optimizer = SIRFShampoo(compiled if how == "wrapped" else model)
    if how == "in place":
        model.compile(backend="eager")
    for samples in (5, 3, 4):
        optimizer.zero_grad()
        compiled(points(samples)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == samples
