"""Counts the samples of the forward passes behind the accumulated gradients."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from structprecond.core.inputs import GetBatchSize, tensors_in


class BatchSizeCounter:
    """Sums the batch sizes of the forward passes whose gradients were accumulated.

    A forward pass counts once, when the first gradient flows back through its outputs. Evaluation,
    passes under `no_grad`, unused losses and recomputed activations do not count. The count
    restarts after a step and when gradients are cleared, so the samples of a step that `GradScaler`
    skipped do not count for the next one. Use `optimizer.zero_grad` for that: the counter does not
    notice `model.zero_grad(set_to_none=False)`.

    Passes of the model count if there are any. Otherwise, as for a LightningModule that calls
    `self.net(x)`, calls of submodules with trained parameters do, except those inside of others:

    - A call on the result of others goes on with their samples, as of a decoder after an encoder,
      or of a recurrent cell after itself. It counts only if no call starts from data.
    - Of several submodules that start from data, only the one that was called first counts, with
      all of its calls: others see the same samples.
    - A call whose inputs cannot be measured does not count. Nor does one that is compiled with its
      hooks, as after `part.compile()`; assign `torch.compile(part)` to the model instead.

    Hooks cost time. So, after the first step, submodules inside of those that were counted are not
    watched any more. If a later step finds nothing to count, it uses the last count, and all
    submodules are watched from then on.

    Args:
        measure: Returns the batch size of a forward's inputs.

    Attributes:
        count: The samples counted since the gradients were last used or cleared.
    """

    def __init__(self, measure: GetBatchSize) -> None:
        self.measure, self.count = measure, 0
        self._takes_keywords = _takes_keywords(measure)
        self._used, self._generation, self._backward = True, 0, -1
        # from whether calls go on with others' samples and the submodule's name, to the turn of
        # the first call and the number of samples
        self._passes: dict[tuple[bool, str], tuple[int, int]] = {}
        self._turn, self._prunes = 0, True
        self._forget()

    def _forget(self) -> None:
        """Make what belongs to one model."""
        self._handles: list[tuple[str, Any]] = []
        self._running: dict[int, str] = {}
        self._watched: Callable[[], tuple[nn.Module | None, Optimizer | None]] | None = None

    # --- hooks -----------------------------------------------------------------------------------

    def watch(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Install the hooks, until `close` or until the counter is deleted."""
        whole, owner = weakref.ref(model), weakref.ref(optimizer)
        self._watched = lambda: (whole(), owner())
        # tracing the bookkeeping into a compiled model would recompile it at every step
        outside = torch.compiler.disable(_call)
        for name, module in _watchable(model):
            before = _Before(name, module, self._running)
            after = _After(name, module, self._running, outside, self, optimizer)
            self._handles += [
                (name, module.register_forward_pre_hook(before)),
                (name, module.register_forward_hook(after, with_kwargs=True, always_call=True)),
            ]
        weakref.finalize(self, _remove, self._handles).atexit = False

    @property
    def watching(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._handles)

    def close(self) -> None:
        """Remove the hooks; pending passes no longer count."""
        _remove(self._handles)
        self._forget()

    def _watch_less(self) -> None:
        """Remove the hooks inside of submodules that were counted."""
        model, _ = self._models()
        if model is None:
            return
        counted = [name for _, name in self._passes]
        # code that was compiled with hooks would be compiled again; there, they cost nothing
        compiled = [name for name, module in model.named_modules() if _is_compiled(module)]
        entries = [
            (entry, _is_inside(entry[0], counted) and not _is_inside(entry[0], compiled))
            for entry in self._handles
        ]
        self._handles[:] = [entry for entry, spare in entries if not spare]
        _remove([entry for entry, spare in entries if spare])

    def _models(self) -> tuple[nn.Module | None, Optimizer | None]:
        return (None, None) if self._watched is None else self._watched()

    def _watch_all(self) -> None:
        model, optimizer = self._models()
        if model is not None and optimizer is not None:
            self.close()
            self.watch(model, optimizer)

    def keep_hooks(self) -> None:
        """Leave the hooks where they are, also after the first step."""
        self._prunes = False

    # --- counting --------------------------------------------------------------------------------

    def use(self) -> None:
        """Let the next gradient start a new count, after a step."""
        if self._prunes:
            if self._used:
                self._prunes = False
                self._watch_all()
            else:
                self._watch_less()
        self.start_anew()

    def start_anew(self) -> None:
        """Let the next gradient start a new count."""
        self._used = True
        self._running.clear()  # a forward pass may have been interrupted

    def take_turn(self) -> int:
        """Return the number of a forward pass."""
        self._turn += 1
        return self._turn

    def measured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Return the batch size of a forward's inputs."""
        more = {"keywords": kwargs} if self._takes_keywords else {}
        return self.measure((*args, *kwargs.values()), **more)

    def add(
        self, key: tuple[bool, str], turn: int, samples: int, counted_in: int, cleared: bool
    ) -> int:
        """Count a forward pass when its gradient arrives.

        Args:
            key: Whether it goes on with the samples of other passes, and the submodule's name.
            turn: Its number.
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
            self._passes.clear()
            self._used = False
            self._generation += 1
        self._backward = backward
        if counted_in != self._generation:
            first, counted = self._passes.get(key, (turn, 0))
            self._passes[key] = min(first, turn), counted + samples
            self.count = self._passes[self._deciding()][1]
        return self._generation

    def _deciding(self) -> tuple[bool, str]:
        """Return which of the passes count."""
        starting = [key for key in self._passes if not key[0]] or list(self._passes)
        # checkpoints and compiled models may run submodules by themselves
        names = [name for _, name in starting]
        outermost = [key for key in starting if not _is_inside(key[1], names)]
        return min(outermost, key=lambda key: self._passes[key][0])

    def __getstate__(self) -> dict[str, Any]:
        """Drop what belongs to one model: a copy has to `watch` its own."""
        return {k: v for k, v in self.__dict__.items() if k not in _OF_ONE_MODEL}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        self.__dict__.update(state)
        self._forget()


_OF_ONE_MODEL = ("_handles", "_running", "_watched")


def is_complete(model: nn.Module) -> bool:
    """Return whether all modules of a model have been restored, so that they can have hooks."""
    known, waiting = set(), [model]
    while waiting:
        module = waiting.pop()
        if not {"_forward_hooks", "_forward_pre_hooks", "_modules"} <= vars(module).keys():
            return False
        if module not in known:
            known.add(module)
            waiting += [child for child in module._modules.values() if child is not None]
    return True


def _takes_keywords(measure: GetBatchSize) -> bool:
    try:
        return "keywords" in inspect.signature(measure).parameters
    except (TypeError, ValueError):  # of some built-in functions
        return False


def _watchable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the model and its submodules with parameters, with their names."""
    for name, module in model.named_modules():
        has_parameters = next(module.parameters(), None) is not None
        if not name or (has_parameters and not isinstance(module, torch.jit.ScriptModule)):
            yield name, module


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _is_inside(name: str, others: list[str]) -> bool:
    """Return whether the module of a name is a part of one of the others; "" is the model."""
    return any(name != other and (not other or name.startswith(f"{other}.")) for other in others)


