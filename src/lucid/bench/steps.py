"""Time the steps of several contenders on the same shapes, and compare each with memory bandwidth."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .contenders import BYTES_MOVED, LIMIT, SLOW, Contender, Copy, Step, mover
from .paired import Quartiles, Timed, rounds, sampler
from .shapes import Shape, elements

OPERATIONS = 15  # of the update, per parameter: two moments, the square, the decay, the step
_MOST_MOVED = 2**26  # elements: larger than any cache, and more elements do not change the bandwidth
_SLOW_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class StepTimes(Timed):
    """Seconds per step, by contender; `moved`: bytes that each of its steps must move."""

    parameters: int
    samples: dict[str, list[float]]
    moved: dict[str, float]
    failures: dict[str, str]

    def gigabytes(self, name: str) -> float:
        """GB/s, counting the bytes that must move."""
        return self.moved[name] / self.seconds(name) / 1e9

    def of_limit(self, name: str) -> Quartiles:
        """Its bytes per second as a part of a plain copy's, within rounds."""
        part = self.moved[name] / self.moved[LIMIT]
        return Quartiles(*(part * each for each in self.times(LIMIT, name)))


def time_steps(contenders: Sequence[Contender], shapes: Sequence[Shape], count: int, device: str) -> StepTimes:
    """Time a step of each contender on its own tensors. If one fails, the others are timed all the same."""
    on_gpu = torch.device(device).type == "cuda"
    wait: Callable[[], object] = functools.partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    number = min(elements(shapes), _MOST_MOVED)
    limit: Step = Copy(LIMIT).make([(number,)], device) if on_gpu else mover(number)
    moved: dict[str, float] = {LIMIT: (8 if on_gpu else BYTES_MOVED) * number}
    samplers = {LIMIT: sampler(limit, warm=True, wait=wait)}
    failures = {}
    for contender in contenders:
        try:
            samplers[contender.name] = sampler(contender.make(shapes, device), warm=True, wait=wait)
            moved[contender.name] = contender.moved(shapes)
        except Exception as error:
            failures[contender.name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    counts = {name: min(count, _SLOW_ROUNDS) if name in SLOW else count for name in samplers}
    return StepTimes(elements(shapes), rounds(samplers, counts, "rounds"), moved, failures)


def draw_roofline(times: StepTimes, title: str, path: Path) -> None:
    """Draw each step's operations per second, under the limit of memory bandwidth for its bytes per parameter."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    limit = times.gigabytes(LIMIT)
    names = [name for name in times.samples if name != LIMIT]
    at = {name: OPERATIONS * times.parameters / times.moved[name] for name in names}
    reached = {name: OPERATIONS * times.parameters / times.seconds(name) / 1e9 for name in names}
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    ends = [0.7 * min(at.values()), 1.5 * max(at.values())]
    axes.loglog(ends, [limit * end for end in ends], color="black", label=f"memory: {limit:.3g} GB/s, measured")
    for place, name in enumerate(names):
        part = times.of_limit(name).median
        label = f"{name}: {1e3 * times.seconds(name):.3g} ms, {part:.2f} of the limit"
        axes.plot(at[name], reached[name], "o" if name.startswith("lucid") else "s", color=f"C{place}", label=label)
    axes.set_xlabel("operations of the update per byte that must move")
    axes.set_ylabel("billion operations per second")
    axes.set_title(title)
    for side in (axes.xaxis, axes.yaxis):
        side.set_major_formatter(StrMethodFormatter("{x:g}"))
        side.set_minor_formatter(StrMethodFormatter("{x:.2g}"))
        side.set_tick_params(which="minor", labelsize=7)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper left", fontsize=8)
    lowest = min([*reached.values(), limit * ends[0]])
    axes.set_ylim(0.6 * lowest, 3.5 * limit * ends[1])
    figure.savefig(path, dpi=120)


def described(times: StepTimes) -> Mapping[str, Mapping[str, float]]:
    """Return the figures of each contender, by name."""
    return {
        name: {
            "milliseconds": 1e3 * times.seconds(name),
            "bytes_a_parameter": times.moved[name] / times.parameters,
            "gigabytes_a_second": times.gigabytes(name),
            "of_limit": times.of_limit(name).median,
        }
        for name in times.samples
        if name != LIMIT
    }
