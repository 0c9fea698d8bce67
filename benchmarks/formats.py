"""The step in each number format, beside torch's fused one in float32 and in naive bf16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lucid.bench.contenders import FORMATS, Format
from lucid.bench.machine import last_level_cache
from lucid.bench.paired import Timed, rounds, sampler
from lucid.bench.shapes import Shape, parameters
from lucid.bench.shapes import elements as element_count

from . import footprint

# Parameters of one dimension keep float32 moments under 8bit; those of the last case do not.
CASES: dict[str, Sequence[Shape]] = {
    "formats-64M": [(2**16, 2**10)],
    "formats-1000x1000": 1000 * [(1000,)],
    "formats-1000x64x64": 1000 * [(64, 64)],
}


@dataclass(frozen=True, slots=True)
class FormatResult(Timed):
    """The step in each format, and the resident bytes that each one holds."""

    case: str
    elements: int
    samples: dict[str, list[float]]
    resident: dict[str, int]  # weights, gradients and state; empty where not measured

    def bytes_a_parameter(self, name: str) -> float | None:
        return self.resident[name] / self.elements if name in self.resident else None


def time_formats(case: str, count: int) -> FormatResult:
    """Time one case; each format has parameters, gradients and state of its own."""
    shapes = CASES[case]
    elements = element_count(shapes)
    large = 16 * elements >= 4 * last_level_cache()

    def step_of(kind: Format) -> Callable[[], object]:
        step = kind.optimizer(parameters(shapes, kind.dtype)).step
        step()
        return step

    samplers, resident = {}, {}
    for kind in FORMATS:
        before = footprint.resident_bytes()
        step = step_of(kind)
        after = footprint.resident_bytes()
        if large and before is not None and after is not None:
            resident[kind.name] = after - before
        samplers[kind.name] = sampler(step, warm=not large)
    samples = rounds(samplers, dict.fromkeys(samplers, count), case)
    return FormatResult(case, elements, samples, resident)
