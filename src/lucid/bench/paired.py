"""Paired measurements: rounds in which every contender runs once, in an order that alternates.

Other work on the machine slows all contenders of a round equally, so ratios within rounds vary less
than times.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from tqdm import tqdm

T = TypeVar("T")

SAMPLE_SECONDS = 5e-3  # at least, per sample
PAUSE_SECONDS = 0.02  # before each sample: OpenMP's workers stay busy for some ms after their last work


class Quartiles(NamedTuple):
    """The median and quartiles of some values."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Quartiles:
        found = sorted(values)
        if len(found) < 2:
            return cls(*(3 * found))
        return cls(*statistics.quantiles(found, n=4, method="inclusive"))


def ratios(over: Sequence[float], under: Sequence[float]) -> Quartiles:
    """Return the ratios within the rounds that both took part in, which are the first ones."""
    return Quartiles.of(a / b for a, b in zip(over, under, strict=False))


class Timed:
    """Samples of several contenders in seconds; the n-th samples are of the same round."""

    __slots__ = ()
    samples: dict[str, list[float]]

    def seconds(self, name: str) -> float:
        return Quartiles.of(self.samples[name]).median

    def times(self, peer: str, name: str) -> Quartiles:
        """How many times as long as `name`'s step `peer`'s took."""
        return ratios(self.samples[peer], self.samples[name])


def order(names: Sequence[str], number: int) -> list[str]:
    """Return the order of round `number`: pairs of rounds mirror each other (ABBA), then the order rotates by one."""
    first = number // 2 % len(names)
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if number % 2 else turned


def rounds(samplers: Mapping[str, Callable[[], T]], counts: Mapping[str, int], label: str) -> dict[str, list[T]]:
    """Take `counts[name]` samples of each contender; the n-th samples are of the same round."""
    samples: dict[str, list[T]] = {name: [] for name in samplers}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in tqdm(range(max(counts.values())), label, leave=False, disable=None):
            for name in order([name for name in samplers if number < counts[name]], number):
                time.sleep(PAUSE_SECONDS)
                samples[name].append(samplers[name]())
    finally:
        if collecting:
            gc.enable()
    return samples


def sampler(
    step: Callable[[], object], *, warm: bool, wait: Callable[[], object] = lambda: None
) -> Callable[[], float]:
    """Return a function that takes one sample of `step`, in seconds per step.

    The first steps create state and do not count. With `warm`, the first step of each sample does not
    count either: it brings back into the caches what earlier contenders have evicted. `wait` returns
    when the device has finished its work.
    """
    step()
    taken = []
    for _ in range(3):
        wait()
        started = time.perf_counter()
        step()
        wait()
        taken.append(time.perf_counter() - started)
    repetitions = math.ceil(SAMPLE_SECONDS / min(taken))

    def sample() -> float:
        if warm:
            step()
        wait()
        started = time.perf_counter()
        for _ in range(repetitions):
            step()
        wait()
        return (time.perf_counter() - started) / repetitions

    return sample
