"""Kinds of layers, by the classes of modules."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from structprecond.roles.names import DEPTHWISE, kind, says

RNNS = (nn.RNNBase, nn.RNNCellBase)
BLOCKS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
PLAIN = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer, such as GPT-2's `Conv1D` (transposed weight)."""
    return isinstance(module, nn.Linear) or kind(module).endswith(("Linear", "Conv1D"))


def is_conv(module: nn.Module) -> bool:
    """Return whether a module is one of torch's convolutions, or of a subclass."""
    return isinstance(module, _ConvNd)


def is_depthwise(module: nn.Module) -> bool:
    """Return whether a module convolves each channel separately."""
    # a convolution of a single channel also has one group per channel
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels


def is_pointwise(module: nn.Module) -> bool:
    """Return whether a module is a convolution of size 1, a linear map of the channels."""
    if not isinstance(module, _ConvNd) or module.transposed or module.groups != 1:
        return False
    return all(size == 1 for size in module.kernel_size)


def is_embedding(module: nn.Module) -> bool:
    """Return whether a module is a table with one row per token, word or position."""
    named = kind(module).endswith("Embedding") and not isinstance(module, nn.Linear)
    return named or isinstance(module, nn.Embedding | nn.EmbeddingBag)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalizes features."""
    name = kind(module)
    named = "Norm" in name and not name.endswith(("MLP", "Block", "Attention"))
    known = is_linear(module) or is_embedding(module) or is_conv(module)
    return isinstance(module, _NORMS) or (named and not known)


def is_layer_of_torch(module: nn.Module) -> bool:
    """Return whether a module is a layer of torch, such as `Bilinear`, and not a container."""
    general = (nn.Module, nn.ParameterList, nn.ParameterDict, *PLAIN)
    of_torch = type(module).__module__.startswith("torch.nn.") and type(module) not in general
    return of_torch or is_linear(module)


def is_called_depthwise(module: nn.Module, name: str) -> bool:
    """Return whether the class or name of a custom layer is that of a depthwise convolution."""
    return says(DEPTHWISE, kind(module), name)


def io_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the numbers of inputs and outputs of a linear layer; None if they are unclear."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim != 2:
        return None
    inputs, outputs = weight.shape if kind(module).endswith("Conv1D") else weight.shape[::-1]
    return inputs, outputs
