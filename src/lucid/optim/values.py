"""Values that users give, read and shown without trusting them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from lucid import engine

Name = TypeVar("Name", bound=str)

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


def as_float(number: Any) -> float:
    """Return a real number as a float, as an infinity where it is beyond them."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def checked_number(name: str, value: Any, below: float = math.inf) -> float:
    """Return a hyperparameter as a float; raise unless it is in [0, below)."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: expected a number{' or a 0-dim Tensor' * (name == 'lr')}, got {shown(value)}")
    number = as_float(value)
    if not 0.0 <= number < below:
        raise ValueError(f"{name}: expected a number in [0, {below:g}), got {shown(value)}")
    return number


def checked_lr(value: Any) -> float:
    """Return a learning rate, a number or a tensor of one, as a float; this waits for the device that it is on."""
    number = number_in(value) if isinstance(value, Tensor) else None
    return checked_number("lr", value if number is None else number)


def is_on(device: torch.device | None, value: Any) -> TypeGuard[Tensor]:
    """Whether `value` is one real number on `device`, which the device can read by itself."""
    return (
        isinstance(value, Tensor)
        and value.device == device
        and value.numel() == 1
        and not value.is_complex()
        and _readable(value)
    )


def one_of(name: str, value: Any, allowed: Sequence[Name]) -> Name:
    """Return `value`; raise unless it is one of the names that are allowed."""
    for each in allowed:
        if isinstance(value, str) and value == each:
            return each
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def checked_flag(name: str, value: Any) -> bool:
    """Return `value`; raise unless it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")
    return value


def _readable(tensor: Tensor) -> bool:
    """Whether it has numbers, in memory of its own: to read where there is none may end the process."""
    if not engine.is_plain(tensor) or tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    return tensor._is_zerotensor() or engine.has_memory(tensor)
