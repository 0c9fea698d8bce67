"""Values that users give, read and shown without trusting them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LONGEST = 500  # characters of a value in a message


def shown(value: Any) -> str:
    """Return how messages show a value; of a tensor that is large, or cannot be read, what it is."""
    if isinstance(value, Tensor) and (value.numel() > 8 or not _readable(value)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:
        single = isinstance(value, Tensor) and value.numel() == 1
        text = f"tensor({value.item()!r})" if single else repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def number_in(tensor: Tensor) -> float | None:
    """Return the real number that is all of `tensor`, or None where it is not one, or cannot be read."""
    if tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool or not _readable(tensor):
        return None
    try:
        return float(tensor.detach().item())
    except (TypeError, ValueError, RuntimeError):
        return None


def checked_flag(name: str, value: Any) -> bool:
    """Return `value`; raise unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")
    return value


def _readable(tensor: Tensor) -> bool:
    """Whether it has numbers, in memory of its own: to read where there is none may end the process."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ or tensor.is_meta:
        return False
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    if tensor._is_zerotensor() or not tensor.numel():
        return True
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() >= (tensor.storage_offset() + last + 1) * tensor.element_size()
