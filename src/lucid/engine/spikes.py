"""Whether a gradient norm is out of line with those before it: the rule of ``spike_threshold``, and its memory.

The memory is a list of four numbers: the mean of the norms, the mean of their squared distances from it, how many
norms it has seen, and how many spikes came in a row. With n the norm and τ the threshold, in float64:

    spike     if WARM_UP norms have been seen and n > mean + τ·(√square + mean / 2)
    else      w = 1 / (seen + 1), at least 1 / SPAN;  d = n - mean
              square = square + w·(d·d - square), after the first norm
              mean   = mean + w·d

After `MOST_IN_A_ROW` spikes the memory is blank again. Norms of 0, those that are not finite, and those of steps that
are skipped for another reason change nothing. A norm of `TOO_LARGE` or more can be a spike, but never changes the
means. The kernel ``is_spike`` in ``engine/cuda/decide.py`` follows the same rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .numbers import Kept, Told

WARM_UP = 64
SPAN = 128
MOST_IN_A_ROW = 16
TOO_LARGE = 2.0**511  # the square of a distance below it is finite


class Memory(NamedTuple):
    """What the norms so far have left."""

    mean: float = 0.0
    square: float = 0.0
    seen: int = 0
    in_a_row: int = 0


class Judged(NamedTuple):
    """Whether a step is a spike, the memory after it, and whether that is blank because spikes came in a row."""

    spike: bool
    memory: Memory
    anew: bool = False


def judged(norm: float, threshold: float, memory: Memory) -> Judged:
    """Judge the norm of a step that nothing else leaves out."""
    mean, square, seen, in_a_row = memory
    if not 0 < norm < math.inf:
        return Judged(False, memory)
    if seen >= WARM_UP and norm > mean + threshold * (math.sqrt(square) + 0.5 * mean):
        anew = in_a_row + 1 == MOST_IN_A_ROW
        return Judged(True, Memory() if anew else memory._replace(in_a_row=in_a_row + 1), anew)
    if norm < TOO_LARGE:
        weight, distance = 1.0 / min(seen + 1, SPAN), norm - mean
        square = square + weight * (distance * distance - square) if seen else 0.0
        mean, seen = mean + weight * distance, min(seen + 1, SPAN)
    return Judged(False, Memory(mean, square, seen))


class ToldMemory:
    """The memory that a device continues from.

    If the host's memory is not what the device was last told, it gets a new ``version``, with which the device takes it
    over. ``memory``: the host's list, which is behind until the device is waited for.
    """

    def __init__(self) -> None:
        self.memory: list[Any] | None = None
        self.version = 0
        self._told: Sequence[Any] | None = None

    def tell(self, memory: list[Any]) -> None:
        """Make this the memory that the next decision of a device continues from."""
        if memory is not self.memory or memory != self._told:
            self.version += 1
        self.memory, self._told = memory, memory.copy()

    def write(self, words: NDArray[np.int64]) -> None:
        """Write the memory into the words of `Told`."""
        if self.memory is not None:
            words[Told.SPIKES] = self.version
            words.view(np.float64)[[Told.MEAN, Told.SQUARE]] = self.memory[:2]
            words[[Told.SEEN, Told.IN_A_ROW]] = self.memory[2:]

    def take(self, kept: NDArray[np.int64]) -> None:
        """Take over a device's memory from the words of `Kept`, unless the host has another one since."""
        if self.memory is not None and kept[Kept.SPIKES] == self.version:
            means = kept.view(np.float64)[[Kept.MEAN, Kept.SQUARE]].tolist()
            self.memory[:] = means + kept[[Kept.SEEN, Kept.IN_A_ROW]].tolist()
        self._told = None