def _remove(handles: list[tuple[str, Any]]) -> None:
    for _, handle in handles:
        handle.remove()
    handles.clear()


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


class _Hook:
    """A hook, which holds weak references to models only, and whose copies do nothing."""

    def __init__(self, name: str, module: nn.Module, running: dict[int, str]) -> None:
        self.name, self.module, self.running = name, weakref.ref(module), running

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_hook, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _do_nothing


class _Before(_Hook):
    """Notes which module the running forward pass started with, in each thread."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        # compiled code must not be interrupted inside of the model
        if torch.compiler.is_compiling():
            return
        thread = get_ident()
        if thread not in self.running and self.module() is module:
            self.running[thread] = self.name


class _After(_Hook):
    """Lets gradients that flow back through the outputs of a forward pass count it."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        running: dict[int, str],
        outside: Callable[..., Any],
        counter: BatchSizeCounter,
        optimizer: Optimizer,
    ) -> None:
        super().__init__(name, module, running)
        self.outside, self.counter = outside, weakref.ref(counter)
        self.optimizer = weakref.ref(optimizer)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        compiled = torch.compiler.is_compiling()
        if self.name and (compiled or self.running.get(get_ident()) != self.name):
            return
        self.outside(self._observe, compiled, module, args, kwargs, output)

    def _observe(
        self,
        compiled: bool,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        counter, optimizer = self.counter(), self.optimizer()
        if counter is None or optimizer is None or self.module() is not module:
            return
        if compiled:
            counter.keep_hooks()
        if self.running.get(get_ident()) == self.name:
            del self.running[get_ident()]
        # a hook on a leaf is never removed; functional transforms keep their own gradients
        outputs = [t for t in tensors_in(output) if t.grad_fn is not None and not _is_wrapped(t)]
        if not outputs or not module.training:
            return
        continues = False
        if self.name:
            if not any(p in optimizer.state for p in module.parameters()):
                return
            continues = any(t.grad_fn is not None for t in tensors_in((args, kwargs)))
        try:
            samples = counter.measured(args, kwargs)
        except Exception:
            # it may be meant for the inputs of the model alone
            if self.name:
                return
            raise
        turn, counted_in = counter.take_turn(), -1

        def count(_: Tensor) -> None:
            nonlocal counted_in
            key = (continues, self.name)
            counted_in = counter.add(key, turn, samples, counted_in, self._cleared())

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
