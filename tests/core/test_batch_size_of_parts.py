"""If the model itself is not called, the calls of its outermost submodules are counted."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from structprecond import SIRFShampoo, StructPrecondError
from tests.helpers import points, two_layers


class Module(nn.Module):
    """Trains its parts in a method, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = two_layers(), nn.Sequential(nn.Linear(2, 3), nn.Tanh())
        self.branches = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
        self.cell = nn.Linear(3, 3)
        self.criterion = nn.MSELoss()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.decoder(self.encoder(x))
        return result

    def training_step(self, x: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.encoder(x), torch.zeros(len(x), 2))
        return loss


def _two_views(model: Module) -> Tensor:
    views = torch.cat([model.encoder(points(5)), model.encoder(points(5))])
    total: Tensor = model.decoder(views).sum()
    return total


def _recurrent(model: Module) -> Tensor:
    h = torch.zeros(5, 3)
    for _ in range(4):
        h = model.cell(h)
    return h.sum()


def _more_rows_later(model: Module) -> Tensor:
    features = model.encoder(points(5)).repeat_interleave(7, 0)
    total: Tensor = model.decoder(features).sum()
    return total


def _branches(model: Module) -> Tensor:
    x = points(5)
    total: Tensor = (model.branches["b"](x) * model.branches["a"](x)).sum()
    return total


def _branches_of_other_sizes(model: Module) -> Tensor:
    total: Tensor = model.branches["b"](points(5)).sum() + model.branches["a"](points(9)).sum()
    return total


def _frozen_encoder(model: Module) -> Tensor:
    with torch.no_grad():
        z = model.encoder(points(5))
    total: Tensor = model.decoder(z).sum()
    return total


def _by_hand_first(model: Module) -> Tensor:
    x = points(5) @ model.cell.weight
    total: Tensor = model.encoder(x).sum()
    return total


def _layers_of_a_part(model: Module) -> Tensor:
    x = points(5)
    for layer in model.encoder:
        x = layer(x)
    return x.sum()


def _evaluated_part(model: Module) -> Tensor:
    model.branches.eval()
    other = model.branches["a"](points(8)).sum()
    model.branches.train()
    total: Tensor = model.encoder(points(5)).sum() + other
    return total


def _dropped_part(model: Module) -> Tensor:
    model.branches["a"](points(8))
    total: Tensor = model.encoder(points(5)).sum()
    return total


def _checkpointed_part(use_reentrant: bool) -> Callable[[Module], Tensor]:
    def loss(model: Module) -> Tensor:
        x = points(5).requires_grad_()
        output: Tensor = checkpoint(model.encoder, x, use_reentrant=use_reentrant)
        return output.sum()

    return loss


def _checkpointed_layer(use_reentrant: bool) -> Callable[[Module], Tensor]:
    def loss(model: Module) -> Tensor:
        first = model.encoder[0]
        model.encoder[0].forward = lambda x: checkpoint(
            nn.Linear.forward, first, x, use_reentrant=use_reentrant
        )
        total: Tensor = model.encoder(points(5).requires_grad_()).sum()
        del model.encoder[0].forward
        return total

    return loss


