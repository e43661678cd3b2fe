"""Counting the samples behind the accumulated gradients."""

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
        StructPrecondError: If there is no tensor with a dimension.

    Example:
        >>> get_batch_size(({"x": torch.zeros(8, 3)},))
        8
    """
    for tensor in _tensors(inputs):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise StructPrecondError(
        f"No tensor with a batch dimension among the model's inputs of types "
        f"{[type(i).__name__ for i in inputs]}. Pass batch_size= as an integer, or as a callable "
        "on the tuple of inputs."
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

    A forward pass counts when a gradient flows back through its outputs, once however often that
    happens. So evaluation, passes under `no_grad`, passes whose loss is dropped, and the
    recomputation of activation checkpointing do not count. The count starts anew after a step and
    when the gradients were cleared, so the samples of a step that `GradScaler` skipped do not count
    for the next one. (Only gradients that `model.zero_grad(set_to_none=False)` sets to zero look
    like any others: use `optimizer.zero_grad`.)

    Args:
        measure: From a forward's inputs to its batch size.

    Attributes:
        count: The samples counted since the gradients were last used or cleared.
    """

    def __init__(self, measure: GetBatchSize) -> None:
        self.measure, self.count = measure, 0
        self._used, self._generation, self._backward = True, 0, -1
        self._handle: Any = None

    def watch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Install the hook; it goes with `close`, or with the counter itself."""
        self._handle = model.register_forward_hook(_Hook(self, model, optimizer), with_kwargs=True)
        weakref.finalize(self, self._handle.remove).atexit = False

    @property
    def watching(self) -> bool:
        """Whether the hook is installed."""
        return self._handle is not None

    def close(self) -> None:
        """Remove the hook; passes that are under way no longer count."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def start_anew(self) -> None:
        """Let the next gradient start a new count: those so far are used or cleared."""
        self._used = True

    def add(self, samples: int, counted_in: int, cleared: bool) -> int:
        """Count a forward pass whose gradient arrives.

        Args:
            samples: Its batch size.
            counted_in: What the last call for this pass returned, -1 if there was none.
            cleared: Whether no parameter has a gradient.

        Returns:
            The number of the count that the pass is now part of.
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
        """Leave out the handle, which belongs to one model: a copy has to `watch` its own."""
        return {**self.__dict__, "_handle": None}


class _Hook:
    """The forward hook. It keeps neither model nor optimizer alive, and copies of it do nothing."""

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
        # a hook on a leaf would stay for ever; functional transforms have gradients of their own
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
    """Stand in for the hook in copies of a model."""


def _no_hook() -> Callable[..., None]:
    return _do_nothing


class Samples:
    """The number of samples behind the gradients: given, or counted in forward passes.

    Args:
        model: The model; None if only parameters are known.

    Attributes:
        shown: The number as a tensor of no dimension, int64, which checkpoints hold.
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
        """Fix the number, or have it counted by a callable on the inputs of forward passes.

        Raises:
            StructPrecondError: If it is to be counted, but there is no model.
            HyperparameterError: If it is neither a number nor a callable.
        """
        counter = None
        if callable(value):
            if self.model is None:
                raise StructPrecondError(
                    "The batch size is counted in the forward passes of the model, but the "
                    "optimizer was given parameters only. Pass the model as the first argument, "
                    "or batch_size= as an integer."
                )
            counter = BatchSizeCounter(value)
            counter.watch(self.model, optimizer)
        elif is_count(value):
            self.shown.fill_(value)
        else:
            raise HyperparameterError(
                f"batch_size must be an integer of at least 1, or a callable from the tuple of a "
                f"forward's inputs to one, got {value!r}."
            )
        if self._counter is not None:
            self._counter.close()
        self._counter = counter

    def watch(self, optimizer: Optimizer) -> None:
        """Let the counter of a copy watch the copy of the model, as soon as that is complete."""
        if self._counter is None or self.model is None or self._counter.watching:
            return
        if "_forward_hooks" in self.model.__dict__:
            self._counter.watch(self.model, optimizer)

    def use(self) -> None:
        """Show the number, which a step has used; the next gradient starts a new count."""
        self.shown.fill_(self.count or 0)
        self.clear()

    def clear(self) -> None:
        """Let the next gradient start a new count."""
        if self._counter is not None:
            self._counter.start_anew()

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Take over a number that is loaded into `shown`, unless one is given here."""
        given = int(self.shown)
        yield
        if self._counter is None:
            self.shown.fill_(given)
        else:
            self._counter.count = int(self.shown)
