"""What ``torch.load(weights_only=True)`` reads, and numpy's numbers as Python's.

Hyperparameters used to be saved as they came. Where a scheduler or a configuration gave numpy's numbers, the file names
functions of numpy, which torch refuses. Nothing of numpy is called for them here: the bytes of a number are unpacked.
"""

from __future__ import annotations

import pickle
import re
import struct
from pathlib import Path
from typing import IO, Any

import torch

# struct's letter for each of numpy's kinds of number.
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
    """Stands in for ``numpy.dtype``, of which only a number's kind and the order of its bytes are used."""

    def __init__(self, kind: Any, *_: Any) -> None:
        if not isinstance(kind, str) or kind not in _LETTERS:
            raise pickle.UnpicklingError(f"it holds a value of numpy of the dtype {kind!r:.100}, which is no number")
        self.letter, self.order = _LETTERS[kind], "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if isinstance(state, tuple) and state[1:2] == (">",) else "<"

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("it holds a dtype of numpy, which is no plain value")


def _number(dtype: Any, data: Any) -> float | int | bool:
    """Stands in for numpy's function that makes a scalar of its dtype and bytes."""
    try:
        (value,) = struct.unpack(dtype.order + dtype.letter, data)
    except (AttributeError, TypeError, struct.error) as error:
        raise pickle.UnpicklingError("it holds a number of numpy whose bytes are not those of its dtype") from error
    number: float | int | bool = value
    return number


_STAND_INS: list[Any] = [
    (_Dtype, "numpy.dtype"),
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),  # of numpy 1
]


def load(file: Path | IO[bytes], **options: Any) -> Any:
    """Return what ``torch.save`` wrote into `file`, numbers of numpy as Python's.

    Parameters
    ----------
    file : path or binary file
        A file can be sought.
    **options
        ``map_location`` and ``mmap`` of ``torch.load``.

    Raises
    ------
    UnpicklingError
        Where it holds more than tensors and plain values.
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