LOSSES: dict[str, tuple[Callable[[Module], Tensor], int]] = {
    "training step": (lambda m: m.training_step(points(5)), 5),
    "keyword": (lambda m: m.encoder(input=points(5)).sum(), 5),
    "part of a container": (lambda m: m.branches["a"](points(5)).sum(), 5),
    "decoder after encoder": (lambda m: m.decoder(m.encoder(points(5))).sum(), 5),
    "two views of the same": (_two_views, 10),
    "recurrent": (_recurrent, 5),
    "more rows later": (_more_rows_later, 5),
    "branches": (_branches, 5),
    "branches of other sizes": (_branches_of_other_sizes, 5),
    "frozen encoder": (_frozen_encoder, 5),
    "something by hand first": (_by_hand_first, 5),
    "layers one by one": (_layers_of_a_part, 5),
    "a part in evaluation": (_evaluated_part, 5),
    "a part whose loss is dropped": (_dropped_part, 5),
    "the model beside a part": (lambda m: m.cell(points(8)).sum() + m(points(5)).sum(), 5),
    "a part beside the model": (lambda m: m(points(5)).sum() + m.encoder(points(8)).sum(), 5),
    "checkpointed": (_checkpointed_part(False), 5),
    "checkpointed, reentrant": (_checkpointed_part(True), 5),
    "checkpointed inside": (_checkpointed_layer(False), 5),
    "checkpointed inside, reentrant": (_checkpointed_layer(True), 5),
}


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("loss", "expected"), LOSSES.values(), ids=LOSSES)
def test_calls_of_parts_are_counted(
    loss: Callable[[Module], Tensor], expected: int, passes: int, early_stop: bool
) -> None:
    model = Module()
    optimizer = SIRFShampoo(model)
    assert optimizer.batch_size is None
    with set_checkpoint_early_stop(early_stop):
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(passes):
                loss(model).backward()
            optimizer.step()
            assert optimizer.batch_size == passes * expected


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("before_forward", [True, False])
def test_samples_of_a_step_that_the_scaler_skipped_do_not_count(
    before_forward: bool, set_to_none: bool
) -> None:
    model = Module()
    optimizer = SIRFShampoo(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, torch.inf, 1.0):
        if before_forward:
            optimizer.zero_grad(set_to_none)
        loss = model.training_step(points(5)) * factor
        if not before_forward:
            optimizer.zero_grad(set_to_none)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.global_step == 2
    assert optimizer.batch_size == 5


def test_each_optimizer_counts_its_own_part() -> None:
    # a discriminator and its generator, in one module
    model = Module()
    of_encoder = SIRFShampoo(model, model.encoder.parameters())
    of_decoder = SIRFShampoo(model, model.decoder.parameters())
    for _ in range(2):
        of_decoder.zero_grad()
        fake = model.encoder(points(7)).detach()
        model.decoder(torch.cat([fake, torch.randn(6, 2)])).sum().backward()
        of_decoder.step()
        assert of_decoder.batch_size == 13
        of_encoder.zero_grad()
        model.decoder(model.encoder(points(4))).sum().backward()
        of_encoder.step()
        assert of_encoder.batch_size == 4


def test_inputs_that_cannot_be_measured_are_left_out() -> None:
    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self) -> Tensor:
            return self.weight * 2

    model: Any = Module()
    model.prompt = Prompt()
    optimizer = SIRFShampoo(model)
    model.encoder(points(5) + model.prompt()).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 5
    alone = SIRFShampoo(model)
    model.prompt().sum().backward()
    with pytest.raises(StructPrecondError, match=r"of the model, or of a part of it.*batch_size="):
        alone.step()


def test_own_callable_gets_the_inputs_of_the_part() -> None:
    model, seen = Module(), []

    def measure(inputs: tuple[Any, ...]) -> int:
        seen.append(inputs)
        return 2 * len(inputs[0])

    optimizer = SIRFShampoo(model, batch_size=measure)
    x = points(5)
    model.encoder(x).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 10
    assert len(seen) == 1
    assert seen[0][0] is x


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        model = Module()
        optimizer = SIRFShampoo(model)

        def fail(*args: Any, error: type[BaseException] = error) -> None:
            raise error

        handle = model.encoder[2].register_forward_hook(fail)
        with pytest.raises(error):
            model.encoder(points(9))
        handle.remove()
        optimizer.zero_grad()
        model.decoder(model.encoder(points(5))).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == 5


# --- hooks ---------------------------------------------------------------------------------------


def _hooks(model: nn.Module) -> dict[str, int]:
    counts = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()
    }
    return {name: count for name, count in counts.items() if count}


