"""Powers of entries, the same bits wherever an entry is in a stack."""

from __future__ import annotations

from torch import Tensor


def entrywise_power(x: Tensor, exponent: float) -> Tensor:  # any shape
    r"""Return \(x_i^p\) for each entry of a tensor of nonnegative numbers.

    On the CPU, torch computes most entries with vector instructions and the last ones without,
    which rounds differently: the bits of a row would depend on its place in the stack. Rounded from
    float64, float32 numbers are the same. Float64 numbers may differ in the last bit.

    Args:
        x: The numbers \(x_i\).
        exponent: The exponent \(p\).

    Example:
        >>> entrywise_power(torch.tensor([1.0, 16.0]), -0.25)
        tensor([1.0000, 0.5000])
    """
    wide = x.double() if x.device.type == "cpu" else x
    return wide.pow(exponent).to(x.dtype)
