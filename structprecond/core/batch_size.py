"""Counts the samples behind the accumulated gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from structprecond.checks import is_count
from structprecond.errors import HyperparameterError, StructPrecondError

GetBatchSize = Callable[[tuple[Any, ...]], int]


def get_batch_size(inputs: tuple[Any, ...]) -> int:
    """Return the size of dimension 0 of the first tensor among a model's inputs.

    Args:
        inputs: The positional inputs of the model's `forward`, followed by the values of the
            keyword inputs; tensors may be nested in tuples, lists and dicts.

    Raises:
        StructPrecondError: If no input is a tensor with a dimension.

    Example:
        >>> get_batch_size(({"x": torch.zeros(8, 3)},))
        8
    """
    for tensor in _tensors(inputs):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise StructPrecondError(
        f"Expected a tensor with a batch dimension among the model's inputs, got "
        f"{[type(i).__name__ for i in inputs]}. Pass batch_size= as an integer, or as a callable "
        "that takes the tuple of inputs."
    )


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, and in the attributes of objects in them."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type):
            yield from (t for t in tree_leaves(vars(leaf)) if isinstance(t, Tensor))


class BatchSizeCounter:
    """Sums the batch sizes of the forward passes whose gradients were accumulated.

    A forward pass counts once, when the first gradient flows back through its outputs. Evaluation,
    passes under `no_grad`, unused losses and recomputed activations do not count. The count
    restarts after a step and when gradients are cleared, so the samples of a step that `GradScaler`
    skipped do not count for the next one. Use `optimizer.zero_grad` for that: the counter does not
    notice `model.zero_grad(set_to_none=False)`.

    Args:
        measure: Returns the batch size of a forward's inputs.

    Attributes:
        count: The samples counted since the gradients were last used or cleared.
    """

    def __init__(self, measure: GetBatchSize) -> None:
        self.measure, self.count = measure, 0
        self._used, self._generation, self._backward = True, 0, -1
        self._handle: Any = None

    def watch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Install the hook, until `close` or until the counter is deleted."""
        self._handle = model.register_forward_hook(_Hook(self, model, optimizer), with_kwargs=True)
        weakref.finalize(self, self._handle.remove).atexit = False

    @property
    def watching(self) -> bool:
        """Whether the hook is installed."""
        return self._handle is not None

    def close(self) -> None:
        """Remove the hook; pending passes no longer count."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def start_anew(self) -> None:
        """Let the next gradient start a new count."""
        self._used = True

    def add(self, samples: int, counted_in: int, cleared: bool) -> int:
        """Count a forward pass when its gradient arrives.

        Args:
            samples: Its batch size.
            counted_in: The return value of the last call for this pass; -1 for the first call.
            cleared: Whether no parameter has a gradient.

        Returns:
            The number of the count that includes the pass.
        """
        if not self.watching:
            return counted_in
        backward = torch._C._current_graph_task_id()
        if self._used or (cleared and backward != self._backward):
            self.count, self._used = 0, False
            self._generation += 1
        self._backward = backward
        if counted_in != self._generation:
            self.count += samples
        return self._generation

    def __getstate__(self) -> dict[str, Any]:
        """Drop the handle, which belongs to one model: a copy must `watch` its own."""
        return {**self.__dict__, "_handle": None}


class _Hook:
    """The forward hook: holds weak references only, and its copies do nothing."""

    def __init__(self, counter: BatchSizeCounter, model: nn.Module, optimizer: Optimizer) -> None:
        self.counter, self.model = weakref.ref(counter), weakref.ref(model)
        self.optimizer = weakref.ref(optimizer)
        # tracing the bookkeeping into a compiled model would recompile it at every step
        self._observe = torch.compiler.disable(self._observe)  # type: ignore[method-assign]

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _do_nothing

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        self._observe(model, args, kwargs, output)

    def _observe(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        counter = self.counter()
        if counter is None or self.model() is not model or not model.training:
            return
        # a hook on a leaf is never removed; functional transforms keep their own gradients
        outputs = [t for t in _tensors(output) if t.grad_fn is not None and not _is_wrapped(t)]
        if not outputs:
            return
        samples, counted_in = counter.measure((*args, *kwargs.values())), -1

        def count(_: Tensor) -> None:
            nonlocal counted_in
            counted_in = counter.add(samples, counted_in, self._cleared())

        torch.autograd.graph.register_multi_grad_hook(outputs, count, mode="any")

    def _cleared(self) -> bool:
        optimizer = self.optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        return all(p.grad is None for group in groups for p in group["params"])


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _do_nothing(*args: Any) -> None:
    """Replace the hook in copies of a model."""


def _no_hook() -> Callable[..., None]:
    return _do_nothing


class Samples:
    """The number of samples behind the gradients: fixed, or counted in forward passes.

    Args:
        model: The model; None if only parameters are known.

    Attributes:
        shown: The number as a 0-d int64 tensor, for checkpoints.
    """

    def __init__(self, model: nn.Module | None) -> None:
        self.model = model
        self.shown = torch.zeros((), dtype=torch.int64, device="cpu")
        self._counter: BatchSizeCounter | None = None

    @property
    def count(self) -> int | None:
        """The number of samples; None if it is unknown."""
        return (int(self.shown) if self._counter is None else self._counter.count) or None

    def assign(self, value: int | GetBatchSize, optimizer: Optimizer) -> None:
        """Fix the number, or count it with a callable on the inputs of forward passes.

        Raises:
            StructPrecondError: If counting needs a model, but there is none.
            HyperparameterError: If the value is neither a positive integer nor a callable.
        """
        counter = None
        if callable(value):
            if self.model is None:
                raise StructPrecondError(
                    "Counting the batch size needs the model, but the optimizer was given only "
                    "parameters. Pass the model as first argument, or batch_size= as an integer."
                )
            counter = BatchSizeCounter(value)
            counter.watch(self.model, optimizer)
        elif is_count(value):
            self.shown.fill_(value)
        else:
            raise HyperparameterError(
                f"batch_size must be an integer of at least 1, or a callable that returns one for "
                f"the tuple of a forward's inputs, got {value!r}."
            )
        if self._counter is not None:
            self._counter.close()
        self._counter = counter

    def watch(self, optimizer: Optimizer) -> None:
        """Let a copied counter watch the copied model, once the model is complete."""
        if self._counter is None or self.model is None or self._counter.watching:
            return
        if "_forward_hooks" in self.model.__dict__:
            self._counter.watch(self.model, optimizer)

    def use(self) -> None:
        """Store the number in `shown` after a step; the next gradient starts a new count."""
        self.shown.fill_(self.count or 0)
        self.clear()

    def clear(self) -> None:
        """Let the next gradient start a new count."""
        if self._counter is not None:
            self._counter.start_anew()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Adopt the number loaded into `shown`, unless a fixed one was given."""
        given = int(self.shown)
        yield
        if self._counter is None:
            self.shown.fill_(given)
        else:
            self._counter.count = int(self.shown)
