"""Values that users give: how to check, read and print them safely, and how to make them plain for saving."""

from __future__ import annotations

import math
import numbers
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from torch import Tensor

from .row import has_memory, is_plain

Name = TypeVar("Name", bound=str)

LONGEST = 500  # characters of a value in an error message


def shown(value: Any) -> str:
    """Return a value as text for a message; for a large or unreadable tensor, its class, shape and dtype."""
    if isinstance(value, Tensor) and (value.numel() > 8 or not readable(value)):
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and dtype {value.dtype}"
    try:
        single = isinstance(value, Tensor) and value.numel() == 1
        text = f"tensor({value.item()!r})" if single else repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def number_in(tensor: Tensor) -> float | None:
    """Return the only element of `tensor` as a real number, or None if it has no such element or is unreadable."""
    if tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool or not readable(tensor):
        return None
    try:
        return float(tensor.detach().item())
    except (TypeError, ValueError, RuntimeError):
        return None


def as_float(number: Any) -> float:
    """Return a real number as a float, or as an infinity if it is too large."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def checked_number(name: str, value: Any, below: float = math.inf) -> float:
    """Return a hyperparameter as a float; raise unless it is in [0, below)."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name}: expected a number{' or a 0-dim Tensor' * (name == 'lr')}, got {shown(value)}")
    number = value if type(value) is float else as_float(value)
    if not 0.0 <= number < below:
        raise ValueError(f"{name}: expected a number in [0, {below:g}), got {shown(value)}")
    return number


def checked_lr(value: Any) -> float:
    """Return a learning rate, a number or a one-element tensor, as a float; for a tensor, wait for its device."""
    number = number_in(value) if isinstance(value, Tensor) else None
    return checked_number("lr", value if number is None else number)


def is_on(device: torch.device | None, value: Any) -> TypeGuard[Tensor]:
    """Whether `value` is a tensor of one real number on `device`, which a kernel can read."""
    return (
        isinstance(value, Tensor)
        and value.device == device
        and value.numel() == 1
        and not value.is_complex()
        and readable(value)
    )


def one_of(name: str, value: Any, allowed: Sequence[Name]) -> Name:
    """Return `value`; raise unless it is one of the `allowed` names."""
    for each in allowed:
        if isinstance(value, str) and value == each:
            return each
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {shown(value)}")


def checked_flag(name: str, value: Any) -> bool:
    """Return `value`; raise unless it is True or False."""
    if value is True or value is False:  # the fast path, because every step checks its flags
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name}: expected True or False, got {shown(value)}")
    return bool(value)


def plain(value: Any) -> Any:
    """Return `value` in plain Python and tensors, which ``torch.load(weights_only=True)`` reads.

    If `value` is plain already, the same object is returned. Arrays become numbers or lists. Other kinds of dict and
    list become plain ones. Anything else is returned as it is.
    """
    if value is None or type(value) in _PLAIN or isinstance(value, Tensor):
        return value
    if isinstance(value, np.ndarray):
        return plain(value.item() if value.size == 1 else value.tolist())
    for kind, read in _READ.items():
        if isinstance(value, kind):
            return read(value)
    if isinstance(value, Mapping):
        keys, values = [_plain_key(key) for key in value], plain(list(value.values()))
        same = type(value) in (dict, OrderedDict) and _same(keys, value) and _same(values, value.values())
        return value if same else dict(zip(keys, values, strict=True))
    if isinstance(value, Sequence | AbstractSet) and not isinstance(value, bytes | bytearray | memoryview):
        items = [_plain_key(item) if isinstance(value, AbstractSet) else plain(item) for item in value]
        if type(value) in (list, tuple, set, torch.Size) and _same(items, value):
            return value
        return tuple(items) if isinstance(value, tuple) else set(items) if isinstance(value, AbstractSet) else items
    return value


_PLAIN = (bool, int, float, complex, str, bytes)
# Converts numbers and strings of other libraries to Python's own: the first kind that fits decides.
_READ: dict[type, Callable[[Any], Any]] = {
    np.bool_: bool,
    numbers.Integral: int,
    numbers.Real: as_float,
    numbers.Complex: complex,
    str: str.__str__,
    bytes: bytes,
}


def _plain_key(key: Any) -> Any:
    """Return the key of a dict or set as `plain` does; where that cannot be a key, as of a frozenset, a tuple."""
    made = plain(key)
    try:
        hash(made)
    except TypeError:
        return key if isinstance(key, Mapping) else tuple(_plain_key(item) for item in key)
    return made


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(a is b for a, b in zip(one, other, strict=True))


def readable(tensor: Tensor) -> bool:
    """Whether a tensor has values in memory. To read a tensor without memory may crash the process."""
    if not is_plain(tensor) or tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
        return False
    return tensor._is_zerotensor() or has_memory(tensor)
