"""Reads files as ``torch.load(weights_only=True)`` does, and also numbers of numpy, as Python's.

Older releases saved hyperparameters as they were given. If a scheduler or a configuration gave numbers of numpy, the
file names functions of numpy, which torch does not load. This module calls no function of numpy: it unpacks the bytes
of each number.
"""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import IO, Any

import torch

# The format letter of the module struct for each of numpy's number types.
_LETTERS = {
    "f2": "e",
    "f4": "f",
    "f8": "d",
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
}
_NUMPY_NUMBER = re.compile(r"GLOBAL numpy\.(_core|core)\.multiarray\.scalar\b")


class _Dtype:
    """Stands in for ``numpy.dtype``; only the number type and the byte order are used."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if not isinstance(kind, str) or kind not in _LETTERS:
            raise pickle.UnpicklingError(f"it holds a numpy value of dtype {kind!r:.100}, which is not a number")
        self.letter, self.order = _LETTERS[kind], "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if isinstance(state, tuple) and state[1:2] == (">",) else "<"

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("it holds a numpy dtype, which is not a plain value")


def _number(dtype: Any, data: Any) -> float | int | bool:
    """Stands in for numpy's function that makes a scalar from a dtype and bytes."""
    try:
        (value,) = struct.unpack(dtype.order + dtype.letter, data)
    except (AttributeError, TypeError, struct.error) as error:
        raise pickle.UnpicklingError("it holds a numpy number whose bytes do not fit its dtype") from error
    number: float | int | bool = value
    return number


_STAND_INS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),  # its name in numpy 1
]


def load(file: Path | IO[bytes], **options: Any) -> Any:
    """Return what ``torch.save`` wrote into `file`; numbers of numpy become Python's.

    Parameters
    ----------
    file : path or binary file
        A binary file must be seekable.
    **options
        ``map_location`` and ``mmap`` of ``torch.load``.

    Raises
    ------
    UnpicklingError
        If the file contains more than tensors and plain values.
    """
    try:
        return torch.load(file, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        if _NUMPY_NUMBER.search(str(error)) is None:
            raise
    if not isinstance(file, Path):
        file.seek(0)
    with torch.serialization.safe_globals(_STAND_INS):
        return torch.load(file, weights_only=True, **options)