def test_hooks_stay_only_where_they_are_needed() -> None:
    model = Module()
    optimizer = SIRFShampoo(model)
    assert "criterion" not in _hooks(model)  # it has no parameters
    assert {"", "encoder", "encoder.0", "decoder.0", "branches.a"} <= _hooks(model).keys()
    model.training_step(points(5)).backward()
    optimizer.step()
    assert "encoder" in _hooks(model)
    assert "encoder.0" not in _hooks(model)
    assert "decoder.0" in _hooks(model)
    optimizer.zero_grad()
    model(points(5)).sum().backward()
    optimizer.step()
    assert _hooks(model) == {"": 2}
    optimizer.batch_size = 3
    assert not _hooks(model)


def test_parts_that_are_called_later_are_found_after_one_step() -> None:
    model = Module()
    optimizer = SIRFShampoo(model)

    def train(loss: Tensor) -> int | None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return optimizer.batch_size

    assert train(model(points(5)).sum()) == 5
    assert train(model.encoder[0](points(7)).sum()) == 5  # documented: the last count
    for _ in range(2):
        assert train(model.encoder[0](points(7)).sum()) == 7
        assert train(model(points(6)).sum()) == 6


def test_deleted_optimizer_leaves_no_hook_and_keeps_nothing_alive() -> None:
    model = Module()
    optimizer, other = SIRFShampoo(model), SIRFShampoo(model)
    model.training_step(points(5)).backward()
    optimizer.step()
    references: list[Any] = [weakref.ref(thing) for thing in (optimizer, model, model.encoder)]
    del optimizer
    gc.collect()
    assert references[0]() is None
    assert _hooks(model)["encoder.0"] == 2  # of the other
    del other
    gc.collect()
    assert not _hooks(model)
    model.training_step(points(5)).backward()
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def test_copies_count_their_own_model_and_copied_parts_nothing() -> None:
    model = Module()
    optimizer = SIRFShampoo(model)
    copiers: list[Any] = [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
    for copier in copiers:
        model_copy, clone = copier((model, optimizer))
        for m, o, samples in ((model, optimizer, 5), (model_copy, clone, 3)):
            o.zero_grad()
            m.training_step(points(samples)).backward()
            copier(m.encoder)(points(9)).sum().backward()
            o.step()
        assert (optimizer.batch_size, clone.batch_size) == (5, 3)
        reference = weakref.ref(clone)
        del clone, o
        gc.collect()
        assert reference() is None


def test_replicas_of_a_part_are_not_the_part() -> None:
    model = Module()
    optimizer = SIRFShampoo(model)
    replica = model.encoder._replicate_for_data_parallel()
    replica(points(9)).sum().backward()
    model.encoder(points(5)).sum().backward()
    optimizer.step()
    assert optimizer.batch_size == 5


# torch's own tracing reads .grad of non-leaf tensors when it resumes after a graph break
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["part", "blocks", "model", "wrapper"])
def test_compiled_parts_are_counted_and_compiled_once(how: str) -> None:
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model: Any = Module()
    if how == "part":
        model.encoder = torch.compile(model.encoder, backend=backend, fullgraph=True)
    elif how == "blocks":
        model.encoder = nn.Sequential(two_layers(), nn.Linear(2, 3), two_layers())
        for block in (model.encoder[0], model.encoder[2]):
            block.compile(backend=backend, fullgraph=True)
    wrapper: Any = torch.compile(model, backend=backend) if how == "wrapper" else model
    optimizer = SIRFShampoo(wrapper)
    compiled = torch.compile(model, backend=backend) if how == "model" else wrapper
    for samples in (5, 5, 5):
        optimizer.zero_grad()
        called = model.encoder if how in ("part", "blocks") else compiled
        called(points(samples)).sum().backward()
        optimizer.step()
        assert optimizer.batch_size == samples
    assert len(graphs) == {"blocks": 2}.get(how, 1)
