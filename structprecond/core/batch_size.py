"""Counting the samples behind the accumulated gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from structprecond.errors import StructPrecondError

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

    A forward pass counts when a gradient flows back through its outputs. So evaluation, passes
    under `no_grad`, passes whose loss is dropped, and the recomputation of activation checkpointing
    do not count, and a gradient that a skipped step (`GradScaler`) leaves unused does not count
    for the next one, once `zero_grad` has cleared it.

    Args:
        measure: From a forward's inputs to its batch size.
        count: Where the samples are counted, an integer tensor `()`.

    Attributes:
        stale: Whether the gradients of the samples counted so far are used up or cleared.
    """

    def __init__(self, measure: GetBatchSize, count: Tensor) -> None:
        self.measure, self.count, self.stale = measure, count, True
        self._handle: Any = None

    def watch(self, model: nn.Module, params: Iterable[nn.Parameter]) -> None:
        """Install the hook; it goes with `close`, or with the counter itself."""
        hook = _Hook(self, model, params)
        self._handle = model.register_forward_hook(hook, with_kwargs=True)
        weakref.finalize(self, self._handle.remove).atexit = False

    def close(self) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()

    def add(self, samples: int) -> None:
        """Count samples; start anew if the gradients of those before are gone."""
        if self.stale:
            self.count.zero_()
        self.count += samples
        self.stale = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the handle, which belongs to one model: a copy has to `watch` its own."""
        return {**self.__dict__, "_handle": None}


class _Hook:
    """The forward hook. It keeps neither model nor counter alive, and copies of it do nothing."""

    def __init__(
        self, counter: BatchSizeCounter, model: nn.Module, params: Iterable[nn.Parameter]
    ) -> None:
        self.counter, self.model = weakref.ref(counter), weakref.ref(model)
        self.params = [weakref.ref(p) for p in params]
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
        outputs = [t for t in _tensors(output) if t.requires_grad]
        if not outputs:
            return
        if all((p := ref()) is None or p.grad is None for ref in self.params):
            counter.stale = True
        samples = counter.measure((*args, *kwargs.values()))

        def count_once(_: Tensor) -> None:
            counter.add(samples)

        torch.autograd.graph.register_multi_grad_hook(outputs, count_once, mode="any")


def _do_nothing(*args: Any) -> None:
    """Stand in for the hook in copies of a model."""


def _no_hook() -> Callable[..., None]:
    return _do_nothing
