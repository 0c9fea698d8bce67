"""What was measured: samples, before any statistics but each sample's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lucid.bench.contenders import BYTES_MOVED, LIMIT, LUCID
from lucid.bench.paired import Quartiles, Timed
from lucid.bench.shapes import Case

from .averages import AveragesResult
from .clipping import ClippingResult
from .footprint import ImportSeconds
from .formats import FormatResult
from .overhead import Cost
from .training import LoopResult


@dataclass(frozen=True, slots=True)
class StepResult(Timed):
    """The step alone."""

    case: str
    tensors: int
    elements: int
    samples: dict[str, list[float]]
    temporary: dict[str, int]  # bytes, by contender; empty where not measured

    @classmethod
    def of(cls, case: Case, samples: dict[str, list[float]], temporary: dict[str, int]) -> StepResult:
        return cls(case.name, len(case.shapes), case.elements, samples, temporary)

    def times_lucid(self, peer: str) -> Quartiles | None:
        """How many times as long as lucid's step `peer`'s took; None where it did not take part."""
        return self.times(peer, LUCID) if peer in self.samples else None

    @property
    def part_of_limit(self) -> Quartiles | None:
        """Lucid's speed, as a part of that of only moving the same bytes."""
        return self.times_lucid(LIMIT)

    @property
    def limit_gigabytes(self) -> float:
        """GB/s that the machine moved."""
        return BYTES_MOVED * self.elements / self.seconds(LIMIT) / 1e9

    @property
    def microseconds_a_tensor(self) -> float:
        return 1e6 * self.seconds(LUCID) / self.tensors


@dataclass(slots=True)
class Results:
    """One run of the benchmarks; what was not asked for is empty."""

    machine: dict[str, str]
    quick: bool
    neighbours: float = math.nan  # part of all cores' time that others took meanwhile
    steps: dict[str, StepResult] = field(default_factory=dict)
    formats: dict[str, FormatResult] = field(default_factory=dict)
    clipping: dict[str, ClippingResult] = field(default_factory=dict)
    averages: dict[str, AveragesResult] = field(default_factory=dict)
    loops: dict[str, LoopResult] = field(default_factory=dict)
    imports: list[ImportSeconds] = field(default_factory=list)
    overhead: dict[str, list[Cost]] = field(default_factory=dict)
