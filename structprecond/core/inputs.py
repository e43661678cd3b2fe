"""Measures the inputs of a forward pass: its samples, or its tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from structprecond.errors import StructPrecondError

GetBatchSize = Callable[..., int]
"""From the tuple of a forward's inputs to their number; also from `keywords`, if it takes these."""

_IGNORED = -100  # the label that torch's losses ignore


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
    for tensor in tensors_in(inputs):
        if tensor.ndim > 0:
            return tensor.shape[0]
    raise _nothing_to_count("a tensor with a batch dimension", inputs)


def get_token_count(inputs: tuple[Any, ...], keywords: Mapping[str, Any] | None = None) -> int:
    """Return the number of tokens among a language model's inputs, for losses that are token means.

    Pass it as `batch_size=`. These are looked up by name, in the keyword inputs and in dicts among
    the others; the first one that there is decides:

    1. `labels` of integers: the labels other than -100, which losses ignore. (The first label of
       each sequence counts, although causal models have no prediction for it.)
    2. `attention_mask` `(batch, length)` of integers or bools: its entries other than zero.
    3. The first tensor of integers: the size of its dimensions 0 and 1, padding included.

    Counting labels or a mask on an accelerator waits for it.

    Args:
        inputs: The positional inputs of the model's `forward`, followed by the values of the
            keyword inputs; tensors may be nested in tuples, lists and dicts.
        keywords: The keyword inputs by name.

    Raises:
        StructPrecondError: If there is no tensor of integers with a dimension.

    Example:
        >>> tokens = torch.zeros(8, 100, dtype=torch.int64)
        >>> get_token_count((tokens,))
        800
        >>> mask = torch.ones(8, 100, dtype=torch.int64).tril()
        >>> get_token_count((tokens, mask), {"input_ids": tokens, "attention_mask": mask})
        36
    """
    named: dict[str, Any] = {}
    for mapping in (*(value for value in inputs if isinstance(value, Mapping)), keywords or {}):
        named |= mapping
    labels, mask = named.get("labels"), named.get("attention_mask")
    if isinstance(labels, Tensor) and labels.ndim > 0 and _has_integers(labels):
        return int((labels != _IGNORED).sum())
    # masks of floats are added to scores: their zeros are what counts
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
        return int(mask.count_nonzero())
    for tensor in tensors_in(inputs):
        if tensor.ndim > 0 and _has_integers(tensor):
            return prod(tensor.shape[:2])
    raise _nothing_to_count("a tensor of integers", inputs)


def _has_integers(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _nothing_to_count(expected: str, inputs: tuple[Any, ...]) -> StructPrecondError:
    return StructPrecondError(
        f"Expected {expected} among the model's inputs, got "
        f"{[type(i).__name__ for i in inputs]}. Pass batch_size= as an integer, or as a callable "
        "that takes the tuple of inputs."
    )


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested containers, and in the attributes of objects in them."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type):
            yield from (t for t in tree_leaves(vars(leaf)) if isinstance(t, Tensor))
