"""SAM: steps by the gradient at the perturbed parameters, where the loss is high nearby."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from structprecond.core.agreement import Facts
from structprecond.core.boxes import is_dtensor, local
from structprecond.core.warn import warn
from structprecond.errors import GradientError, StructPrecondError
from structprecond.linalg.precision import without_autocast
from structprecond.sharpness import arguments
from structprecond.sharpness.batch_norm import freeze_batch_norm
from structprecond.sharpness.perturbation import Part, total_norm
from structprecond.sharpness.together import agree, agree_on_parts, would_not_notice

_TINY = 1e-12
# the attributes that copies and pickles keep, without hooks and a scheduler's wrapper
_COPIED = ("base_optimizer", "skipped", "_own_defaults", "_model", "_old", "_failed", "_warned")
# the base makes and loads state dicts, so it runs their hooks
_KINDS = "state_dict_pre state_dict_post load_state_dict_pre load_state_dict_post".split()
_HOOKS_OF_BASE = tuple(f"_optimizer_{kind}_hooks" for kind in _KINDS)


def _of_base(name: str) -> Any:
    """Return a property for an attribute of the base, which loading may replace."""
    return property(
        lambda sam: getattr(sam.base_optimizer, name),
        lambda sam, value: setattr(sam.base_optimizer, name, value),
        doc=f"The `{name}` of the base optimizer.",
    )


class SAM(Optimizer):
    r"""Sharpness-aware minimization around any optimizer.

    With the gradient g of all parameters, and \(T = |p|\) elementwise if `adaptive`, else
    \(T = 1\), the perturbation is

    \[ e = \frac{\rho}{\|T g\|_2 + 10^{-12}} \, T^2 g. \]

    The base optimizer steps from p by the gradient at \(p + e\), or at \(p - e\) if it maximizes.
    A parameter without a gradient in the first pass is not perturbed.

    Pass a closure to `step`, or compute both gradients yourself:

    ```python
    for x, y in batches:
        sam.zero_grad()
        loss(model(x), y).backward()
        sam.first_step(zero_grad=True)
        with freeze_batch_norm(model):
            loss(model(x), y).backward()
        sam.second_step()
    ```

    Non-finite gradients in either pass skip the whole step. After an exception, the parameters get
    their exact old values back. docs/sam.md has recipes for `GradScaler`, DDP and checkpoints.

    Args:
        params: Parameters, named parameters, group dicts or the model, for the class
            `base_optimizer`; torch's optimizers get the parameters of a model. Group dicts may have
            their own `rho` and `adaptive`. None if `base_optimizer` is an instance.
        base_optimizer: The optimizer that makes the step: a class, or an instance such as
            `SOAP(model, some_of_its_parameters)`. The param groups of an instance keep their own
            `rho` and `adaptive`.
        rho: The size \(\rho\) of the neighbourhood, at least 0. Adaptive SAM needs about ten times
            the rho of plain SAM. Default: 0.05.
        adaptive: Whether the neighbourhood scales with the parameters (adaptive SAM).
            Default: True.
        **base_kwargs: The other arguments of the class `base_optimizer`.

    Attributes:
        base_optimizer: The base, which owns `param_groups`, `state` and `defaults`.
        skipped: The number of steps skipped because of a non-finite gradient.

    Raises:
        StructPrecondError: If an argument is invalid.

    Source: Foret et al. 2021, "Sharpness-Aware Minimization for Efficiently Improving
    Generalization" (arXiv 2010.01412); adaptive: Kwon et al. 2021, "ASAM" (arXiv 2102.11600).

    Example:
        >>> model = nn.Linear(3, 1)
        >>> sam = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
        >>> def closure():
        ...     loss = model(torch.ones(8, 3)).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> first = sam.step(closure)
        >>> bool(sam.step(closure) < first)
        True
    """

    _step_supports_amp_scaling = True  # GradScaler then tells `step` of infinities and the scale

    param_groups = _of_base("param_groups")
    state = _of_base("state")
    defaults = _of_base("defaults")

    def __init__(
        self,
        params: nn.Module | Iterable[Any] | None,
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        adaptive: bool = True,
        **base_kwargs: Any,
    ) -> None:
        own_defaults = arguments.checked_settings({"rho": rho, "adaptive": adaptive})
        if isinstance(base_optimizer, SAM) or base_optimizer is SAM:
            raise StructPrecondError(
                "base_optimizer is a SAM, expected the optimizer that makes the step. Pass that "
                "optimizer, or its class."
            )
        if isinstance(base_optimizer, Optimizer):
            base = base_optimizer
            arguments.check_instance(base, params, base_kwargs)
            settings = [arguments.checked_settings(group) for group in base.param_groups]
        elif isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer):
            given, settings = arguments.split_params(params, base_optimizer)
            base = base_optimizer(given, **base_kwargs)
        else:
            raise StructPrecondError(
                f"base_optimizer takes an optimizer or its class, got {base_optimizer!r}. Pass the "
                "class, as in SAM(params, torch.optim.SGD, lr=0.1)."
            )
        if clash := sorted(set(arguments.SETTINGS) & set(base.defaults)):
            raise StructPrecondError(
                f"{type(base).__name__} has hyperparameters {clash}, as SAM does. Choose another "
                "base optimizer."
            )
        if len(settings) != len(base.param_groups):
            if any(settings):
                raise StructPrecondError(
                    f"{type(base).__name__} made {len(base.param_groups)} param groups from "
                    f"{len(settings)}, so SAM cannot assign their rho and adaptive. Set these in "
                    "the param_groups of an instance, and pass that."
                )
            settings = [{} for _ in base.param_groups]
        for group, own in zip(base.param_groups, settings, strict=True):
            group.update(own_defaults | own)
        model = params if isinstance(params, nn.Module) else getattr(base, "model", None)
        self.base_optimizer: Optimizer = base
        self.skipped = 0
        self._own_defaults = own_defaults
        self._model = model if isinstance(model, nn.Module) else None
        # while a first step is pending: the old parameters, and whether the norm is non-finite
        self._old: dict[Tensor, Tensor] | None = None
        self._failed = self._warned = False
        self.__setstate__({})  # the hooks; Optimizer.__init__ would make groups and state as well

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the base, optionally with its own `rho` and `adaptive`.

        Raises:
            StructPrecondError: If the group is invalid; then nothing is added.
        """
        if not isinstance(param_group, Mapping):
            raise StructPrecondError(f"A param group is a dict with 'params', got {param_group!r}.")
        settings = self._own_defaults | arguments.checked_settings(param_group)
        self.base_optimizer.add_param_group(arguments.without_settings(param_group))
        self.param_groups[-1].update(settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as `torch.optim.Optimizer.zero_grad`."""
        self.base_optimizer.zero_grad(set_to_none)

    # --- the step --------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Make both passes with a closure, or complete the step after `first_step`.

        Args:
            closure: Computes the loss and the gradients. It is called twice, each time with cleared
                gradients. The second call freezes batch-norm statistics if the model is known, as
                `params` or as the base's `model`.

        Returns:
            The loss from the first call of the closure.

        Raises:
            StructPrecondError: If there is neither a closure nor a pending `first_step`.
            GradientError: If a gradient is unusable.
        """
        try:
            loss = None if closure is None else self._both_passes(closure)
            with without_autocast():
                self._complete()
            return loss
        except BaseException:
            self.restore()
            # otherwise it would multiply the scale of the next step
            self.__dict__.pop("grad_scale", None)
            raise

    @torch.no_grad()
    @without_autocast()
    def first_step(self, zero_grad: bool = False) -> None:
        """Go from the parameters p to p + e, after restoring those of a pending first step.

        Args:
            zero_grad: Whether to clear the gradients afterwards. Default: False.

        Raises:
            GradientError: If a gradient is sparse or complex; the parameters stay at p.
        """
        self.restore()
        parts = agree_on_parts(self.base_optimizer, self._parts)
        norm, unit = total_norm(parts)
        # from here on the step is pending
        self._old, self._failed = {}, not math.isfinite(norm)
        if self._failed:
            self.skipped += 1
        else:
            try:
                self._old = {p: local(p).clone() for part in parts for p in part.whole}
                for part in parts:
                    part.perturb(norm + _TINY / unit)
            except BaseException:
                self.restore()
                raise
        if zero_grad and self._failed:
            torch._foreach_mul_(_local_grads(self._with_gradient()), math.nan)
        elif zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to the parameters p, and step by the gradients at p + e.

        Args:
            zero_grad: Whether to clear the gradients afterwards. Default: False.

        Raises:
            StructPrecondError: If there is no pending `first_step`.
        """
        self.step()  # by that name, so that hooks and learning rate schedulers see it
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    @without_autocast()
    def restore(self) -> None:
        """Undo a pending `first_step`: the parameters get their exact old values back."""
        self._go_back()
        self._old = None

    def _go_back(self) -> None:
        if self._old:
            torch._foreach_copy_([*map(local, self._old)], [*self._old.values()])

    def _both_passes(self, closure: Callable[[], float]) -> float:
        self.restore()
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        if not self._failed:
            self.zero_grad()
            frozen = nullcontext() if self._model is None else freeze_batch_norm(self._model)
            with torch.enable_grad(), frozen:
                closure()
        return loss

    def _complete(self) -> None:
        """Make the second step; the caller restores if it raises."""
        # no rank may wait for the others in the base if one of them skips the step
        base = self.base_optimizer
        grads, (failures, overflows) = agree(base, self._second_pass, "second step of SAM")
        self._go_back()
        if failures or overflows or would_not_notice(base, self._with_gradient()):
            self.skipped += not self._failed
            if not overflows:  # an overflow is normal under a scaler
                self._warn("first" if failures else "second")
        else:
            if (scale := getattr(self, "grad_scale", None)) is not None and grads:
                torch._foreach_mul_(grads, 1 / float(scale))
            assert self._old is not None
            new = set(self._with_gradient()) - self._old.keys()
            self._old |= {p: local(p).clone() for p in new}
            base.step()
        self._old = None

    def _second_pass(self) -> tuple[list[Tensor], Facts, tuple[int, int]]:
        """Return the gradients, and whether the first pass failed or the second overflowed."""
        if self._old is None:
            raise StructPrecondError(
                "SAM has nothing to complete: no first step is pending. Call first_step() before "
                "step() or second_step(), or pass a closure to step()."
            )
        grads = _local_grads(self._with_gradient())
        overflow = bool(getattr(self, "found_inf", False))
        scaled = getattr(self, "grad_scale", None) is not None
        if scaled and any(g.dtype == torch.float16 for g in grads):
            raise GradientError(
                "Gradients are float16, which lose small values when unscaled. Keep the parameters "
                "in float32 and run the forward pass under torch.autocast."
            )
        return grads, {}, (int(self._failed), int(overflow))

    def _warn(self, which: str) -> None:
        if self._warned:
            return
        self._warned = True
        warn(
            f"SAM skipped a step, because a gradient of the {which} pass was not finite. The step "
            "left parameters and state unchanged. Later skips give no warning; sam.skipped counts "
            "them."
        )

    def _parts(self) -> list[Part]:
        """Return the perturbed parameters in parts of the same group, device and dtype."""
        base_maximizes = getattr(self.base_optimizer, "maximize", False)
        parts = []
        for group in self.param_groups:
            settings = self._own_defaults | arguments.checked_settings(group)
            sign = -1 if group.get("maximize", base_maximizes) else 1
            alike: dict[Any, list[nn.Parameter]] = {}
            for p in self._with_gradient([group]):
                if p.requires_grad:  # else its gradient is stale
                    placed = (p.device_mesh, p.placements) if is_dtensor(p) else None
                    alike.setdefault((p.device, p.dtype, placed), []).append(p)
            rho, adaptive = sign * settings["rho"], settings["adaptive"]
            for params in alike.values():
                grads = [g.float() if g.itemsize < 4 else g for g in _local_grads(params)]
                parts.append(Part(rho, adaptive, [*map(local, params)], grads, params))
        return parts

    def _with_gradient(self, groups: Iterable[dict[str, Any]] | None = None) -> list[nn.Parameter]:
        """Return the parameters that have a gradient.

        Raises:
            GradientError: If a gradient is sparse or complex.
        """
        found = []
        for group in self.param_groups if groups is None else groups:
            for p in group["params"]:
                if p.grad is None or not p.numel():
                    continue
                if p.grad.layout != torch.strided or p.grad.is_complex():
                    raise GradientError(
                        f"The gradient of a parameter of shape {tuple(p.shape)} has the layout "
                        f"{p.grad.layout} and dtype {p.grad.dtype}, expected a dense, real one. "
                        "Build embeddings with sparse=False, and split complex parameters."
                    )
                found.append(p)
        return found

    # --- checkpoints and copies ------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict; its param groups have `rho` and `adaptive`."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state dict of a SAM, or of a base alone, which keeps `rho` and `adaptive`.

        Raises:
            StructPrecondError: If a first step is pending: its old parameters would overwrite
                those of a model that was loaded before.
        """
        if self._old is not None:
            raise StructPrecondError(
                "A state dict cannot be loaded between first_step() and second_step(), while the "
                "parameters are perturbed. Call restore(), then load the model and the optimizer."
            )
        before = self.param_groups
        self.base_optimizer.load_state_dict(state_dict)
        for group, old in zip(self.param_groups, before, strict=True):
            for name, default in self._own_defaults.items():
                group.setdefault(name, old.get(name, default))

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, a pending first step included."""
        return {name: self.__dict__[name] for name in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or pickle."""
        self.__dict__.update(state)
        super().__setstate__({name: getattr(self.base_optimizer, name) for name in _HOOKS_OF_BASE})

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.base_optimizer!r}"


def _local_grads(params: Iterable[Tensor]) -> list[Tensor]:
    return [local(p.grad) for p in params if p.grad is not None]
